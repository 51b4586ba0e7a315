"""Experts: E feed-forward networks, each serving the rows that the plan gives it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from widenet_kernels.ops.combine import combine
from widenet_kernels.ops.grouped_gemm import grouped_gemm
from widenet_kernels.ops.moe import GradBuffers, moe_ffn
from widenet_kernels.ops.permute import permute
from widenet_kernels.routing import ACTIVATIONS, GATED, RoutingPlan


class Experts(nn.Module):
    """E times Linear -> activation -> Linear.

    Args:
        num_experts: E.
        dim: D.
        ffn_dim: F.
        activation: "gelu", "gelu_tanh", "relu", "silu", "swiglu" or "geglu"; the gated ones double w1's and b1's F.
        bias: whether the two layers have biases.
        dropout: dropout behind each of the two layers, inside the expert.
        output_activation: an activation behind the second layer too, as WideNet's authors have it; not a gated one.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        ffn_dim: int,
        activation: str = "gelu",
        bias: bool = True,
        *,
        dropout: float = 0.0,
        output_activation: str | None = None,
    ) -> None:
        super().__init__()
        plain = tuple(name for name in ACTIVATIONS if name not in GATED)
        if activation not in ACTIVATIONS:
            raise ValueError(f"Experts: activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if output_activation is not None and output_activation not in plain:
            raise ValueError(
                f"Experts: output_activation: expected None or one of {', '.join(plain)}, got {output_activation!r}"
            )
        self.num_experts, self.dim, self.ffn_dim = num_experts, dim, ffn_dim
        self.activation, self.output_activation = activation, output_activation
        self.dropout = nn.Dropout(dropout)
        width = 2 * ffn_dim if activation in GATED else ffn_dim
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, width))
        self.b1 = nn.Parameter(torch.empty(num_experts, width)) if bias else None
        self.w2 = nn.Parameter(torch.empty(num_experts, ffn_dim, dim))
        self.b2 = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self._grad_buffers: GradBuffers | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform weights (each expert by itself) and zero biases."""
        for weight in (self.w1, self.w2):
            for expert in weight.unbind(0):
                nn.init.xavier_uniform_(expert)
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, weight: Tensor, plan: RoutingPlan, *, backend: str | None = None) -> Tensor:
        """x [T, D], gate weights [T, K] -> y [T, D]."""
        if self._grad_buffers is not None and DistributedDataParallel._active_ddp_module is not None:
            raise RuntimeError("Experts.accumulate_grads: DDP would miss the gradients of these experts")
        if self.output_activation is None and not (self.training and self.dropout.p):
            return moe_ffn(
                x,
                weight,
                plan,
                self.w1,
                self.b1,
                self.w2,
                self.b2,
                self.activation,
                grad_buffers=self._grad_buffers,
                backend=backend,
            )
        if self._grad_buffers is not None:
            raise RuntimeError("Experts: accumulate_grads does not go with dropout or an output activation")
        rows = permute(x, plan, backend=backend)
        hidden = grouped_gemm(rows, self.w1, plan, self.b1, self.activation, backend=backend)
        out = grouped_gemm(self.dropout(hidden), self.w2, plan, self.b2, self.output_activation, backend=backend)
        return combine(self.dropout(out), weight, plan, backend=backend)

    @contextlib.contextmanager
    def accumulate_grads(self) -> Iterator[None]:
        """Within it, the backward of every use adds the experts' gradients into one set of fp32 buffers.

        Many uses of the same experts, as in a network that shares them over its depth, then hold one gradient instead
        of one per use, and fp32 products are added as they are made. On leaving, the buffers are added into ``.grad``.
        Run forward and backward inside::

            with experts.accumulate_grads():
                loss = model(x).loss
                loss.backward()
            optimizer.step()

        Raises:
            RuntimeError: when entered twice; from a backward that runs after it has been left; or if FSDP holds the
                parameters or a forward runs under DDP: such a wrapper waits for gradients that it would never see.
        """
        parameters = (self.w1, self.b1, self.w2, self.b2)
        if self._grad_buffers is not None:
            raise RuntimeError("Experts.accumulate_grads: already active for these experts")
        if any(p is not None and _is_sharded(p) for p in parameters):
            raise RuntimeError("Experts.accumulate_grads: FSDP holds the parameters and would miss their gradients")
        self._grad_buffers = GradBuffers(
            *(
                torch.zeros(p.shape, dtype=torch.float32, device=p.device)
                if p is not None and p.requires_grad
                else None
                for p in parameters
            )
        )
        try:
            yield
            for parameter, buffer in zip(parameters, self._grad_buffers, strict=True):
                if parameter is not None and buffer is not None:
                    grad = buffer.to(parameter.dtype, copy=True)
                    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        finally:
            for buffer in self._grad_buffers:
                if buffer is not None:
                    buffer.collected = True  # type: ignore[attr-defined]  # a later backward would add in vain
            self._grad_buffers = None

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, ffn_dim={self.ffn_dim}, activation={self.activation!r}, "
            f"bias={self.b1 is not None}"
        )


def _is_sharded(parameter: nn.Parameter) -> bool:
    """Whether FSDP holds this parameter: flattened into another one, or as a DTensor."""
    return getattr(parameter, "_fsdp_flattened", False) or hasattr(parameter, "device_mesh")
