"""The experts' activations and their derivatives, and the elementwise backward of a layer: d z, and its column sums.

The gated ones act on the two halves of z [R, 2F]: act(gate half) * value half.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from widenet_kernels.routing import GATED
from widenet_kernels.triton.tiles import INTERPRETED, find_rows, load_row_weight, sum_dtype

SLOT = 64  # rows of one expert whose column sums are one partial sum
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution: 1 / sqrt(2 pi)
NEGATIVE_LOG2_E = tl.constexpr(-1.4426950408889634)
TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): 0.5 (1 + tanh(u)) is sigmoid(2u)
TANH_CUBIC = tl.constexpr(0.044715)


def activation_constants(activation: str, dtype: torch.dtype) -> dict[str, Any]:
    """ACTIVATION and GLU of a kernel whose results are of this dtype."""
    name = GATED.get(activation, activation)
    short = name == "gelu" and dtype.itemsize == 2
    return {"ACTIVATION": "short_gelu" if short else name, "GLU": activation in GATED}


@triton.jit
def exp2(x):
    """2^x; of fp32 without subnormal results, which would take three instructions more."""
    return tl.exp2(x) if INTERPRETED or x.dtype == tl.float64 else libdevice.exp2(x)


@triton.jit
def inverse(x):
    """1 / x of moderate x, by the fast division where there is one."""
    return 1.0 / x if INTERPRETED or x.dtype == tl.float64 else libdevice.fast_dividef(1.0, x)


@triton.jit
def sigmoid(x):
    return inverse(1.0 + exp2(x * NEGATIVE_LOG2_E))


@triton.jit
def bell(z):
    """exp(-z^2 / 2)"""
    return exp2(z * z * (0.5 * NEGATIVE_LOG2_E))


@triton.jit
def short_normal_cdf(z):
    """The normal distribution's, off by 1.3e-5 of the tail up to abs(z) = 7: rounding to 16 bits is 2.4e-4 and more.

    The tail's logarithm is smooth: a polynomial of it, of the least relative error of the tail on [0, 7], takes a third
    of erf's instructions. Beyond, where the tail is below 1e-12, it is 2e-3 off at 8 and falls to 0.
    """
    u = tl.abs(z)
    tail = 5.615336704067886e-05 - 1.5882166053415858e-06 * u
    tail = -0.0008832155144773424 + tail * u
    tail = 0.008303219452500343 + tail * u
    tail = -0.05350131914019585 + tail * u
    tail = -0.4589643180370331 + tail * u
    tail = -1.1510356664657593 + tail * u
    tail = exp2(-1.0000139474868774 + tail * u)
    return tl.where(z < 0.0, tail, 1.0 - tail)


@triton.jit
def activate(z, NAME: tl.constexpr):
    """act(z); an empty name is the identity."""
    if NAME == "gelu":
        return z * (0.5 * (1.0 + tl.erf(z * SQRT_HALF)))
    elif NAME == "short_gelu":
        return z * short_normal_cdf(z)
    elif NAME == "gelu_tanh":
        return z * sigmoid((z + z * z * z * TANH_CUBIC) * TANH_SCALE)
    elif NAME == "relu":
        return tl.where(z <= 0.0, 0.0, z)  # NaN stays NaN
    elif NAME == "silu":
        return z * sigmoid(z)
    else:
        return z


@triton.jit
def derivative(z, NAME: tl.constexpr):
    """act'(z)"""
    if NAME == "gelu":
        return 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * tl.exp(-0.5 * z * z) * DENSITY_AT_0
    elif NAME == "short_gelu":
        return short_normal_cdf(z) + z * bell(z) * DENSITY_AT_0
    elif NAME == "gelu_tanh":
        s = sigmoid((z + z * z * z * TANH_CUBIC) * TANH_SCALE)
        return s + z * s * (1.0 - s) * (1.0 + z * z * (3.0 * TANH_CUBIC)) * TANH_SCALE
    elif NAME == "relu":
        return tl.where(z > 0.0, 1.0, 0.0).to(z.dtype)
    else:
        s = sigmoid(z)
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


@triton.jit(do_not_specialize=["num_rows", "num_choices"])
def _activation_backward_kernel(
    grad_ptr, grad_stride_row, grad_stride_n,  # [R, F]: d act(z) before the gate weight; None if scaled alone is wanted
    z_ptr,  # [R, F], [R, 2F] when gated, contiguous; None without an activation
    weight_ptr, weight_stride_t, weight_stride_k, row_choice_ptr,  # [T, K] and [R], or both None: weights of 1
    dz_ptr, scaled_ptr,  # like z, and [R, F], which may be grad: weight * act(z); each may be None
    dot_ptr, partial_ptr,  # [tiles, R] and [slots, F or 2F]; each may be None
    expert_begin_ptr, expert_count_ptr, num_rows, num_choices, F,
    E: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, GLU: tl.constexpr, SUM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d z and its column sums, weight * act(z), <d act(z), act(z)> over the tile's columns: all of one pass."""
    # the tiles of a row follow each other: what is in flight lies together in memory
    tiles = tl.cdiv(F, BLOCK_N)
    slot, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    _, first_row, served, _ = find_rows(slot, expert_begin_ptr, expert_count_ptr, num_rows, E, BLOCK_M)
    if first_row >= served:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    mask = (rows < served)[:, None] & (column < F)[None, :]
    width = 2 * F if GLU else F
    offset = rows[:, None] * width + column[None, :]
    grad = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    if grad_ptr is not None:
        grad_ptrs = grad_ptr + rows[:, None] * grad_stride_row + column[None, :] * grad_stride_n
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(SUM)
    z, v = grad, grad
    if ACTIVATION != "":
        z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(SUM)
    if GLU:
        v = tl.load(z_ptr + offset + F, mask=mask, other=0.0).to(SUM)

    if weight_ptr is not None:
        _, weight = load_row_weight(
            weight_ptr, weight_stride_t, weight_stride_k, row_choice_ptr, rows, served, num_choices, K
        )
        weight = weight.to(SUM)[:, None]
        a = activate(z, ACTIVATION)
        if GLU:
            a *= v
        if dot_ptr is not None:
            dots = tl.sum(tl.where(mask, grad * a, 0.0), axis=1)
            tl.store(dot_ptr + tile.to(tl.int64) * num_rows + rows, dots, mask=rows < served)
        if scaled_ptr is not None:
            tl.debug_barrier()  # all of grad that lies in the place of scaled has been read
            scaled = (weight * a).to(scaled_ptr.dtype.element_ty)
            tl.store(scaled_ptr + rows[:, None] * F + column[None, :], scaled, mask=mask)
        grad *= weight
    dz, dv = activation_gradient(grad, z, v, ACTIVATION, GLU)
    store_gradient(dz, dz_ptr, offset, partial_ptr, slot.to(tl.int64) * width + column, mask, column < F)
    if GLU:
        store_gradient(dv, dz_ptr, offset + F, partial_ptr, slot.to(tl.int64) * width + column + F, mask, column < F)


class RowWeights(NamedTuple):
    """The gate weight of each row: weight [T, K] at the row's choice, row_choice [R]."""

    weight: Tensor
    row_choice: Tensor


class Gradient(NamedTuple):
    """What the pass back through an activation leaves; None where it was not wanted."""

    dz: Tensor | None  # [R, F or 2F], like z
    partial: Tensor | None  # [slots, F or 2F]: column sums of d z, the parts of d bias
    scaled: Tensor | None = None  # [R, F]: weight * act(z), what the next layer's weight gradient multiplies
    dots: Tensor | None = None  # [tiles, R]: <d act(z), act(z)> over each tile's columns, the parts of d weight


def activation_backward(
    grad: Tensor | None,
    z: Tensor,
    expert_begin: Tensor,
    expert_count: Tensor,
    activation: str,
    need_z: bool,
    need_bias: bool,
    weights: RowWeights | None = None,
    need_scaled: bool = False,
    need_weight: bool = False,
) -> Gradient:
    """From grad [R, F], d act(z) before the gate weight; ``scaled`` takes its place. Unused rows are unwritten.

    Without an activation d z is the gradient itself, and z is not read.
    """
    like = z if grad is None else grad
    num_rows, width = (z if activation else like).shape
    hidden, num_experts = width // 2 if activation in GATED else width, expert_begin.shape[0]
    block_n = 32 if like.dtype == torch.float64 else 64  # what a thread's registers hold
    tiles = triton.cdiv(hidden, block_n)
    sums = torch.float64 if like.dtype == torch.float64 else torch.float32
    out = Gradient(
        like.new_empty(num_rows, width) if need_z and activation else None,
        new_partial(like, num_rows, num_experts, width) if need_bias else None,
        (like.new_empty(num_rows, hidden) if grad is None else grad) if need_scaled else None,
        like.new_empty(tiles, num_rows, dtype=sums) if need_weight else None,
    )
    if num_rows and hidden and any(t is not None for t in out):
        weight, row_choice = weights or (None, None)
        _activation_backward_kernel[((num_rows // SLOT + num_experts) * tiles,)](
            grad, *((0, 0) if grad is None else grad.stride()), z if activation else None,
            weight, *((0, 0) if weight is None else weight.stride()), row_choice,
            out.dz, out.scaled, out.dots, out.partial, expert_begin, expert_count,
            num_rows, 0 if weight is None else weight.numel(), hidden,
            E=num_experts, K=1 if weight is None else weight.shape[1], SUM=sum_dtype(like),
            **activation_constants(activation, like.dtype), BLOCK_M=SLOT, BLOCK_N=block_n, num_warps=8,
        )  # fmt: skip
    return out


# ----------------------------------------------------------------------------------------------- sums over the slots


@triton.jit(do_not_specialize=["num_rows"])
def _sum_slots_kernel(
    partial_ptr, out_ptr,  # [slots, N], [E, N]: contiguous
    expert_begin_ptr, expert_count_ptr, num_rows, N,
    ADD: tl.constexpr, SLOT: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[e] = the sum of partial over the slots of expert e, in their order; ADD: added to what out holds."""
    expert = tl.program_id(0)
    begin = tl.maximum(tl.load(expert_begin_ptr + expert), 0)
    count = tl.minimum(tl.load(expert_count_ptr + expert), num_rows - begin)
    first_slot = (begin // SLOT + expert).to(tl.int64)
    num_slots = tl.cdiv(count, SLOT)
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


def new_partial(like: Tensor, num_rows: int, num_experts: int, width: int) -> Tensor:
    """[slots, N] in the precision of sums: a place for the column sums of every slot."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(num_rows // SLOT + num_experts, width, dtype=dtype)


def sum_slots(
    partial: Tensor, out: Tensor, expert_begin: Tensor, expert_count: Tensor, num_rows: int, add: bool = False
) -> None:
    """out[e] [N] = the sum of an expert's slots, 0 for an expert without rows; ``add``: added to ``out``."""
    num_experts, width = out.shape
    if out.numel():
        block_n = 32  # few columns and many slots at a time: an expert's slots are one program's, one after the other
        _sum_slots_kernel[num_experts, triton.cdiv(width, block_n)](
            partial, out, expert_begin, expert_count, num_rows, width,
            ADD=add, SLOT=SLOT, SLOTS=64, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
