"""permute: tokens into the rows of the expert buffers."""

from typing import Any

from torch import Tensor

from widenet_kernels.ops.checks import check_float, check_plan, check_tensor, wants_grad
from widenet_kernels.ops.registry import call, define_op, ops_for, run
from widenet_kernels.reference import permute as reference
from widenet_kernels.routing import RoutingPlan


def _fake(x: Tensor, choice_row: Tensor, row_choice: Tensor) -> Tensor:
    return x.new_empty(row_choice.shape[0], x.shape[1])


def _fake_backward(grad: Tensor, choice_row: Tensor) -> Tensor:
    return grad.new_empty(choice_row.shape[0], grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, choice_row, _ = inputs
    ctx.save_for_backward(choice_row)


def _backward(ops: Any, ctx: Any, grad: Tensor) -> tuple:
    return run(ops.permute_backward, grad, *ctx.saved_tensors), None, None


define_op(
    "permute_backward(Tensor grad, Tensor choice_row) -> Tensor",
    reference.permute_backward,
    _fake_backward,
)
define_op(
    "permute(Tensor x, Tensor choice_row, Tensor row_choice) -> Tensor",
    reference.permute,
    _fake,
    _setup_context,
    _backward,
)


def permute(x: Tensor, plan: RoutingPlan, *, backend: str | None = None) -> Tensor:
    """rows [R, D]: row r is the token it serves; unused rows are zero.

    With a capacity, ``rows.view(E, C, D)`` are the expert capacity buffers.

    Args:
        x: [T, D] fp32, bf16, fp16 or fp64.
        plan: from :func:`plan_routing` or :func:`route`.
        backend: None (the best there is), "native", "triton" or "reference".

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    check_tensor("permute", "x", x, (None, None), "[T, D]")
    check_float("permute", "x", x)
    check_plan("permute", plan, x, "x")
    check_tensor("permute", "x", x, (plan.choice_row.shape[0], None), "[T, D] with the plan's T")
    ops = ops_for("permute", backend, x, x.dtype)
    return call(ops.permute, wants_grad(x), x, plan.choice_row, plan.row_choice)
