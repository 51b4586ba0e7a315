"""The experts' activations and their derivatives, and the elementwise backward of a layer: d z, and its column sums.

The gated ones act on the two halves of z [R, 2F]: act(gate half) * value half.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from widenet_kernels.routing import GATED
from widenet_kernels.triton.tiles import find_rows, sum_dtype

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution: 1 / sqrt(2 pi)
TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): 0.5 (1 + tanh(u)) is sigmoid(2u)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(z, NAME: tl.constexpr):
    """act(z); an empty name is the identity."""
    if NAME == "gelu":
        return z * (0.5 * (1.0 + tl.erf(z * SQRT_HALF)))
    elif NAME == "gelu_tanh":
        return z * tl.sigmoid((z + z * z * z * TANH_CUBIC) * TANH_SCALE)
    elif NAME == "relu":
        return tl.where(z <= 0.0, 0.0, z)  # NaN stays NaN
    elif NAME == "silu":
        return z * tl.sigmoid(z)
    else:
        return z


@triton.jit
def derivative(z, NAME: tl.constexpr):
    """act'(z)"""
    if NAME == "gelu":
        return 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * tl.exp(-0.5 * z * z) * DENSITY_AT_0
    elif NAME == "gelu_tanh":
        s = tl.sigmoid((z + z * z * z * TANH_CUBIC) * TANH_SCALE)
        return s + z * s * (1.0 - s) * (1.0 + z * z * (3.0 * TANH_CUBIC)) * TANH_SCALE
    elif NAME == "relu":
        return tl.where(z > 0.0, 1.0, 0.0).to(z.dtype)
    else:
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))


@triton.jit
def activation_gradient(grad, z, v, NAME: tl.constexpr, GLU: tl.constexpr):
    """d z, and d v of the value half (if there is none, d z again), from the gradient of act(z) or act(z) * v."""
    if NAME == "":
        dz, dv = grad, grad
    elif GLU:
        dz, dv = grad * v * derivative(z, NAME), grad * activate(z, NAME)
    else:
        dz = grad * derivative(z, NAME)
        dv = dz
    return dz, dv


@triton.jit
def store_gradient(dz, dz_ptr, offset, partial_ptr, partial_offset, mask, column_mask):
    """Store what is wanted (a pointer may be None) of d z and of its column sums over the tile's used rows."""
    if dz_ptr is not None:
        tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + partial_offset, tl.sum(tl.where(mask, dz, 0.0), axis=0), mask=column_mask)


# ------------------------------------------------------------------------------------------------ elementwise backward


@triton.jit(do_not_specialize=["num_rows"])
def _activation_backward_kernel(
    grad_ptr, grad_stride_row, grad_stride_n,  # [R, F]
    z_ptr, dz_ptr,  # [R, F], [R, 2F] when gated, contiguous; None without an activation
    partial_ptr,  # [slots, F or 2F], or None: the column sums of each slot
    expert_begin_ptr, expert_count_ptr, num_rows, F,
    E: tl.constexpr, ACTIVATION: tl.constexpr, GLU: tl.constexpr, SUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    _, first_row, served, _ = find_rows(slot, expert_begin_ptr, expert_count_ptr, num_rows, E, BLOCK_M)
    if first_row >= served:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    mask = (rows < served)[:, None] & (column < F)[None, :]
    grad_ptrs = grad_ptr + rows[:, None] * grad_stride_row + column[None, :] * grad_stride_n
    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(SUM)
    width = 2 * F if GLU else F
    offset = rows[:, None] * width + column[None, :]
    z, v = grad, grad
    if ACTIVATION != "":
        z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(SUM)
    if GLU:
        v = tl.load(z_ptr + offset + F, mask=mask, other=0.0).to(SUM)
    dz, dv = activation_gradient(grad, z, v, ACTIVATION, GLU)
    store_gradient(dz, dz_ptr, offset, partial_ptr, slot.to(tl.int64) * width + column, mask, column < F)
    if GLU:
        store_gradient(dv, dz_ptr, offset + F, partial_ptr, slot.to(tl.int64) * width + column + F, mask, column < F)


def activation_backward(
    grad: Tensor,
    z: Tensor,
    expert_begin: Tensor,
    expert_count: Tensor,
    activation: str,
    need_z: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """d z [R, N], unwritten in unused rows, and d bias [E, N], from d act(z) [R, F]; of no elements where not needed.

    Without an activation d z is the gradient itself.
    """
    num_rows, hidden = grad.shape
    num_experts, width = expert_begin.shape[0], 2 * hidden if activation in GATED else hidden
    need_z = need_z and activation != ""
    dz = grad.new_empty(num_rows if need_z else 0, width)
    block_m, block_n = 32, 128
    partial = None
    if need_bias:
        partial = new_partial(grad, num_rows, num_experts, width, block_m)
    if dz.numel() or (partial is not None and partial.numel()):
        num_slots = num_rows // block_m + num_experts
        _activation_backward_kernel[num_slots, triton.cdiv(hidden, block_n)](
            grad, *grad.stride(), z if activation else None, dz if need_z else None, partial,
            expert_begin, expert_count, num_rows, hidden,
            E=num_experts, ACTIVATION=GATED.get(activation, activation), GLU=activation in GATED,
            SUM=sum_dtype(grad), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
    grad_bias = grad.new_empty((num_experts, width) if need_bias else 0)
    if partial is not None:
        sum_slots(partial, grad_bias, expert_begin, expert_count, num_rows, block_m)
    return dz if activation else grad, grad_bias


# ----------------------------------------------------------------------------------------------- sums over the slots


@triton.jit(do_not_specialize=["num_rows"])
def _sum_slots_kernel(
    partial_ptr, out_ptr,  # [slots, N], [E, N]: contiguous
    expert_begin_ptr, expert_count_ptr, num_rows, N,
    ADD: tl.constexpr, BLOCK_M: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[e] = the sum of partial over the slots of expert e, in their order; ADD: added to what out holds."""
    expert = tl.program_id(0)
    begin = tl.maximum(tl.load(expert_begin_ptr + expert), 0)
    count = tl.minimum(tl.load(expert_count_ptr + expert), num_rows - begin)
    first_slot = (begin // BLOCK_M + expert).to(tl.int64)
    num_slots = tl.cdiv(count, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    total = tl.zeros((SLOTS, BLOCK_N), partial_ptr.dtype.element_ty)
    for first in range(0, num_slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        mask = (slot < num_slots)[:, None] & (column < N)[None, :]
        total += tl.load(partial_ptr + (first_slot + slot)[:, None] * N + column[None, :], mask=mask, other=0.0)
    out = tl.sum(total, axis=0)
    out_ptrs = out_ptr + expert.to(tl.int64) * N + column
    if ADD:
        out += tl.load(out_ptrs, mask=column < N, other=0.0)
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=column < N)


def new_partial(like: Tensor, num_rows: int, num_experts: int, width: int, block_m: int) -> Tensor:
    """[slots, N] in the precision of sums: a place for the column sums of every slot of ``block_m`` rows."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(num_rows // block_m + num_experts, width, dtype=dtype)


def sum_slots(
    partial: Tensor,
    out: Tensor,
    expert_begin: Tensor,
    expert_count: Tensor,
    num_rows: int,
    block_m: int,
    add: bool = False,
) -> None:
    """out[e] [N] = the sum of an expert's slots, 0 for an expert without rows; ``add``: added to ``out``."""
    num_experts, width = out.shape
    if out.numel():
        block_n = 128
        _sum_slots_kernel[num_experts, triton.cdiv(width, block_n)](
            partial, out, expert_begin, expert_count, num_rows, width,
            ADD=add, BLOCK_M=block_m, SLOTS=16, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
