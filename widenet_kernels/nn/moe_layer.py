"""MoELayer: router and experts joined, in the place of a transformer block's feed-forward network."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from widenet_kernels.nn.experts import Experts
from widenet_kernels.nn.losses import load_balance_loss, router_z_loss
from widenet_kernels.nn.router import TopKRouter
from widenet_kernels.routing import GATED, RoutingPlan, expert_capacity


class MoEAux(NamedTuple):
    """What a layer says about one routing; nothing of it is kept in the layer."""

    balance_loss: Tensor  # scalar, differentiable
    z_loss: Tensor  # scalar, differentiable
    dropped_share: Tensor  # scalar: the share of the choices that found their expert full
    expert_demand: Tensor  # [E] int32: choices that asked
    expert_count: Tensor  # [E] int32: choices served


class MoERouting(NamedTuple):
    """One routing of T tokens, from :meth:`MoELayer.route`; the layer may serve it more than once."""

    weight: Tensor  # [T, K]: how much each choice counts, differentiable
    plan: RoutingPlan
    aux: MoEAux


class MoELayer(nn.Module):
    """Mixture of experts: y = sum over the k best experts of gate weight * expert(x).

    The layer keeps nothing between calls, so one layer may serve every depth of a network; layers may also share a
    router or experts.

    Args:
        dim: D.
        ffn_dim: F.
        num_experts: E.
        k: choices per token.
        capacity_factor: rows an expert may serve, as a multiple of an even share; None: dropless.
        eval_capacity_factor: the same in evaluation; None: as in training.
        priority: who is served first, "choice", "token" or "score"; see :func:`widenet_kernels.plan_routing`.
        activation, bias: of the experts; see :class:`Experts`.
        noise_std, normalize: of the router; see :class:`TopKRouter`.
        router, experts: modules to use in place of new ones; they then decide what their options decide.
        backend: None (the best there is), "native", "triton" or "reference", for every op of the layer.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        num_experts: int,
        k: int = 2,
        capacity_factor: float | None = 1.2,
        *,
        eval_capacity_factor: float | None = None,
        priority: str = "choice",
        activation: str = "gelu",
        bias: bool = True,
        noise_std: float | None = None,
        normalize: bool = False,
        router: TopKRouter | None = None,
        experts: Experts | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.router = TopKRouter(dim, num_experts, k, noise_std, normalize) if router is None else router
        self.experts = Experts(num_experts, dim, ffn_dim, activation, bias) if experts is None else experts
        for name, module in (("router", self.router), ("experts", self.experts)):
            if (module.dim, module.num_experts) != (dim, num_experts):
                raise ValueError(
                    f"MoELayer: {name}: expected dim {dim} and {num_experts} experts, "
                    f"got dim {module.dim} and {module.num_experts} experts"
                )
        if priority not in ("choice", "token", "score"):
            raise ValueError(f"MoELayer: priority: expected 'choice', 'token' or 'score', got {priority!r}")
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = capacity_factor if eval_capacity_factor is None else eval_capacity_factor
        self.priority = priority
        self.backend = backend

    def capacity(self, num_tokens: int) -> int | None:
        """Rows an expert may serve of ``num_tokens`` tokens; None when dropless."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return None
        return expert_capacity(num_tokens, self.router.num_experts, self.router.k, factor)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, routing: MoERouting | None = None
    ) -> tuple[Tensor, MoEAux]:
        """x [..., D], mask [...] bool (False: takes no part, its y is 0) -> y [..., D] and the routing's aux.

        With a ``routing`` of as many tokens, from :meth:`route`, the tokens go the ways they went there, with the gate
        weights they had there; the mask is then the one it was made with.
        """
        if routing is None:
            routing = self.route(x, mask)
        elif mask is not None:
            raise ValueError("MoELayer: mask: expected None with a routing, which was made with a mask or without")
        y = self.experts(self._tokens(x), routing.weight, routing.plan, backend=self.backend)
        return y.view(x.shape), routing.aux

    def route(self, x: Tensor, mask: Tensor | None = None) -> MoERouting:
        """Where the tokens x [..., D] go, without going there; mask as in :meth:`forward`."""
        tokens = self._tokens(x)
        if mask is not None:
            if mask.shape != x.shape[:-1]:
                raise ValueError(f"MoELayer: mask: expected {list(x.shape[:-1])}, got {list(mask.shape)}")
            mask = mask.reshape(-1)
        gate, plan, logits = self.router(
            tokens, self.capacity(tokens.shape[0]), priority=self.priority, mask=mask, backend=self.backend
        )
        served = plan.expert_count.sum() / plan.expert_demand.sum().clamp(min=1)
        aux = MoEAux(
            load_balance_loss(gate.probs, plan, mask),
            router_z_loss(logits, mask),
            torch.where(plan.expert_demand.sum() > 0, 1 - served, 0.0),
            plan.expert_demand,
            plan.expert_count,
        )
        return MoERouting(gate.weight, plan, aux)

    def _tokens(self, x: Tensor) -> Tensor:
        """x [..., D] -> [T, D]."""
        if x.dim() == 0 or x.shape[-1] != self.router.dim:
            raise ValueError(f"MoELayer: x: expected [..., {self.router.dim}], got {list(x.shape)}")
        return x.reshape(-1, x.shape[-1])

    def extra_repr(self) -> str:
        return (
            f"capacity_factor={self.capacity_factor}, eval_capacity_factor={self.eval_capacity_factor}, "
            f"priority={self.priority!r}, backend={self.backend!r}"
        )

    @classmethod
    def from_dense(
        cls,
        linear1: nn.Linear,
        linear2: nn.Linear,
        num_experts: int,
        activation: str = "gelu",
        *,
        capacity_factor: float | None = None,
        normalize: bool = True,
        **options: Any,
    ) -> "MoELayer":
        """A layer for the place of ``linear2(activation(linear1(x)))``, with that network copied into every expert.

        For a gated activation, "swiglu" or "geglu", ``linear1`` is Linear(D, 2F): the gate's outputs, then the values'.
        With the defaults (normalized weights, dropless) the new layer computes what the old one did, until training
        tells the experts apart. With ``k=1`` every normalized weight is 1 and the router learns from the balance loss
        alone: pass ``normalize=False`` there. ``options`` are those of the constructor but ``router`` and ``experts``,
        which are made here.
        """
        for name in ("router", "experts"):
            if name in options:
                raise ValueError(f"MoELayer.from_dense: {name}: expected none, it is made from the dense layers")
        dim, width = linear1.in_features, linear1.out_features
        ffn_dim, odd = divmod(width, 2) if activation in GATED else (width, 0)
        if odd:
            raise ValueError(
                f"MoELayer.from_dense: linear1: expected an even number of outputs for {activation}: gate half, then "
                f"value half, got {width}"
            )
        if linear2.in_features != ffn_dim or linear2.out_features != dim:
            raise ValueError(
                f"MoELayer.from_dense: linear2: expected Linear({ffn_dim}, {dim}) behind Linear({dim}, {width}), "
                f"got Linear({linear2.in_features}, {linear2.out_features})"
            )
        has_bias = linear1.bias is not None
        if has_bias != (linear2.bias is not None):
            raise ValueError("MoELayer.from_dense: linear2: expected a bias in both layers or in neither, got one")
        layer = cls(
            dim,
            ffn_dim,
            num_experts,
            capacity_factor=capacity_factor,
            activation=activation,
            bias=has_bias,
            normalize=normalize,
            **options,
        ).to(linear1.weight)
        experts = layer.experts
        copies = (
            (experts.w1, linear1.weight.t()),
            (experts.b1, linear1.bias),
            (experts.w2, linear2.weight.t()),
            (experts.b2, linear2.bias),
        )
        with torch.no_grad():
            for parameter, source in copies:
                if parameter is not None:
                    parameter.copy_(source.expand_as(parameter))
        return layer
