"""One GEMM per expert over that expert's rows, in plain torch.

Every expert multiplies all R rows and keeps its own: E times the work, but no host sync and nothing to get wrong.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from widenet_kernels.reference.activation import activate, activate_backward


def rows_of_experts(expert_begin: Tensor, expert_count: Tensor, num_rows: int) -> Iterator[Tensor]:
    """For each expert the mask [R, 1] of the rows it serves."""
    row = torch.arange(num_rows, device=expert_begin.device)
    for expert in range(expert_begin.shape[0]):
        begin = expert_begin[expert]
        yield ((row >= begin) & (row < begin + expert_count[expert]))[:, None]


def matmul(rows: Tensor, weight: Tensor, bias: Tensor | None, expert_begin: Tensor, expert_count: Tensor) -> Tensor:
    """[R, N]: rows[r] @ weight[e] + bias[e] for the expert e of row r; unused rows are zero."""
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    for expert, mine in enumerate(rows_of_experts(expert_begin, expert_count, rows.shape[0])):
        product = torch.where(mine, rows, 0) @ weight[expert]
        if bias is not None:
            product = product + bias[expert]
        out = torch.where(mine, product, out)
    return out


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_begin: Tensor,
    expert_count: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """act(rows @ weight + bias), and the pre-activation if there is an activation and ``save`` (else of no rows)."""
    z = matmul(rows, weight, bias, expert_begin, expert_count)
    if not activation:
        return z, z.new_empty(0, z.shape[1])
    return activate(z, activation), z if save else z.new_empty(0, z.shape[1])


def grouped_gemm_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    z: Tensor,
    expert_begin: Tensor,
    expert_count: Tensor,
    activation: str,
    need_rows: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d rows [R, M], d weight [E, M, N] and d bias [E, N]; of no elements where not needed."""
    used = torch.zeros(rows.shape[0], 1, dtype=torch.bool, device=rows.device)
    for mine in rows_of_experts(expert_begin, expert_count, rows.shape[0]):
        used = used | mine
    grad = torch.where(used, grad, 0)
    if activation:
        grad = activate_backward(grad, z, activation)
    grad_rows, grad_weight, grad_bias = rows.new_empty(0), rows.new_empty(0), rows.new_empty(0)
    if need_rows:
        grad_rows = matmul(grad, weight.transpose(1, 2), None, expert_begin, expert_count)
    masks = list(rows_of_experts(expert_begin, expert_count, rows.shape[0]))
    if need_weight:
        products = [torch.where(mine, rows, 0).t() @ torch.where(mine, grad, 0) for mine in masks]
        grad_weight = torch.empty_like(weight).copy_(torch.stack(products))
    if need_bias:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        sums = [torch.where(mine, grad, 0).sum(dim=0, dtype=wide) for mine in masks]
        grad_bias = torch.stack(sums).to(grad.dtype)
    return grad_rows, grad_weight, grad_bias
