"""Router in plain torch: logits = x router_weight^T, then gate and plan; masked tokens ask for nothing."""

import torch
from torch import Tensor

from widenet_kernels.reference.gate import asked, math_dtype, topk_gate, topk_gate_backward
from widenet_kernels.reference.plan import plan_routing


def route(
    x: Tensor,
    router_weight: Tensor,
    k: int,
    capacity: int | None,
    noise: Tensor | None,
    normalize: bool,
    priority: str,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    """weight, expert_index, probs, logits, and the five tensors of the plan."""
    dtype = math_dtype(x, router_weight)
    logits = x.to(dtype) @ router_weight.to(dtype).t()
    weight, expert_index, probs = topk_gate(logits, k, noise, normalize)
    if mask is not None:
        weight = torch.where(mask[:, None], weight, 0)
        expert_index = torch.where(mask[:, None], expert_index, -1)
    plan = plan_routing(expert_index, router_weight.shape[0], capacity, priority, weight.detach()[:, 0])
    return weight, expert_index, probs, logits, *plan


def route_backward(
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
    """d x [T, D] and d router_weight [E, D]; of no elements where not needed."""
    grad = topk_gate_backward(grad_weight, grad_probs, weight, expert_index, probs, normalize)
    if grad_logits is not None:
        grad = grad + grad_logits
    grad_x, grad_router_weight = x.new_empty(0), router_weight.new_empty(0)
    if need_x:
        grad_x = (grad @ router_weight.to(grad.dtype)).to(x.dtype)
    if need_router_weight:
        grad_router_weight = (grad.t() @ torch.where(asked(grad), x, 0).to(grad.dtype)).to(router_weight.dtype)
    return grad_x, grad_router_weight
