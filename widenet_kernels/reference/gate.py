"""Top-k gating in plain torch: logits [T, E] -> weight [T, K], expert_index [T, K], probs [T, E]."""

import torch
from torch import Tensor


def math_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp32, or fp64 if anything is fp64: the precision in which gate, sums and activations are computed."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def ranking_key(z: Tensor) -> Tensor:
    """Integers in the order in which z ranks: NaN below -inf, -0 equal to +0."""
    integer, shift = (torch.int64, 63) if z.dtype == torch.float64 else (torch.int32, 31)
    lowest, highest = torch.iinfo(integer).min, torch.iinfo(integer).max
    bits = (z + 0.0).view(integer)  # -0.0 + 0.0 is +0.0
    key = bits ^ ((bits >> shift) & highest)  # negative floats: larger magnitude, smaller key
    return torch.where(z.isnan(), lowest, key)


def asked(grad: Tensor) -> Tensor:
    """[T, 1]: whether a gradient [T, E] asks anything of its token; the others may be masked ones that hold NaN."""
    return (grad != 0).any(dim=-1, keepdim=True)


def topk_gate(logits: Tensor, k: int, noise: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    z = logits.to(math_dtype(logits))
    if noise is not None:
        z = z + noise.to(z.dtype)
    expert_index = ranking_key(z.detach()).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    probs = z.softmax(dim=-1)
    weight = probs.gather(1, expert_index)
    if normalize:
        weight = weight / weight.sum(dim=-1, keepdim=True)
    return weight, expert_index.to(torch.int32), probs


def topk_gate_backward(
    grad_weight: Tensor | None,
    grad_probs: Tensor | None,
    weight: Tensor,
    expert_index: Tensor,
    probs: Tensor,
    normalize: bool,
) -> Tensor:
    """d logits [T, E] in the dtype of probs; an expert_index of -1 marks a choice that was masked out."""
    total = torch.zeros_like(probs) if grad_probs is None else grad_probs
    if grad_weight is not None:
        chosen = expert_index >= 0
        index = expert_index.clamp(min=0).to(torch.int64)
        share = torch.where(chosen, grad_weight, 0)
        if normalize:  # w = p / s with s = sum of the chosen p
            kept = probs.gather(1, index).sum(dim=-1, keepdim=True)
            share = torch.where(chosen, (share - (share * weight).sum(dim=-1, keepdim=True)) / kept, 0)
        total = total.scatter_add(1, index, share)
    grad = probs * (total - (total * probs).sum(dim=-1, keepdim=True))
    return torch.where(asked(total), grad, 0)
