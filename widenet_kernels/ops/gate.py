"""topk_gate: softmax over the experts and the k largest of them, for each token."""

from typing import Any

import torch
from torch import Tensor

from widenet_kernels.ops.checks import (
    MOST_ROWS,
    check_device,
    check_flag,
    check_float,
    check_k,
    check_tensor,
    invalid,
    wants_grad,
)
from widenet_kernels.ops.registry import call, define_op, ops_for, run
from widenet_kernels.reference import gate as reference
from widenet_kernels.routing import Gate


def _fake(logits: Tensor, k: int, noise: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    dtype = reference.math_dtype(logits)
    return (
        logits.new_empty(num_tokens, k, dtype=dtype),
        logits.new_empty(num_tokens, k, dtype=torch.int32),
        logits.new_empty(num_tokens, num_experts, dtype=dtype),
    )


def _fake_backward(
    grad_weight: Tensor | None,
    grad_probs: Tensor | None,
    weight: Tensor,
    expert_index: Tensor,
    probs: Tensor,
    normalize: bool,
) -> Tensor:
    return torch.empty_like(probs)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, _, ctx.normalize = inputs
    ctx.dtype = logits.dtype
    ctx.save_for_backward(*output)
    ctx.set_materialize_grads(False)


def _backward(ops: Any, ctx: Any, grad_weight: Tensor | None, _: None, grad_probs: Tensor | None) -> tuple:
    if grad_weight is None and grad_probs is None:
        return None, None, None, None
    grad = run(ops.topk_gate_backward, grad_weight, grad_probs, *ctx.saved_tensors, ctx.normalize)
    return grad.to(ctx.dtype), None, None, None


define_op(
    "topk_gate_backward(Tensor? grad_weight, Tensor? grad_probs, Tensor weight, Tensor expert_index, Tensor probs, "
    "bool normalize) -> Tensor",
    reference.topk_gate_backward,
    _fake_backward,
)
define_op(
    "topk_gate(Tensor logits, int k, Tensor? noise, bool normalize) -> (Tensor, Tensor, Tensor)",
    reference.topk_gate,
    _fake,
    _setup_context,
    _backward,
)


def topk_gate(
    logits: Tensor, k: int = 2, *, noise: Tensor | None = None, normalize: bool = False, backend: str | None = None
) -> Gate:
    """The k experts of the largest z = logits + noise, best first, and their share of softmax(z).

    (Xue et al. 2021, arXiv 2107.11817, eq. 2 and 5: softmax first, then top-k, no renormalisation.) Ties go to the
    lower expert, NaN ranks below -inf, so the indices of a token are always distinct and in range.

    Args:
        logits: [T, E] fp32, bf16, fp16 or fp64.
        k: choices per token, 1 to E.
        noise: [T, E], added to the logits; a constant for autograd.
        normalize: divide each weight by the sum over the token's k choices.
        backend: None (the best there is), "native", "triton" or "reference".

    Returns:
        Gate(weight [T, K], expert_index [T, K] int32, probs [T, E]); fp32, or fp64 for fp64 logits. Differentiable
        in logits through weight and probs.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    check_tensor("topk_gate", "logits", logits, (None, None), "[T, E]")
    check_float("topk_gate", "logits", logits)
    check_k("topk_gate", k, logits.shape[1])
    check_flag("topk_gate", "normalize", normalize)
    if logits.shape[0] * k > MOST_ROWS:
        raise invalid("topk_gate", "logits", "fewer than 2**31 choices T * K", logits.shape[0] * k)
    if noise is not None:
        check_tensor("topk_gate", "noise", noise, tuple(logits.shape), "[T, E]")
        check_float("topk_gate", "noise", noise)
        check_device("topk_gate", "noise", noise, "logits", logits)
        noise = noise.detach()
    ops = ops_for("topk_gate", backend, logits, logits.dtype, logits.shape[1])
    return Gate(*call(ops.topk_gate, wants_grad(logits), logits, k, noise, normalize))
