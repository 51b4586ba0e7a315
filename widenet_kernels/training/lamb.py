"""LAMB: Adam whose step is as long, layer by layer, as the layer's weights (You et al. 2020, arXiv 1904.00962)."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import Optimizer, ParamsT

Group = dict[str, Any]
Tensors = tuple[Tensor, ...] | list[Tensor]  # as torch._foreach_* take and give them


class Lamb(Optimizer):
    """LAMB with decoupled weight decay and clipping, as the authors of WideNet trained with it (arXiv 2107.11817).

    g is a gradient after clipping, w its parameter, t the number of its steps so far, this one among them:

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * w
        w = w - lr * (|w| / |u|) * u            # |w| / |u| is the trust ratio; 1 where one of the norms is 0

    No parameter is exempt from decay or from the trust ratio; a group of parameters may set ``lr``, ``betas``, ``eps``
    and ``weight_decay`` for itself, and ``parts``: into how many layers each of its parameters is cut along the first
    dimension, for |w| and |u| are those of one layer (by default 1: a parameter is a layer). In the authors' code every
    expert and each of the three projections of attention is one, which for a WideNet in this package means

        experts, qkv = model.encoder.ffn.experts, model.encoder.attention.qkv
        joined = {*experts.parameters(), *qkv.parameters()}
        rest = [weight for weight in model.parameters() if weight not in joined]
        groups = [
            {"params": experts.parameters(), "parts": experts.num_experts},
            {"params": qkv.parameters(), "parts": 3},
            {"params": rest},
        ]

    m and v are kept and u is made in fp32, in fp64 for fp64 parameters. A bf16 or fp16 parameter is rounded once a
    step, which loses what is below its last digit: keep fp32 parameters under autocast where that matters.

    A step reads nothing back from the device, so it can be captured in a CUDA graph once the first one has made the
    state; a schedule then needs ``lr`` as a tensor. It copies the gradients in order to clip them: ``grad`` stays as
    it is. Parameters without one are left alone. Values that are not finite are not caught: they make parameters NaN.

    Args:
        params: parameters, or groups of them.
        lr: step size, a number or a tensor of no dimensions; 0.01 in the paper, for batches of 4,096 images.
        betas: decay of the two moments, each at least 0 and below 1.
        eps: added to the root of the second moment.
        weight_decay: 0.1 in the paper.
        max_grad_norm: the gradients of all groups together are scaled down to this norm where theirs is larger; None:
            no clipping. They may lie on several devices.

    Raises:
        ValueError: for numbers out of range, and for a group with a ``max_grad_norm`` of its own or with ``parts`` that
            its parameters cannot be cut into.
        TypeError: in a step, for gradients that are sparse or complex; nothing has changed then.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.1,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
        super().__init__(params, {**defaults, "parts": 1})

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self.param_groups[0]["max_grad_norm"])
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # which has rounded the moments to the dtype of the parameters and left ``step`` on the device it was saved from
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, weight in zip(saved["params"], group["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    self.state[weight][name] = value.to(weight.device, wide_dtype(weight))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure``, if given, computes the gradients first, and what it returns is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [(group, batch) for group in self.param_groups for batch in alike(with_grad(group["params"]))]
        scale = clip_scale([weight for _, batch in batches for weight in batch], self.param_groups[0]["max_grad_norm"])
        for group, batch in batches:
            self._update(group, batch, scale)
        return loss

    def _update(self, group: Group, weights: Tensors, scale: Tensor | None) -> None:
        """The step of ``weights``, which have one device and one dtype."""
        states = [self._state_of(weight) for weight in weights]
        steps, *moments = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(steps, 1)
        count = torch.stack(steps).repeat_interleave(group["parts"])  # [layers], as are corrections, norms and ratios
        layers = (cut(tensors, group["parts"]) for tensors in (weights, wide_grads(weights), *moments))
        weights, grads, means, squares = layers
        wide_weights = [widened(weight) for weight in weights]
        if scale is not None:
            grads = torch._foreach_mul(grads, scale.to(grads[0]))
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)

        divisors = torch._foreach_div(squares, bias_correction(beta2, count).unbind())
        torch._foreach_sqrt_(divisors)
        torch._foreach_add_(divisors, group["eps"])
        torch._foreach_mul_(divisors, bias_correction(beta1, count).unbind())
        updates = torch._foreach_div(means, divisors)
        if group["weight_decay"]:
            torch._foreach_add_(updates, wide_weights, alpha=group["weight_decay"])

        length = trust_ratio(wide_weights, updates) * group["lr"]
        torch._foreach_mul_(updates, length.neg().unbind())
        torch._foreach_add_(weights, updates)

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            dtype = wide_dtype(weight)
            state["step"] = torch.zeros((), dtype=dtype, device=weight.device)  # on the device: see the class
            state["exp_avg"] = torch.zeros_like(weight, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=dtype)
        return state


def check_group(group: Group, max_grad_norm: float | None) -> None:
    def refuse(name: str, expected: str) -> None:
        raise ValueError(f"Lamb: {name}: expected {expected}, got {group[name]!r}")

    for name in ("lr", "eps", "weight_decay"):
        if name == "lr" and isinstance(group[name], Tensor):
            continue  # to look into it would be to wait for the device
        if not 0 <= group[name] < math.inf:
            refuse(name, "a finite number >= 0")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        refuse("betas", "two numbers, each at least 0 and below 1")
    if group["parts"] != 1:
        lengths = [weight.shape[0] if weight.dim() else 1 for weight in group["params"]]
        if group["parts"] < 1 or any(length % group["parts"] for length in lengths):
            refuse("parts", f"a divisor of the parameters' first dimensions {lengths}")
    if group["max_grad_norm"] != max_grad_norm:
        refuse("max_grad_norm", f"{max_grad_norm}, one for all groups")
    if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
        refuse("max_grad_norm", "a finite number above 0, or None")


def with_grad(weights: Iterable[Tensor]) -> list[Tensor]:
    """Those that have a gradient, each of which is looked at."""
    found = [weight for weight in weights if weight.grad is not None]
    for weight in found:
        grad = weight.grad
        if grad.layout != torch.strided or grad.is_complex():  # type: ignore[union-attr]
            got = f"{grad.layout}, {grad.dtype} of shape {list(grad.shape)}"  # type: ignore[union-attr]
            raise TypeError(f"Lamb: grad: expected a dense tensor of real numbers, got {got}")
    return found


def alike(weights: Iterable[Tensor]) -> list[list[Tensor]]:
    """Sorted into lists of one device and one dtype, which one call of torch._foreach_* can take."""
    batches = defaultdict(list)
    for weight in weights:
        batches[weight.device, weight.dtype].append(weight)
    return list(batches.values())


def cut(tensors: Tensors, parts: int) -> Tensors:
    return tensors if parts == 1 else [part for tensor in tensors for part in tensor.tensor_split(parts)]


def wide_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def widened(weight: Tensor) -> Tensor:
    return weight.to(wide_dtype(weight))


def wide_grads(weights: Tensors) -> Tensors:
    return [weight.grad.to(wide_dtype(weight)) for weight in weights]  # type: ignore[union-attr]


def clip_scale(weights: Tensors, max_grad_norm: float | None) -> Tensor | None:
    """What to multiply every gradient with, exactly 1 where their norm is at most ``max_grad_norm``."""
    if max_grad_norm is None or not weights:
        return None
    return max_grad_norm / get_total_norm(wide_grads(weights)).clamp(min=max_grad_norm)


def bias_correction(beta: float, count: Tensor) -> Tensor:
    """1 - beta^count, without the digits that the difference loses in fp32 where beta is close to 1."""
    return -torch.expm1(count * (math.log(beta) if beta else -math.inf))


def trust_ratio(weights: Tensors, updates: Tensors) -> Tensor:
    weight_norm = torch.stack(torch._foreach_norm(weights))
    update_norm = torch.stack(torch._foreach_norm(updates))
    return torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
