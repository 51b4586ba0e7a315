"""moe_ffn: permute, two grouped GEMMs with the activation between, and combine, as one differentiable op."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from widenet_kernels.ops.checks import (
    autocast,
    check_device,
    check_float,
    check_like,
    check_plan,
    check_tensor,
    describe,
    invalid,
    wants_grad,
    wrong_type,
)
from widenet_kernels.ops.grouped_gemm import check_activation
from widenet_kernels.ops.registry import call, define_op, ops_for, run
from widenet_kernels.reference import moe as reference
from widenet_kernels.routing import GATED, RoutingPlan


class GradBuffers(NamedTuple):
    """Contiguous fp32 tensors of the experts' shapes that :func:`moe_ffn`'s backward adds into; None: none wanted."""

    w1: Tensor | None  # [E, D, F] (2F when gated)
    b1: Tensor | None  # [E, F] (2F when gated)
    w2: Tensor | None  # [E, F, D]
    b2: Tensor | None  # [E, D]


def _fake(
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
    return x.new_empty(x.shape), x.new_empty(row_choice.shape[0] if save else 0, w1.shape[2])


def _fake_backward(
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
) -> tuple[Tensor, ...]:
    num_experts, dim, width = w1.shape
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        torch.empty_like(w1) if need_w1 else w1.new_empty(0),
        w1.new_empty((num_experts, width) if need_b1 else 0),
        torch.empty_like(w2) if need_w2 else w2.new_empty(0),
        w2.new_empty((num_experts, dim) if need_b2 else 0),
    )


def _fake_backward_accumulate(
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
    *grad_buffers: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, choice_row, row_choice, begin, count, w1, _, w2, b2, ctx.activation, _, *buffers = inputs
    _, z = output
    ctx.save_for_backward(x, weight, choice_row, row_choice, begin, count, z, w1, w2, b2)
    ctx.grad_buffers = buffers  # not saved: the backward of each use modifies them in place
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)


def _backward(ops: Any, ctx: Any, grad: Tensor | None, _: None) -> tuple:
    if grad is None:
        return (None,) * 16
    need_x, need_weight, _, _, _, _, *need_experts = ctx.needs_input_grad[:10]
    if any(buffer is not None for buffer in ctx.grad_buffers):
        if torch.is_grad_enabled():
            raise RuntimeError("widenet_kernels: moe_ffn with grad_buffers is differentiable once")
        if any(getattr(buffer, "collected", False) for buffer in ctx.grad_buffers):
            raise RuntimeError("moe_ffn: the backward ran after accumulate_grads had ended; run it inside")
        grads = ops.moe_ffn_backward_accumulate(
            grad, *ctx.saved_tensors, ctx.activation, need_x, need_weight, *ctx.grad_buffers
        )
        need = [need_x, need_weight]
    else:
        need = [need_x, need_weight, *need_experts]
        grads = run(ops.moe_ffn_backward, grad, *ctx.saved_tensors, ctx.activation, *need)
    grad_x, grad_weight, *grad_experts = [g if needed else None for g, needed in zip(grads, need, strict=True)]
    return grad_x, grad_weight, None, None, None, None, *(grad_experts or (None,) * 4), *(None,) * 6


_SAVED = (
    "Tensor grad, Tensor x, Tensor weight, Tensor choice_row, Tensor row_choice, Tensor expert_begin, "
    "Tensor expert_count, Tensor z, Tensor w1, Tensor w2, Tensor? b2, str activation, bool need_x, bool need_weight"
)

define_op(
    f"moe_ffn_backward({_SAVED}, bool need_w1, bool need_b1, bool need_w2, bool need_b2) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.moe_ffn_backward,
    _fake_backward,
)
define_op(
    f"moe_ffn_backward_accumulate({_SAVED}, Tensor(a!)? grad_w1, Tensor(b!)? grad_b1, Tensor(c!)? grad_w2, "
    "Tensor(d!)? grad_b2) -> (Tensor, Tensor)",
    reference.moe_ffn_backward_accumulate,
    _fake_backward_accumulate,
    differentiable=False,
)
define_op(
    "moe_ffn(Tensor x, Tensor weight, Tensor choice_row, Tensor row_choice, Tensor expert_begin, Tensor expert_count, "
    "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, bool save, Tensor? grad_w1=None, "
    "Tensor? grad_b1=None, Tensor? grad_w2=None, Tensor? grad_b2=None) -> (Tensor, Tensor)",
    reference.moe_ffn,
    _fake,
    _setup_context,
    _backward,
)


def _check_experts(
    x: Tensor, plan: RoutingPlan, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> None:
    num_experts, dim = plan.num_experts, x.shape[1]
    check_tensor("moe_ffn", "w1", w1, (num_experts, dim, None), "[E, D, F], F doubled when gated,")
    width = w1.shape[2]
    if activation is None:
        raise invalid("moe_ffn", "activation", "an activation between the two layers", None)
    check_activation("moe_ffn", activation, width, "w1")
    hidden = width // 2 if activation in GATED else width
    check_tensor("moe_ffn", "w2", w2, (num_experts, hidden, dim), "[E, F, D]")
    if b1 is not None:
        check_tensor("moe_ffn", "b1", b1, (num_experts, width), "[E, F], F doubled when gated,")
    if b2 is not None:
        check_tensor("moe_ffn", "b2", b2, (num_experts, dim), "[E, D]")


def _check_grad_buffers(buffers: Any, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
    if not isinstance(buffers, tuple) or len(buffers) != len(GradBuffers._fields):
        raise wrong_type("moe_ffn", "grad_buffers", "a GradBuffers(w1, b1, w2, b2)", type(buffers).__name__)
    for name, buffer, parameter in zip(GradBuffers._fields, buffers, (w1, b1, w2, b2), strict=True):
        argument = f"grad_buffers.{name}"
        if buffer is None:
            continue
        if parameter is None:
            raise invalid("moe_ffn", argument, f"None, as {name} is None", describe(buffer))
        check_tensor("moe_ffn", argument, buffer, tuple(parameter.shape), f"the shape of {name}")
        check_device("moe_ffn", argument, buffer, name, parameter)
        if buffer.dtype != torch.float32:
            raise wrong_type("moe_ffn", argument, "torch.float32", buffer.dtype)
        if not buffer.is_contiguous():
            raise invalid("moe_ffn", argument, "a contiguous tensor", f"strides {buffer.stride()}")


def moe_ffn(
    x: Tensor,
    weight: Tensor,
    plan: RoutingPlan,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
    *,
    grad_buffers: GradBuffers | None = None,
    backend: str | None = None,
) -> Tensor:
    """y [T, D] = sum over k of weight[t, k] * (act(x[t] @ w1[e] + b1[e]) @ w2[e] + b2[e]) over the served choices.

    What permute, two grouped_gemm and combine compute, fused as far as the backend can. Saved for the backward are x,
    the pre-activation, the plan and the weights, nothing else. Under autocast x, weights and biases are cast to the
    autocast dtype.

    Args:
        x: [T, D] fp32, bf16, fp16 or fp64; y has its dtype.
        weight: [T, K], the gate weights, any of these dtypes.
        plan: from :func:`plan_routing` or :func:`route`.
        w1, b1: [E, D, F] and [E, F] or None, in the dtype of x; 2F in place of F for a gated activation.
        w2, b2: [E, F, D] and [E, D] or None, in the dtype of x.
        activation: "gelu", "gelu_tanh", "relu", "silu", "swiglu" or "geglu".
        grad_buffers: (w1, b1, w2, b2), contiguous fp32: the backward adds the experts' gradients here instead of
            returning them, so that many uses of the same experts cost no extra passes.
        backend: None (the best there is), "native", "triton" or "reference".

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    check_tensor("moe_ffn", "x", x, (None, None), "[T, D]")
    check_float("moe_ffn", "x", x)
    check_plan("moe_ffn", plan, x, "x")
    check_tensor("moe_ffn", "x", x, (plan.choice_row.shape[0], None), "[T, D] with the plan's T")
    check_tensor("moe_ffn", "weight", weight, tuple(plan.choice_row.shape), "[T, K] with the plan's T and K")
    check_float("moe_ffn", "weight", weight)
    check_device("moe_ffn", "weight", weight, "x", x)
    _check_experts(x, plan, w1, b1, w2, b2, activation)
    for name, parameter in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if parameter is not None:
            check_float("moe_ffn", name, parameter)
    x, w1, b1, w2, b2 = autocast(x.device.type, x, w1, b1, w2, b2)  # type: ignore[assignment]
    for name, parameter in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if parameter is not None:
            check_like("moe_ffn", name, parameter, "x", x)
    if grad_buffers is not None:
        _check_grad_buffers(grad_buffers, w1, b1, w2, b2)
    dtype = torch.float64 if weight.dtype == torch.float64 else x.dtype
    ops = ops_for("moe_ffn", backend, x, dtype)
    save = wants_grad(x, weight, w1, b1, w2, b2)
    places = (plan.choice_row, plan.row_choice, plan.expert_begin, plan.expert_count)
    experts = (w1, b1, w2, b2)
    return call(ops.moe_ffn, save, x, weight, *places, *experts, activation, save, *(grad_buffers or ()))[0]
