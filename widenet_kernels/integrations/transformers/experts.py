"""The experts of transformers' mixture-of-experts models, by our kernels: one function that serves every family.

transformers keeps the experts of a layer in one module: ``gate_up_proj`` (``up_proj`` without a gate) and
``down_proj``, each [E, out, in] or, if ``is_transposed``, [E, in, out], with biases [E, out] where it ``has_bias``.
They are taken as they lie: a transposed view costs nothing, in forward and backward. The layer's own router has chosen;
its indices and weights come with the call.
"""

import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.activations import GELUActivation, SiLUActivation
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

from widenet_kernels.ops.combine import combine
from widenet_kernels.ops.grouped_gemm import grouped_gemm
from widenet_kernels.ops.moe import moe_ffn
from widenet_kernels.ops.permute import permute
from widenet_kernels.ops.plan import plan_routing
from widenet_kernels.ops.registry import FLOATS

NAME = "widenet"

_warned: set[str] = set()


def register_experts() -> None:
    """Makes ``experts_implementation="widenet"`` known; to do it again changes nothing."""
    ExpertsInterface.register(NAME, experts_forward)
    FP8ExpertsInterface.register(NAME, experts_forward)  # which asks for nothing but not to fail: see why_not


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[T, D], in the dtype of ``hidden_states``: what transformers' own forward of these experts gives.

    Args:
        self: the module of the experts, whose class ``use_experts_implementation`` has decorated.
        hidden_states: [T, D] of any float dtype; it is cast to that of the weights.
        top_k_index: [T, K] of any integer dtype; an index outside [0, E), as expert parallelism gives to what another
            rank serves, gets no row, and its weight, whatever it holds, reaches nothing.
        top_k_weights: [T, K] of any float dtype.

    Experts that our kernels cannot serve run the model's own code; a RuntimeWarning names their class and the reason,
    once.
    """
    parameters: dict[str, Any] = {name: getattr(self, name, None) for name in parameter_names(self)}
    reason = why_not(parameters)
    if reason is not None:
        warn_once(f"{type(self).__name__} runs transformers' own code instead of {NAME!r}: {reason}")
        return type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
    w1, w2, *biases = parameters.values()
    b1, b2 = biases or (None, None)
    if not self.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    x = hidden_states.to(w1.dtype)
    plan = plan_routing(top_k_index, w1.shape[0])
    activation = fused_activation(self)
    if activation is not None and not self.has_post_expert_norm:
        return moe_ffn(x, top_k_weights, plan, w1, b1, w2, b2, activation).to(hidden_states.dtype)
    rows = grouped_gemm(permute(x, plan), w1, plan, b1, activation)
    if activation is None:
        rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    rows = grouped_gemm(rows, w2, plan, b2)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    return combine(rows, top_k_weights, plan).to(hidden_states.dtype)


def parameter_names(experts: Any) -> tuple[str, ...]:
    """Of both layers' weights, then of their biases, if there are any."""
    layers = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    return (*layers, *(f"{layer}_bias" for layer in layers)) if experts.has_bias else layers


def why_not(parameters: dict[str, Any]) -> str | None:
    """The reason why our kernels cannot serve experts with these parameters, or None if they can."""
    for name, tensor in parameters.items():
        if not isinstance(tensor, Tensor) or is_traceable_wrapper_subclass(tensor):
            return f"{name}: expected a plain tensor, got {type(tensor).__name__}"
        if tensor.dtype not in FLOATS:
            return f"{name}: expected fp32, bf16, fp16 or fp64, got {tensor.dtype}"
    dtypes = {name: tensor.dtype for name, tensor in parameters.items()}
    if len(set(dtypes.values())) > 1:
        return f"expected parameters of one dtype, got {', '.join(f'{dtype} {name}' for name, dtype in dtypes.items())}"
    return None


def fused_activation(experts: Any) -> str | None:
    """The name of the gate and its activation where our kernels have them: gate half first, then value half."""
    if not experts.has_gate or type(experts)._apply_gate is not _default_apply_gate:
        return None
    act = experts.act_fn
    if isinstance(act, SiLUActivation | nn.SiLU):
        return "swiglu"
    exact = act.act is F.gelu if isinstance(act, GELUActivation) else getattr(act, "approximate", None) == "none"
    return "geglu" if exact else None


def warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
