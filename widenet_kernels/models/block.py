"""The body of every network here: blocks of attention and experts, and what the blocks share.

In a WideNet they share attention, router and experts, and each has its own LayerNorms (Xue et al. 2021, arXiv
2107.11817, section 2 and eq. 6 to 8). N images or texts, L positions, D model dim.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widenet_kernels.models.config import EncoderConfig
from widenet_kernels.nn import Experts, MoEAux, MoELayer, MoERouting

FFN_BIAS_STD = 1e-6  # as in the authors' code


class WideNetOutput(NamedTuple):
    """What a WideNet that classifies returns."""

    loss: Tensor | None  # scalar: main loss + aux_loss_weight * aux_loss; None without labels
    logits: Tensor  # [N, classes]
    aux_loss: Tensor  # scalar: the unweighted sum of the balance losses over the routings; 0 for a dense network
    routing: tuple[MoEAux, ...]  # one per block with experts (the blocks of a group have the same); empty when dense


def widened(logits: Tensor) -> Tensor:
    """In fp32 or wider, where every loss is computed."""
    return logits if logits.dtype == torch.float64 else logits.float()


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of this name, as :class:`Experts` knows it; not a gated one."""
    return F.gelu(x, approximate="tanh") if activation == "gelu_tanh" else getattr(F, activation)(x)


def init_glorot(layer: nn.Linear | nn.Conv2d, parts: int = 1, bias_std: float = 0.0) -> None:
    """Glorot-uniform weight (each of ``parts`` layers joined into this one by itself), bias N(0, bias_std^2)."""
    for part in layer.weight.chunk(parts):
        nn.init.xavier_uniform_(part)
    nn.init.normal_(layer.bias, std=bias_std)  # type: ignore[arg-type]


class Attention(nn.Module):
    """Multi-head self-attention, every projection with a bias."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        init_glorot(self.qkv, parts=3)
        init_glorot(self.out)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [N, L, D], mask [N, L] bool (False: nobody attends to it) -> [N, L, D]."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [N, L, 3, H, D/H]
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [N, H, L, D/H] each
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


class DenseFFN(nn.Module):
    """Linear -> activation -> Linear in the place of a :class:`MoELayer`, to see what the experts are worth."""

    def __init__(self, dim: int, ffn_dim: int, activation: str = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        self.activation = activation
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            init_glorot(layer, bias_std=FFN_BIAS_STD)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        """x [..., D] -> y [..., D] and nothing to say about routing; every token is by itself, masked or not."""
        return self.dropout(self.linear2(self.dropout(activate(self.linear1(x), self.activation)))), None


class AuthorsMoELayer(MoELayer):
    """A :class:`MoELayer` whose experts serve one row less than their capacity B, as WideNet's authors have it.

    Their ranks start at 1 and are kept while below B = T * capacity_factor * K // E, so the first slot stays empty.
    """

    def capacity(self, num_tokens: int) -> int | None:
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return None
        slots = int(num_tokens * factor * self.router.k // self.router.num_experts)
        return min(max(slots - 1, 0), num_tokens)


def self_attention(config: EncoderConfig) -> Attention:
    return Attention(config.hidden_size, config.num_heads, config.attention_dropout)


def feed_forward(config: EncoderConfig, depth: int) -> MoELayer | DenseFFN:
    """The feed-forward layer of the block at this depth."""
    if depth < config.first_moe_layer:
        ffn_size = config.dense_ffn_size or config.ffn_size
        return DenseFFN(config.hidden_size, ffn_size, config.activation, config.expert_dropout)
    experts = Experts(
        config.num_experts,
        config.hidden_size,
        config.ffn_size,
        activation="gelu_tanh" if config.authors else config.activation,
        dropout=config.dropout if config.authors else config.expert_dropout,
        output_activation="gelu_tanh" if config.authors else None,
    )
    for bias in (experts.b1, experts.b2):
        nn.init.normal_(bias, std=FFN_BIAS_STD)  # type: ignore[arg-type]
    layer = AuthorsMoELayer if config.authors else MoELayer
    return layer(
        config.hidden_size,
        config.ffn_size,
        config.num_experts,
        config.k,
        config.capacity_factor,
        eval_capacity_factor=config.eval_capacity_factor,
        priority="token" if config.authors else config.priority,
        noise_std=config.noise_std,
        normalize=config.normalize,
        experts=experts,
        backend=config.backend,
    )


class RoutingGroup:
    """A :class:`MoELayer` for the blocks of a group: the first one's tokens are routed, those of the others go the same
    ways. The first one routes whenever it is called, for activation checkpointing calls it again."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.routing: MoERouting | None = None

    def lead(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, MoEAux]:
        self.routing = self.layer.route(x, mask)
        return self.layer(x, routing=self.routing)

    def follow(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, MoEAux]:
        return self.layer(x, routing=self.routing)


class Block(nn.Module):
    """One depth (eq. 6 and 7): x = attention(norm(x)) + x, then x = ffn(norm(x)) + x.

    Without ``pre_norm`` the norms stand behind the sums: x = norm(attention(x) + x), then x = norm(ffn(x) + x). The two
    LayerNorms are the block's; attention and ffn come with each call, so that where blocks share them their parameters
    stand in the state dict once.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention_dropout = nn.Dropout(config.dropout)
        self.ffn_dropout = nn.Dropout(0.0 if config.authors else config.dropout)  # theirs is inside the experts

    def forward(
        self, x: Tensor, attention: nn.Module, ffn: Callable, mask: Tensor | None = None
    ) -> tuple[Tensor, MoEAux | None]:
        """x [N, L, D], mask [N, L] bool (False: padding) -> [N, L, D] and what the ffn says about its routing."""
        if self.pre_norm:
            x = self.attention_dropout(attention(self.attention_norm(x), mask)) + x
            y, aux = ffn(self.ffn_norm(x), mask)
            return self.ffn_dropout(y) + x, aux
        x = self.attention_norm(self.attention_dropout(attention(x, mask)) + x)
        y, aux = ffn(x, mask)
        return self.ffn_norm(self.ffn_dropout(y) + x), aux


class WideNetEncoder(nn.Module):
    """The blocks, the attention and FFN that they share or have one each of, and with pre_norm a last LayerNorm.

    Blocks that share their LayerNorms are one block, used at every depth.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.num_layers, self.blocks_per_routing = config.num_layers, config.blocks_per_routing
        depths = range(config.num_layers)
        self.attention: nn.Module
        self.ffn: nn.Module
        if config.share_blocks:
            self.attention = self_attention(config)
            self.ffn = feed_forward(config, depth=0)
        else:
            self.attention = nn.ModuleList(self_attention(config) for _ in depths)
            self.ffn = nn.ModuleList(feed_forward(config, depth) for depth in depths)
        self.blocks = nn.ModuleList(Block(config) for _ in (range(1) if config.share_norms else depths))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.pre_norm else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, tuple[MoEAux, ...]]:
        """x [N, L, D], mask [N, L] bool (False: padding) -> [N, L, D], the sum of the balance losses, and the routings.

        There is one MoEAux per block with experts. The blocks of a group have the same one, and its loss is in the sum
        once: T in eq. 8 counts the routing operations. Nobody attends to padding, no expert serves it and the losses
        leave it out; what becomes of it itself means nothing. The capacity is a share of all N * L tokens all the same,
        for how many are valid is known on the device alone.
        """
        routing = []
        for depth in range(self.num_layers):
            if self.blocks_per_routing == 1:
                ffn = at_depth(self.ffn, depth)
            elif depth % self.blocks_per_routing == 0:
                group = RoutingGroup(at_depth(self.ffn, depth))
                ffn = group.lead
            else:
                ffn = group.follow
            x, aux = self.blocks[depth % len(self.blocks)](x, at_depth(self.attention, depth), ffn, mask)
            if aux is not None:
                routing.append(aux)
        balance_losses = (aux.balance_loss for aux in routing[:: self.blocks_per_routing])
        return self.norm(x), sum(balance_losses, start=x.new_zeros(())), tuple(routing)


def at_depth(part: nn.Module, depth: int) -> Any:
    """The block's own, or the one that all blocks share."""
    return part[depth] if isinstance(part, nn.ModuleList) else part
