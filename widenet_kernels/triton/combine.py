"""Rows of the expert buffers back to tokens: gathered through the plan, weighted and summed, in one pass each way.

Bytes: forward reads the K rows of a token and writes one; backward reads those and dy, and writes every row once.
"""

import triton
import triton.language as tl
from torch import Tensor

from widenet_kernels.triton.tiles import movement_blocks, sum_dtype


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _gather_sum_kernel(
    rows_ptr, rows_stride_r, rows_stride_d,  # [R, D]
    weight_ptr, weight_stride_t, weight_stride_k,  # [T, K], or None for weights of 1
    choice_row_ptr, out_ptr,  # [T, K], [T, D]: contiguous
    num_tokens, num_rows, D,
    K: tl.constexpr, SUM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weight[t, k] * rows[choice_row[t, k]], in k order, skipping dropped choices."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_D), SUM)
    for k in tl.static_range(K):
        row = tl.load(choice_row_ptr + token * K + k, mask=token < num_tokens, other=-1)
        served = (row >= 0) & (row < num_rows)
        row_ptrs = rows_ptr + row.to(tl.int64)[:, None] * rows_stride_r + column[None, :] * rows_stride_d
        term = tl.load(row_ptrs, mask=served[:, None] & (column < D)[None, :], other=0.0).to(SUM)
        if weight_ptr is not None:
            weight_ptrs = weight_ptr + token * weight_stride_t + tl.cast(weight_stride_k, tl.int64) * k
            term *= tl.load(weight_ptrs, mask=served, other=0.0).to(SUM)[:, None]
        total += term
    mask = (token < num_tokens)[:, None] & (column < D)[None, :]
    tl.store(out_ptr + token[:, None] * D + column[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


def gather_sum(rows: Tensor, weight: Tensor | None, choice_row: Tensor) -> Tensor:
    """y [T, D] = sum over k of weight[t, k] * rows[choice_row[t, k]], skipping dropped choices."""
    (num_tokens, k), (num_rows, dim) = choice_row.shape, rows.shape
    out = rows.new_empty(num_tokens, dim)
    if out.numel():
        block_t, block_d = movement_blocks(dim, rows.itemsize)
        _gather_sum_kernel[triton.cdiv(num_tokens, block_t), triton.cdiv(dim, block_d)](
            rows, *rows.stride(), weight, *((0, 0) if weight is None else weight.stride()), choice_row, out,
            num_tokens, num_rows, dim,
            K=k, SUM=sum_dtype(rows, weight), BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out


def combine(rows: Tensor, weight: Tensor, choice_row: Tensor, row_choice: Tensor) -> Tensor:
    return gather_sum(rows, weight, choice_row)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _combine_backward_kernel(
    grad_ptr, grad_stride_t, grad_stride_d,  # [T, D]
    rows_ptr, rows_stride_r, rows_stride_d,  # [R, D]
    weight_ptr, weight_stride_t, weight_stride_k,  # [T, K]
    choice_row_ptr, row_choice_ptr,
    grad_rows_ptr, grad_weight_ptr,  # [R, D], [T, K]: contiguous; each may be None
    num_tokens, num_rows, D,
    K: tl.constexpr, SUM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The token of program i sends its gradient to its rows; of the rows of program i the unused ones become 0."""
    block = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    if grad_rows_ptr is not None:
        choice = tl.load(row_choice_ptr + block, mask=block < num_rows, other=0)
        unused = (block < num_rows) & ((choice < 0) | (choice >= num_tokens.to(tl.int64) * K))
        if tl.max(unused.to(tl.int32), axis=0) > 0:
            nothing = tl.zeros((BLOCK_T, BLOCK_D), grad_rows_ptr.dtype.element_ty)
            for first in range(0, D, BLOCK_D):
                column = first + tl.arange(0, BLOCK_D).to(tl.int64)
                mask = unused[:, None] & (column < D)[None, :]
                tl.store(grad_rows_ptr + block[:, None] * D + column[None, :], nothing, mask=mask)
    for k in tl.static_range(K):
        inside = block < num_tokens
        row = tl.load(choice_row_ptr + block * K + k, mask=inside, other=-1).to(tl.int64)
        served = (row >= 0) & (row < num_rows)
        weight_ptrs = weight_ptr + block * weight_stride_t + tl.cast(weight_stride_k, tl.int64) * k
        weight = tl.load(weight_ptrs, mask=served, other=0.0).to(SUM)
        dots = tl.zeros((BLOCK_T, BLOCK_D), SUM)
        for first in range(0, D, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D).to(tl.int64)
            mask = served[:, None] & (column < D)[None, :]
            grad_ptrs = grad_ptr + block[:, None] * grad_stride_t + column[None, :] * grad_stride_d
            grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(SUM)
            if grad_rows_ptr is not None:
                out = (grad * weight[:, None]).to(grad_rows_ptr.dtype.element_ty)
                tl.store(grad_rows_ptr + row[:, None] * D + column[None, :], out, mask=mask)
            if grad_weight_ptr is not None:
                row_ptrs = rows_ptr + row[:, None] * rows_stride_r + column[None, :] * rows_stride_d
                dots += grad * tl.load(row_ptrs, mask=mask, other=0.0).to(SUM)
        if grad_weight_ptr is not None:
            dot = tl.sum(dots, axis=1).to(grad_weight_ptr.dtype.element_ty)
            tl.store(grad_weight_ptr + block * K + k, dot, mask=inside)


def combine_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    choice_row: Tensor,
    row_choice: Tensor,
    need_rows: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """d rows [R, D] and d weight [T, K]: 0 for unused rows and dropped choices; of no elements where not needed."""
    (num_tokens, k), (num_rows, dim) = choice_row.shape, rows.shape
    # neighbours in every row: the order of a sum follows from the layout, which Triton chooses by the strides
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    rows = rows if rows.stride(1) == 1 or not need_weight else rows.contiguous()
    grad_rows = rows.new_empty(rows.shape if need_rows else 0)
    grad_weight = weight.new_empty(weight.shape if need_weight else 0)
    if grad_rows.numel() or grad_weight.numel():
        block_t, block_d = movement_blocks(dim, rows.itemsize)
        blocks = triton.cdiv(max(num_tokens, num_rows if need_rows else 0), block_t)
        _combine_backward_kernel[(blocks,)](
            grad, *grad.stride(), rows, *rows.stride(), weight, *weight.stride(), choice_row, row_choice,
            grad_rows if need_rows else None, grad_weight if need_weight else None, num_tokens, num_rows, dim,
            K=k, SUM=sum_dtype(rows, weight), BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return grad_rows, grad_weight
