"""The expert FFN, fused: the first GEMM gathers its tokens, each epilogue does what follows it, combine sums.

Forward (3 kernels): hidden = act(x[tokens] @ w1 + b1), out = hidden @ w2 + b2, y = sum of weight * out over choices.
Backward: d hidden = dy[tokens] @ w2^T in one pass with d weight, d z, weight * hidden and the column sums behind d b1;
then the two weight gradients, d z @ w1^T and its sum over choices. No gathered rows and no expert outputs are kept.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from widenet_kernels.routing import GATED
from widenet_kernels.triton.activation import activate, activation_gradient, new_partial, store_gradient, sum_slots
from widenet_kernels.triton.combine import gather_sum
from widenet_kernels.triton.grouped_gemm import multiply, product, weight_gradient
from widenet_kernels.triton.tiles import (
    Problem,
    choose_tile,
    current_target,
    find_rows,
    halves,
    input_precision,
    place,
    source_rows,
    sum_dtype,
)


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
    """y [T, D], and the pre-activation z [R, F or 2F] if ``save`` (else of no rows); unused rows of z are unwritten."""
    places = (expert_begin, expert_count, row_choice.shape[0])
    hidden, z = multiply(x, w1, b1, *places, activation, gather=row_choice, k=choice_row.shape[1], save=save)
    out, _ = multiply(hidden, w2, b2, *places)
    return gather_sum(out, weight, choice_row), z


# ------------------------------------------------------------------------------------ back through the second layer


@triton.jit
def load_row_weight(weight_ptr, stride_t, stride_k, row_choice_ptr, rows, served, num_choices, K: tl.constexpr):
    """The flat choice of each row (-1: none) and its gate weight (0 where there is none)."""
    choice = tl.load(row_choice_ptr + rows, mask=rows < served, other=-1)
    valid = (choice >= 0) & (choice < num_choices)
    token = (choice // K).to(tl.int64)
    weight_ptrs = weight_ptr + token * stride_t + (choice % K).to(tl.int64) * stride_k
    return tl.where(valid, choice, -1), tl.load(weight_ptrs, mask=valid, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "num_slots", "num_choices"])
def _hidden_backward_kernel(
    dy_ptr, dy_stride_t, dy_stride_d,  # [T, D]
    w2_ptr, w2_stride_e, w2_stride_f, w2_stride_d,  # [E, F, D]
    z_ptr,  # [R, F], [R, 2F] when gated: contiguous
    weight_ptr, weight_stride_t, weight_stride_k,  # [T, K]
    row_choice_ptr, expert_begin_ptr, expert_count_ptr,
    dz_ptr, scaled_ptr,  # like z, and [R, F]: weight * act(z); each may be None
    dot_ptr, partial_ptr,  # [tiles, R] and [slots, F or 2F]; each may be None
    num_rows, num_slots, num_choices, F, D,
    E: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, GLU: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """From dy [T, D]: d act(z) = dy[tokens] @ w2^T before the gate weight, and all that follows from it and z."""
    slot, tile = place(tl.program_id(0), num_slots, tl.cdiv(F, BLOCK_N), GROUP)
    expert, first_row, served, _ = find_rows(slot, expert_begin_ptr, expert_count_ptr, num_rows, E, BLOCK_M)
    if first_row >= served:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    NEED_GRAD: tl.constexpr = dz_ptr is not None or dot_ptr is not None or partial_ptr is not None
    grad = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    if NEED_GRAD:
        tokens = source_rows(rows, served, row_choice_ptr, num_choices, K)
        grad, _ = product(dy_ptr, tokens, dy_stride_t, dy_stride_d, w2_ptr + expert * w2_stride_e, w2_stride_d,
                          w2_stride_f, column, F, 0, D, SUM, False, BLOCK_K, EVEN_K, PRECISION)  # fmt: skip

    _, weight = load_row_weight(
        weight_ptr, weight_stride_t, weight_stride_k, row_choice_ptr, rows, served, num_choices, K
    )
    if partial_ptr is not None:
        partial_ptr += slot.to(tl.int64) * (2 * F if GLU else F)
    left, right = halves(grad)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N // 2).to(tl.int64)
    dots = _store_hidden(left, weight.to(SUM), z_ptr, dz_ptr, scaled_ptr, partial_ptr, rows, served, column, F,
                         ACTIVATION, GLU)  # fmt: skip
    dots += _store_hidden(right, weight.to(SUM), z_ptr, dz_ptr, scaled_ptr, partial_ptr, rows, served,
                          column + BLOCK_N // 2, F, ACTIVATION, GLU)  # fmt: skip
    if dot_ptr is not None:
        tl.store(dot_ptr + tile.to(tl.int64) * num_rows + rows, dots, mask=rows < served)


@triton.jit
def _store_hidden(grad, weight, z_ptr, dz_ptr, scaled_ptr, partial_ptr, rows, served, column, F,
                  ACTIVATION: tl.constexpr, GLU: tl.constexpr):  # fmt: skip
    """d z and its column sums, weight * act(z), from d act(z) before the gate weight; returns <d act(z), act(z)>."""
    mask = (rows < served)[:, None] & (column < F)[None, :]
    width = 2 * F if GLU else F
    offset = rows[:, None] * width + column[None, :]
    z = tl.load(z_ptr + offset, mask=mask, other=0.0).to(grad.dtype)
    a, v = activate(z, ACTIVATION), z
    if GLU:
        v = tl.load(z_ptr + offset + F, mask=mask, other=0.0).to(grad.dtype)
        a *= v
    dots = tl.sum(tl.where(mask, grad * a, 0.0), axis=1)
    if scaled_ptr is not None:
        scaled = (weight[:, None] * a).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + rows[:, None] * F + column[None, :], scaled, mask=mask)
    dz, dv = activation_gradient(weight[:, None] * grad, z, v, ACTIVATION, GLU)
    store_gradient(dz, dz_ptr, offset, partial_ptr, column, mask, column < F)
    if GLU:
        store_gradient(dv, dz_ptr, offset + F, partial_ptr, column + F, mask, column < F)
    return dots


class _HiddenGradient(NamedTuple):
    """What the pass back through the second layer leaves; None where it was not needed."""

    dz: Tensor | None  # [R, F or 2F], like z
    scaled: Tensor | None  # [R, F]: weight * act(z), what the second weight gradient multiplies with dy
    dots: Tensor | None  # [tiles, R]: <d act(z), act(z)> over each tile's columns, the parts of d weight
    partial: Tensor | None  # [slots, F or 2F]: column sums of d z, the parts of d b1
    block_m: int  # rows of a slot of partial


def hidden_backward(
    grad: Tensor,
    weight: Tensor,
    row_choice: Tensor,
    expert_begin: Tensor,
    expert_count: Tensor,
    z: Tensor,
    w2: Tensor,
    activation: str,
    need_z: bool,
    need_scaled: bool,
    need_weight: bool,
    need_b1: bool,
) -> _HiddenGradient:
    (num_rows, width), (num_experts, hidden, dim) = z.shape, w2.shape
    precision = input_precision(grad.dtype)
    form = "hidden_glu" if activation in GATED else "hidden"
    problem = Problem(form, grad.dtype, num_rows // num_experts, hidden, dim, precision)
    tile = choose_tile(problem, current_target())
    tiles = triton.cdiv(hidden, tile.block_n)
    num_slots = num_rows // tile.block_m + num_experts
    sums = torch.float64 if grad.dtype == torch.float64 else torch.float32
    out = _HiddenGradient(
        z.new_empty(z.shape) if need_z else None,
        z.new_empty(num_rows, hidden) if need_scaled else None,
        z.new_empty(tiles, num_rows, dtype=sums) if need_weight else None,
        new_partial(z, num_rows, num_experts, width, tile.block_m) if need_b1 else None,
        tile.block_m,
    )
    if z.numel() and any(t is not None for t in out[:4]):
        _hidden_backward_kernel[(num_slots * tiles,)](
            grad, *grad.stride(), w2, *w2.stride(), z, weight, *weight.stride(), row_choice, expert_begin, expert_count,
            *out[:4], num_rows, num_slots, weight.numel(), hidden, dim,
            E=num_experts, K=weight.shape[1], ACTIVATION=GATED.get(activation, activation), GLU=activation in GATED,
            SUM=sum_dtype(grad), PRECISION=precision, EVEN_K=dim % tile.block_k == 0, **tile.launch(),
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows", "num_slots", "num_choices"])
def _output_backward_kernel(
    dy_ptr, dy_stride_t, dy_stride_d,  # [T, D]
    b2_ptr, b2_stride_e, b2_stride_d,  # [E, D] or None
    weight_ptr, weight_stride_t, weight_stride_k,  # [T, K]
    choice_row_ptr, row_choice_ptr, expert_begin_ptr, expert_count_ptr,
    dot_ptr, grad_weight_ptr, partial_ptr,  # [tiles, R] and [T, K], or both None; [slots, D] or None
    num_rows, num_slots, num_choices, num_tiles, D,
    E: tl.constexpr, K: tl.constexpr, SUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d weight[choice] = the sum of its dots + <dy, b2>, 0 for dropped choices; partial: column sums of weight * dy."""
    slot = tl.program_id(0)
    if grad_weight_ptr is not None:
        choices = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row = tl.load(choice_row_ptr + choices, mask=choices < num_choices, other=0)
        dropped = (row < 0) | (row >= num_rows)
        nothing = tl.zeros((BLOCK_M,), grad_weight_ptr.dtype.element_ty)
        tl.store(grad_weight_ptr + choices, nothing, mask=(choices < num_choices) & dropped)
    if slot >= num_slots:
        return
    expert, first_row, served, _ = find_rows(slot, expert_begin_ptr, expert_count_ptr, num_rows, E, BLOCK_M)
    if first_row >= served:
        return
    rows = first_row + tl.arange(0, BLOCK_M)
    choice, weight = load_row_weight(
        weight_ptr, weight_stride_t, weight_stride_k, row_choice_ptr, rows, served, num_choices, K
    )
    dots = tl.zeros((BLOCK_M,), SUM)
    if b2_ptr is not None or partial_ptr is not None:
        dy_ptrs = dy_ptr + (tl.maximum(choice, 0) // K).to(tl.int64)[:, None] * dy_stride_t
        for first in range(0, D, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D).to(tl.int64)
            mask = (choice >= 0)[:, None] & (column < D)[None, :]
            dy = tl.load(dy_ptrs + column[None, :] * dy_stride_d, mask=mask, other=0.0).to(SUM)
            if partial_ptr is not None:
                partial = tl.sum(weight.to(SUM)[:, None] * dy, axis=0)
                tl.store(partial_ptr + slot.to(tl.int64) * D + column, partial, mask=column < D)
            if b2_ptr is not None:
                b2_ptrs = b2_ptr + expert * b2_stride_e + column * b2_stride_d
                dots += tl.sum(dy * tl.load(b2_ptrs, mask=column < D, other=0.0).to(SUM)[None, :], axis=1)
    if grad_weight_ptr is not None:
        for tile in range(0, num_tiles):
            dot_ptrs = dot_ptr + tl.cast(tile, tl.int64) * num_rows + rows
            dots += tl.load(dot_ptrs, mask=choice >= 0, other=0.0)
        tl.store(grad_weight_ptr + choice, dots.to(grad_weight_ptr.dtype.element_ty), mask=choice >= 0)


def output_backward(
    grad: Tensor,
    weight: Tensor,
    choice_row: Tensor,
    row_choice: Tensor,
    expert_begin: Tensor,
    expert_count: Tensor,
    b2: Tensor | None,
    dots: Tensor | None,
    grad_b2: Tensor | None,
    add: bool,
) -> Tensor:
    """d weight [T, K] from the dots (of no elements without them), and d b2 [E, D] into ``grad_b2``, if given."""
    num_rows, num_experts, dim = row_choice.shape[0], expert_begin.shape[0], grad.shape[1]
    grad_weight = weight.new_empty(weight.shape if dots is not None else 0)
    block_m = 64
    num_slots = num_rows // block_m + num_experts
    partial = None if grad_b2 is None else new_partial(grad, num_rows, num_experts, dim, block_m)
    if dots is not None or partial is not None:
        b2 = None if dots is None else b2
        _output_backward_kernel[(max(num_slots, triton.cdiv(weight.numel(), block_m)),)](
            grad, *grad.stride(), b2, *((0, 0) if b2 is None else b2.stride()), weight, *weight.stride(),
            choice_row, row_choice, expert_begin, expert_count,
            dots, None if dots is None else grad_weight, partial,
            num_rows, num_slots, weight.numel(), 0 if dots is None else dots.shape[0], dim,
            E=num_experts, K=weight.shape[1], SUM=sum_dtype(grad), BLOCK_M=block_m, BLOCK_D=64, num_warps=4,
        )  # fmt: skip
    if partial is not None and grad_b2 is not None:
        sum_slots(partial, grad_b2, expert_begin, expert_count, num_rows, block_m, add)
    return grad_weight


# ------------------------------------------------------------------------------------------------------- the backward


class _Experts(NamedTuple):
    """Where the gradients of the experts' parameters go; None where none is wanted."""

    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None


def _backward(
    out: _Experts,
    add: bool,
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
) -> tuple[Tensor, Tensor]:
    """d x and d weight; the experts' gradients go into ``out``, added to what it holds if ``add``."""
    experts, k = (expert_begin, expert_count), choice_row.shape[1]
    places = (*experts, row_choice.shape[0])
    need_z = need_x or out.w1 is not None
    hidden = hidden_backward(
        grad, weight, row_choice, *experts, z, w2, activation,
        need_z, out.w2 is not None, need_weight, out.b1 is not None,
    )  # fmt: skip
    grad_weight = output_backward(grad, weight, choice_row, row_choice, *experts, b2, hidden.dots, out.b2, add)
    if out.b1 is not None and hidden.partial is not None:
        sum_slots(hidden.partial, out.b1, *places, hidden.block_m, add)
    if out.w2 is not None and hidden.scaled is not None:
        weight_gradient(hidden.scaled, grad, out.w2, *places, gather="b", row_choice=row_choice, k=k, add=add)
    if out.w1 is not None and hidden.dz is not None:
        weight_gradient(x, hidden.dz, out.w1, *places, gather="a", row_choice=row_choice, k=k, add=add)
    grad_x = x.new_empty(0)
    if need_x and hidden.dz is not None:
        grad_rows, _ = multiply(hidden.dz, w1.transpose(1, 2), None, *places)
        grad_x = gather_sum(grad_rows, None, choice_row)
    return grad_x, grad_weight


def moe_ffn_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """d x, d weight, d w1, d b1, d w2, d b2; of no elements where not needed."""
    *inputs, need_w1, need_b1, need_w2, need_b2 = arguments
    w1, w2 = inputs[8:10]
    num_experts, dim, width = w1.shape
    out = _Experts(
        torch.empty_like(w1) if need_w1 else None,
        w1.new_empty(num_experts, width) if need_b1 else None,
        torch.empty_like(w2) if need_w2 else None,
        w1.new_empty(num_experts, dim) if need_b2 else None,
    )
    grads = _backward(out, False, *inputs)
    return *grads, *(w1.new_empty(0) if t is None else t for t in out)


def moe_ffn_backward_accumulate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As :func:`moe_ffn_backward`, but adds d w1, d b1, d w2, d b2 into the last four arguments, where given."""
    return _backward(_Experts(*arguments[-4:]), True, *arguments[:-4])
