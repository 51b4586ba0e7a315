"""combine: rows of the expert buffers back to tokens, weighted by the gate and summed."""

from typing import Any

import torch
from torch import Tensor

from widenet_kernels.ops.checks import check_device, check_float, check_plan, check_tensor, wants_grad
from widenet_kernels.ops.registry import call, define_op, ops_for, run
from widenet_kernels.reference import combine as reference
from widenet_kernels.routing import RoutingPlan


def _fake(rows: Tensor, weight: Tensor, choice_row: Tensor, row_choice: Tensor) -> Tensor:
    return rows.new_empty(choice_row.shape[0], rows.shape[1])


def _fake_backward(
    grad: Tensor,
    rows: Tensor,
    weight: Tensor,
    choice_row: Tensor,
    row_choice: Tensor,
    need_rows: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape if need_rows else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    need = ctx.needs_input_grad[:2]
    grads = run(ops.combine_backward, grad, *ctx.saved_tensors, *need)
    return *(g if needed else None for g, needed in zip(grads, need, strict=True)), None, None


define_op(
    "combine_backward(Tensor grad, Tensor rows, Tensor weight, Tensor choice_row, Tensor row_choice, "
    "bool need_rows, bool need_weight) -> (Tensor, Tensor)",
    reference.combine_backward,
    _fake_backward,
)
define_op(
    "combine(Tensor rows, Tensor weight, Tensor choice_row, Tensor row_choice) -> Tensor",
    reference.combine,
    _fake,
    _setup_context,
    _backward,
)


def combine(rows: Tensor, weight: Tensor, plan: RoutingPlan, *, backend: str | None = None) -> Tensor:
    """y [T, D]: the sum over k of weight[t, k] * rows[row of (t, k)], in k order, in fp32 (fp64 if anything is fp64).

    Dropped choices are skipped, so whatever their weight holds reaches nothing.

    Args:
        rows: [R, D] fp32, bf16, fp16 or fp64; y has its dtype.
        weight: [T, K], any of these dtypes.
        plan: from :func:`plan_routing` or :func:`route`.
        backend: None (the best there is), "native", "triton" or "reference".

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    check_tensor("combine", "rows", rows, (None, None), "[R, D]")
    check_float("combine", "rows", rows)
    check_plan("combine", plan, rows, "rows")
    check_tensor("combine", "rows", rows, (plan.num_rows, None), "[R, D] with the plan's R")
    check_tensor("combine", "weight", weight, tuple(plan.choice_row.shape), "[T, K] with the plan's T and K")
    check_float("combine", "weight", weight)
    check_device("combine", "weight", weight, "rows", rows)
    dtype = torch.float64 if weight.dtype == torch.float64 else rows.dtype
    ops = ops_for("combine", backend, rows, dtype)
    return call(ops.combine, wants_grad(rows, weight), rows, weight, plan.choice_row, plan.row_choice)
