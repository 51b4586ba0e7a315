"""route: the router's logits, the gate and the plan in one trip."""

from typing import Any

import torch
from torch import Tensor

from widenet_kernels.ops.checks import (
    check_device,
    check_flag,
    check_float,
    check_k,
    check_layout,
    check_tensor,
    wants_grad,
    wrong_type,
)
from widenet_kernels.ops.plan import as_plan, fake_plan
from widenet_kernels.ops.registry import call, define_op, ops_for, run
from widenet_kernels.reference import route as reference
from widenet_kernels.reference.gate import math_dtype
from widenet_kernels.routing import Gate, RoutingPlan


def _fake(
    x: Tensor,
    router_weight: Tensor,
    k: int,
    capacity: int | None,
    noise: Tensor | None,
    normalize: bool,
    priority: str,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    num_tokens, num_experts = x.shape[0], router_weight.shape[0]
    dtype = math_dtype(x, router_weight)
    return (
        x.new_empty(num_tokens, k, dtype=dtype),
        x.new_empty(num_tokens, k, dtype=torch.int32),
        x.new_empty(num_tokens, num_experts, dtype=dtype),
        x.new_empty(num_tokens, num_experts, dtype=dtype),
        *fake_plan(x, num_tokens, k, num_experts, capacity),
    )


def _fake_backward(
    grad_weight: Tensor | None,
    grad_probs: Tensor | None,
    grad_logits: Tensor | None,
    x: Tensor,
    router_weight: Tensor,
    weight: Tensor,
    expert_index: Tensor,
    probs: Tensor,
    normalize: bool,
    need_x: bool,
    need_router_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        router_weight.new_empty(router_weight.shape if need_router_weight else 0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, router_weight, _, _, _, ctx.normalize, _, _ = inputs
    weight, expert_index, probs, *_ = output
    ctx.save_for_backward(x, router_weight, weight, expert_index, probs)
    ctx.set_materialize_grads(False)


def _backward(
    ops: Any,
    ctx: Any,
    grad_weight: Tensor | None,
    grad_index: None,
    grad_probs: Tensor | None,
    grad_logits: Tensor | None,
    *grad_plan: None,
) -> tuple:
    rest = (None,) * 6
    if grad_weight is None and grad_probs is None and grad_logits is None:
        return None, None, *rest
    need_x, need_router_weight = ctx.needs_input_grad[:2]
    grad_x, grad_router_weight = run(
        ops.route_backward,
        grad_weight,
        grad_probs,
        grad_logits,
        *ctx.saved_tensors,
        ctx.normalize,
        need_x,
        need_router_weight,
    )
    return grad_x if need_x else None, grad_router_weight if need_router_weight else None, *rest


define_op(
    "route_backward(Tensor? grad_weight, Tensor? grad_probs, Tensor? grad_logits, Tensor x, Tensor router_weight, "
    "Tensor weight, Tensor expert_index, Tensor probs, bool normalize, bool need_x, bool need_router_weight) "
    "-> (Tensor, Tensor)",
    reference.route_backward,
    _fake_backward,
)
define_op(
    "route(Tensor x, Tensor router_weight, int k, SymInt? capacity, Tensor? noise, bool normalize, str priority, "
    "Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.route,
    _fake,
    _setup_context,
    _backward,
)


def route(
    x: Tensor,
    router_weight: Tensor,
    k: int = 2,
    capacity: int | None = None,
    *,
    noise: Tensor | None = None,
    normalize: bool = False,
    priority: str = "choice",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Gate, RoutingPlan, Tensor]:
    """From tokens to their places: logits = x router_weight^T in fp32 products, then gate and plan.

    Args:
        x: [T, D] fp32, bf16, fp16 or fp64.
        router_weight: [E, D], any of these dtypes.
        k, noise, normalize: as in :func:`topk_gate`.
        capacity, priority: as in :func:`plan_routing`; "score" ranks by the weights found here.
        mask: [T] bool; tokens where it is False ask for nothing: expert_index -1, weight 0, no row.
        backend: None (the best there is), "native", "triton" or "reference".

    Returns:
        Gate, RoutingPlan and logits [T, E] (fp32, or fp64 if x or router_weight is); differentiable in x and
        router_weight through weight, probs and logits.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    check_tensor("route", "x", x, (None, None), "[T, D]")
    check_float("route", "x", x)
    check_tensor("route", "router_weight", router_weight, (None, x.shape[1]), "[E, D]")
    check_float("route", "router_weight", router_weight)
    check_device("route", "router_weight", router_weight, "x", x)
    num_tokens, num_experts = x.shape[0], router_weight.shape[0]
    check_k("route", k, num_experts)
    check_flag("route", "normalize", normalize)
    check_layout("route", capacity, "x", num_tokens * k, num_experts, priority)
    if noise is not None:
        check_tensor("route", "noise", noise, (num_tokens, num_experts), "[T, E]")
        check_float("route", "noise", noise)
        check_device("route", "noise", noise, "x", x)
        noise = noise.detach()
    if mask is not None:
        check_tensor("route", "mask", mask, (num_tokens,), "[T]")
        check_device("route", "mask", mask, "x", x)
        if mask.dtype != torch.bool:
            raise wrong_type("route", "mask", "torch.bool", mask.dtype)
    ops = ops_for("route", backend, x, x.dtype, num_experts)
    options = (k, capacity, noise, normalize, priority, mask)
    weight, expert_index, probs, logits, *plan = call(
        ops.route, wants_grad(x, router_weight), x, router_weight, *options
    )
    return Gate(weight, expert_index, probs), as_plan(plan, num_experts, capacity), logits
