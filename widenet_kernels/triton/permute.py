"""Tokens into the rows of the expert buffers. Bytes: every used row is read and every row written once."""

import triton
import triton.language as tl
from torch import Tensor

from widenet_kernels.triton.combine import gather_sum
from widenet_kernels.triton.tiles import movement_blocks


@triton.jit(do_not_specialize=["num_rows", "num_choices"])
def _permute_kernel(
    x_ptr, x_stride_t, x_stride_d,  # [T, D]
    row_choice_ptr, out_ptr,  # [R], [R, D]: contiguous
    num_rows, num_choices, D, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    choice = tl.load(row_choice_ptr + row, mask=row < num_rows, other=-1)
    used = (choice >= 0) & (choice < num_choices)
    token = (choice // K).to(tl.int64)
    x_ptrs = x_ptr + token[:, None] * x_stride_t + column[None, :] * x_stride_d
    x = tl.load(x_ptrs, mask=used[:, None] & (column < D)[None, :], other=0.0)
    mask = (row < num_rows)[:, None] & (column < D)[None, :]
    tl.store(out_ptr + row[:, None] * D + column[None, :], x, mask=mask)


def permute(x: Tensor, choice_row: Tensor, row_choice: Tensor) -> Tensor:
    """rows [R, D]: row r is the token it serves, unused rows are zero."""
    num_rows, dim = row_choice.shape[0], x.shape[1]
    out = x.new_empty(num_rows, dim)
    if out.numel():
        block_r, block_d = movement_blocks(dim, x.itemsize)
        _permute_kernel[triton.cdiv(num_rows, block_r), triton.cdiv(dim, block_d)](
            x, *x.stride(), row_choice, out, num_rows, choice_row.numel(), dim,
            K=choice_row.shape[1], BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out


def permute_backward(grad: Tensor, choice_row: Tensor) -> Tensor:
    """d x [T, D]: the sum of the gradients of the token's rows, in k order."""
    return gather_sum(grad, None, choice_row)
