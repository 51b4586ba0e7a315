"""The expert FFN in plain torch: permute, two grouped GEMMs with the activation between, combine."""

from typing import Any

from torch import Tensor

from widenet_kernels.reference.activation import activate
from widenet_kernels.reference.combine import combine, combine_backward
from widenet_kernels.reference.grouped_gemm import grouped_gemm_backward, matmul
from widenet_kernels.reference.permute import permute, permute_backward


def moe_ffn(
    x: Tensor,
    weight: Tensor,
    choice_row: Tensor,
    row_choice: Tensor,
    expert_begin: Tensor,
    expert_count: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    save: bool,
    *grad_buffers: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [T, D], and the pre-activation z [R, F or 2F] if ``save`` (else of no rows)."""
    rows = permute(x, choice_row, row_choice)
    z = matmul(rows, w1, b1, expert_begin, expert_count)
    out = matmul(activate(z, activation), w2, b2, expert_begin, expert_count)
    return combine(out, weight, choice_row, row_choice), z if save else z.new_empty(0, z.shape[1])


def moe_ffn_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    choice_row: Tensor,
    row_choice: Tensor,
    expert_begin: Tensor,
    expert_count: Tensor,
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_w1: bool,
    need_b1: bool,
    need_w2: bool,
    need_b2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d x, d weight, d w1, d b1, d w2, d b2; of no elements where not needed."""
    begin, count = expert_begin, expert_count
    hidden = activate(z, activation)
    # a product that only the gate weights' gradient asks for
    out = matmul(hidden, w2, b2, begin, count) if need_weight else hidden.new_empty(hidden.shape[0], w2.shape[2])
    grad_out, grad_weight = combine_backward(grad, out, weight, choice_row, row_choice, True, need_weight)
    first = need_x or need_w1 or need_b1  # whether the gradient goes further back than the second GEMM
    grad_hidden, grad_w2, grad_b2 = grouped_gemm_backward(
        grad_out, hidden, w2, z, begin, count, "", first, need_w2, need_b2
    )
    nothing = x.new_empty(0)
    grad_x, grad_w1, grad_b1 = nothing, nothing.clone(), nothing.clone()
    if first:
        rows = permute(x, choice_row, row_choice)
        grad_rows, grad_w1, grad_b1 = grouped_gemm_backward(
            grad_hidden, rows, w1, z, begin, count, activation, need_x, need_w1, need_b1
        )
        grad_x = permute_backward(grad_rows, choice_row) if need_x else grad_x
    return grad_x, grad_weight, grad_w1, grad_b1, grad_w2, grad_b2


def moe_ffn_backward_accumulate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As :func:`moe_ffn_backward`, but adds d w1, d b1, d w2, d b2 into the last four arguments, where given."""
    *inputs, grad_w1, grad_b1, grad_w2, grad_b2 = arguments
    buffers = (grad_w1, grad_b1, grad_w2, grad_b2)
    grad_x, grad_weight, *grads = moe_ffn_backward(*inputs, *(buffer is not None for buffer in buffers))
    for buffer, grad in zip(buffers, grads, strict=True):
        if buffer is not None:
            buffer.add_(grad)
    return grad_x, grad_weight
