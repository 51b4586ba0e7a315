"""grouped_gemm: every expert's rows through that expert's linear layer and activation."""

from typing import Any

import torch
from torch import Tensor

from widenet_kernels.ops.checks import (
    autocast,
    check_float,
    check_like,
    check_plan,
    check_tensor,
    invalid,
    wants_grad,
)
from widenet_kernels.ops.registry import call, define_op, ops_for, run
from widenet_kernels.reference import grouped_gemm as reference
from widenet_kernels.routing import ACTIVATIONS, GATED, RoutingPlan


def check_activation(op: str, activation: str | None, width: int, argument: str) -> None:
    """``width`` is the last size of ``argument``, the weight in front of the activation."""
    if activation is None:
        return
    if activation not in ACTIVATIONS:
        raise invalid(op, "activation", f"None or one of {', '.join(ACTIVATIONS)}", repr(activation))
    if activation in GATED and width % 2:
        raise invalid(op, argument, f"an even last size for {activation}: gate half, then value half", width)


def _fake(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_begin: Tensor,
    expert_count: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    num_rows, width = rows.shape[0], weight.shape[2]
    out = width // 2 if activation in GATED else width
    return rows.new_empty(num_rows, out), rows.new_empty(num_rows if save and activation else 0, width)


def _fake_backward(
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
    return (
        rows.new_empty(rows.shape if need_rows else 0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        weight.new_empty((weight.shape[0], weight.shape[2]) if need_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    rows, weight, _, expert_begin, expert_count, ctx.activation, _ = inputs
    _, z = output
    ctx.save_for_backward(rows, weight, z, expert_begin, expert_count)
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)


def _backward(ops: Any, ctx: Any, grad: Tensor | None, _: None) -> tuple:
    rest = (None,) * 4
    if grad is None:
        return None, None, None, *rest
    need = ctx.needs_input_grad[:3]
    grads = run(ops.grouped_gemm_backward, grad, *ctx.saved_tensors, ctx.activation, *need)
    return *(g if needed else None for g, needed in zip(grads, need, strict=True)), *rest


define_op(
    "grouped_gemm_backward(Tensor grad, Tensor rows, Tensor weight, Tensor z, Tensor expert_begin, "
    "Tensor expert_count, str activation, bool need_rows, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    reference.grouped_gemm_backward,
    _fake_backward,
)
define_op(
    "grouped_gemm(Tensor rows, Tensor weight, Tensor? bias, Tensor expert_begin, Tensor expert_count, "
    "str activation, bool save) -> (Tensor, Tensor)",
    reference.grouped_gemm,
    _fake,
    _setup_context,
    _backward,
)


def grouped_gemm(
    rows: Tensor,
    weight: Tensor,
    plan: RoutingPlan,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """[R, N]: act(rows[r] @ weight[e] + bias[e]) for the expert e of row r; unused rows are zero and not computed.

    Under autocast rows, weight and bias are cast to the autocast dtype.

    Args:
        rows: [R, M] fp32, bf16, fp16 or fp64.
        weight: [E, M, N] in the dtype of rows, in any layout; one with unit stride in one of the last two
            dimensions is used without a copy.
        plan: from :func:`plan_routing` or :func:`route`.
        bias: [E, N] in the dtype of rows.
        activation: None, "gelu", "gelu_tanh", "relu", "silu", or gated: "swiglu", "geglu" (Shazeer 2020, arXiv
            2002.05202); then weight's N is 2F, gate half first, and the result is [R, F].
        backend: None (the best there is), "native", "triton" or "reference".

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    check_tensor("grouped_gemm", "rows", rows, (None, None), "[R, M]")
    check_plan("grouped_gemm", plan, rows, "rows")
    check_tensor("grouped_gemm", "rows", rows, (plan.num_rows, None), "[R, M] with the plan's R")
    check_tensor("grouped_gemm", "weight", weight, (plan.num_experts, rows.shape[1], None), "[E, M, N]")
    if bias is not None:
        check_tensor("grouped_gemm", "bias", bias, (plan.num_experts, weight.shape[2]), "[E, N]")
    check_activation("grouped_gemm", activation, weight.shape[2], "weight")
    check_float("grouped_gemm", "rows", rows)
    check_float("grouped_gemm", "weight", weight)
    rows, weight, bias = autocast(rows.device.type, rows, weight, bias)  # type: ignore[assignment]
    check_like("grouped_gemm", "weight", weight, "rows", rows)
    if bias is not None:
        check_like("grouped_gemm", "bias", bias, "rows", rows)
    ops = ops_for("grouped_gemm", backend, rows, rows.dtype)
    save = wants_grad(rows, weight, bias)
    places = (plan.expert_begin, plan.expert_count)
    return call(ops.grouped_gemm, save, rows, weight, bias, *places, activation or "", save)[0]
