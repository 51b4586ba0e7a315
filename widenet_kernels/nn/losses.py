"""The routing losses, in plain torch: small sums over [T, E] that autograd differentiates by itself."""

import torch
from torch import Tensor

from widenet_kernels.ops.checks import check_device, check_float, check_plan, check_tensor, wrong_type
from widenet_kernels.routing import RoutingPlan


def _check_mask(op: str, mask: Tensor | None, like: Tensor, first: str) -> None:
    if mask is None:
        return
    check_tensor(op, "mask", mask, (like.shape[0],), "[T]")
    check_device(op, "mask", mask, first, like)
    if mask.dtype != torch.bool:
        raise wrong_type(op, "mask", "torch.bool", mask.dtype)


def _mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the first dimension, over the tokens where mask is True; 0 without any."""
    if mask is None:
        return values.sum(dim=0) / max(values.shape[0], 1)
    valid = mask.view(-1, *(1,) * (values.dim() - 1))
    return torch.where(valid, values, 0).sum(dim=0) / mask.sum().clamp(min=1)


def load_balance_loss(probs: Tensor, plan: RoutingPlan, mask: Tensor | None = None) -> Tensor:
    """E * sum over e of m_e * P_e (Xue et al. 2021, arXiv 2107.11817, eq. 3 to 5): 1 when balanced.

    m_e is the share of the valid choices that asked for expert e, before dropping; P_e the mean of probs over the
    valid tokens, the only way of the gradient. 0 without valid tokens.

    Args:
        probs: [T, E] from the gate.
        plan: the plan of the same tokens.
        mask: [T] bool, False for tokens that do not count: the mask with which the plan was made.
    """
    check_tensor("load_balance_loss", "probs", probs, (None, None), "[T, E]")
    check_float("load_balance_loss", "probs", probs)
    check_plan("load_balance_loss", plan, probs, "probs")
    shape = (plan.choice_row.shape[0], plan.num_experts)
    check_tensor("load_balance_loss", "probs", probs, shape, "[T, E] with the plan's T and E")
    _check_mask("load_balance_loss", mask, probs, "probs")
    wide = probs if probs.dtype == torch.float64 else probs.float()
    demand = plan.expert_demand.to(wide.dtype)
    share = demand / demand.sum().clamp(min=1)
    return plan.num_experts * (share * _mean_over_tokens(wide, mask)).sum()


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the valid tokens of logsumexp(logits)^2 (Zoph et al. 2022, arXiv 2202.08906, eq. 5).

    Args:
        logits: [T, E] from the router.
        mask: [T] bool, False for tokens that do not count.
    """
    check_tensor("router_z_loss", "logits", logits, (None, None), "[T, E]")
    check_float("router_z_loss", "logits", logits)
    _check_mask("router_z_loss", mask, logits, "logits")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if mask is not None:  # before the logsumexp, so that NaN of a masked token does not reach the gradient
        wide = torch.where(mask[:, None], wide, 0)
    return _mean_over_tokens(wide.logsumexp(dim=-1).square(), mask)
