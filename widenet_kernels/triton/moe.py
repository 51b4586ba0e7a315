"""The expert FFN: tokens into rows, two GEMMs with what follows them in their epilogues, and the sum over choices.

Forward (4 kernels): rows = x[tokens], hidden = act(rows @ w1 + b1), out = hidden @ w2 + b2, y = sum of weight * out
over choices. Backward: dy[tokens] @ w2^T is d hidden before the gate weight; one pass over it and z gives d z, weight *
hidden in its place, and the parts of d weight and d b1; then the two weight gradients, d z @ w1^T and its sum over
choices. What is gathered is not kept for the backward: to gather again takes a tenth of one GEMM, and the GEMMs on it
read their rows by the copy engine, which cannot gather.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor, empty_like

from widenet_kernels.triton.activation import SLOT, Gradient, RowWeights, activation_backward, new_partial, sum_slots
from widenet_kernels.triton.combine import gather_sum
from widenet_kernels.triton.grouped_gemm import multiply, weight_gradient
from widenet_kernels.triton.permute import permute
from widenet_kernels.triton.tiles import find_rows, load_row_weight, sum_dtype


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
    hidden, z = multiply(permute(x, choice_row, row_choice), w1, b1, *places, activation, save=save)
    out, _ = multiply(hidden, w2, b2, *places)
    return gather_sum(out, weight, choice_row), z


# ------------------------------------------------------------------------------------ back through the second layer


@triton.jit(do_not_specialize=["num_rows", "num_slots", "num_choices"])
def _output_backward_kernel(
    dy_ptr,  # [R, D], contiguous: the gradient at the token of each row
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
        for first in range(0, D, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D).to(tl.int64)
            mask = (choice >= 0)[:, None] & (column < D)[None, :]
            dy = tl.load(dy_ptr + rows[:, None] * D + column[None, :], mask=mask, other=0.0).to(SUM)
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
    dy: Tensor,
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
    (num_rows, dim), num_experts = dy.shape, expert_begin.shape[0]
    grad_weight = weight.new_empty(weight.shape if dots is not None else 0)
    num_slots = num_rows // SLOT + num_experts
    partial = None if grad_b2 is None else new_partial(dy, num_rows, num_experts, dim)
    if dots is not None or partial is not None:
        b2 = None if dots is None else b2
        _output_backward_kernel[(max(num_slots, triton.cdiv(weight.numel(), SLOT)),)](
            dy, b2, *((0, 0) if b2 is None else b2.stride()), weight, *weight.stride(),
            choice_row, row_choice, expert_begin, expert_count,
            dots, None if dots is None else grad_weight, partial,
            num_rows, num_slots, weight.numel(), 0 if dots is None else dots.shape[0], dim,
            E=num_experts, K=weight.shape[1], SUM=sum_dtype(dy), BLOCK_M=SLOT, BLOCK_D=64, num_warps=4,
        )  # fmt: skip
    if partial is not None and grad_b2 is not None:
        sum_slots(partial, grad_b2, expert_begin, expert_count, num_rows, add)
    return grad_weight


def hidden_backward(
    dy: Tensor,
    weights: RowWeights,
    expert_begin: Tensor,
    expert_count: Tensor,
    z: Tensor,
    w2: Tensor,
    activation: str,
    need_z: bool,
    need_scaled: bool,
    need_weight: bool,
    need_b1: bool,
) -> Gradient:
    """From dy [R, D]: d z and what else is wanted of the pass back through the second layer and the activation."""
    grad = None
    if need_z or need_weight or need_b1:
        grad, _ = multiply(dy, w2.transpose(1, 2), None, expert_begin, expert_count, dy.shape[0])
    return activation_backward(
        grad, z, expert_begin, expert_count, activation, need_z, need_b1, weights, need_scaled, need_weight
    )


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
    experts, places = (expert_begin, expert_count), (expert_begin, expert_count, row_choice.shape[0])
    dy = permute(grad, choice_row, row_choice)
    hidden = hidden_backward(
        dy, RowWeights(weight, row_choice), *experts, z, w2, activation,
        need_x or out.w1 is not None, out.w2 is not None, need_weight, out.b1 is not None,
    )  # fmt: skip
    grad_weight = output_backward(dy, weight, choice_row, row_choice, *experts, b2, hidden.dots, out.b2, add)
    if out.b1 is not None and hidden.partial is not None:
        sum_slots(hidden.partial, out.b1, *places, add)
    if out.w2 is not None and hidden.scaled is not None:
        weight_gradient(hidden.scaled, dy, out.w2, *places, add)
    if out.w1 is not None and hidden.dz is not None:
        weight_gradient(permute(x, choice_row, row_choice), hidden.dz, out.w1, *places, add)
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
        empty_like(w1) if need_w1 else None,
        w1.new_empty(num_experts, width) if need_b1 else None,
        empty_like(w2) if need_w2 else None,
        w1.new_empty(num_experts, dim) if need_b2 else None,
    )
    grads = _backward(out, False, *inputs)
    return *grads, *(w1.new_empty(0) if t is None else t for t in out)


def moe_ffn_backward_accumulate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As :func:`moe_ffn_backward`, but adds d w1, d b1, d w2, d b2 into the last four arguments, where given."""
    return _backward(_Experts(*arguments[-4:]), True, *arguments[:-4])
