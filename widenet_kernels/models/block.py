"""The body of every WideNet: attention and experts that all blocks share, LayerNorms that each block has for itself.

(Xue et al. 2021, arXiv 2107.11817, section 2 and eq. 6 to 8.) N images or texts, L positions, D model dim.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from widenet_kernels.models.config import WideNetConfig
from widenet_kernels.nn import Experts, MoEAux, MoELayer

FFN_BIAS_STD = 1e-6  # as in the authors' code


class WideNetOutput(NamedTuple):
    """What a WideNet returns."""

    loss: Tensor | None  # scalar: main loss + aux_loss_weight * aux_loss; None without labels
    logits: Tensor  # [N, classes]
    aux_loss: Tensor  # scalar: the unweighted sum of the balance losses over the depths; 0 for a dense network
    routing: tuple[MoEAux, ...]  # one per depth; empty for a dense network


def init_glorot(layer: nn.Linear | nn.Conv2d, parts: int = 1, bias_std: float = 0.0) -> None:
    """Glorot-uniform weight (each of ``parts`` layers joined into this one by itself), bias N(0, bias_std^2)."""
    for part in layer.weight.chunk(parts):
        nn.init.xavier_uniform_(part)
    nn.init.normal_(layer.bias, std=bias_std)  # type: ignore[arg-type]


class Attention(nn.Module):
    """Multi-head self-attention, every projection with a bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        init_glorot(self.qkv, parts=3)
        init_glorot(self.out)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, L, D] -> [N, L, D]."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [N, L, 3, H, D/H]
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [N, H, L, D/H] each
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class DenseFFN(nn.Module):
    """Linear -> GELU -> Linear in the place of a :class:`MoELayer`, to see what the experts are worth."""

    def __init__(self, dim: int, ffn_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            init_glorot(layer, bias_std=FFN_BIAS_STD)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [..., D] -> y [..., D] and nothing to say about routing."""
        return self.dropout(self.linear2(self.dropout(F.gelu(self.linear1(x))))), None


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


def shared_ffn(config: WideNetConfig) -> MoELayer | DenseFFN:
    """The feed-forward layer that all blocks share."""
    if config.dense:
        return DenseFFN(config.hidden_size, config.ffn_size, config.expert_dropout)
    experts = Experts(
        config.num_experts,
        config.hidden_size,
        config.ffn_size,
        activation="gelu_tanh" if config.authors else "gelu",
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
        experts=experts,
        backend=config.backend,
    )


class Block(nn.Module):
    """One depth (eq. 6 and 7): x = attention(norm(x)) + x, then x = ffn(norm(x)) + x.

    The two LayerNorms are its own; attention and ffn are the network's and come with each call, so that their
    parameters stand in the state dict once.
    """

    def __init__(self, config: WideNetConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention_dropout = nn.Dropout(config.dropout)
        self.ffn_dropout = nn.Dropout(0.0 if config.authors else config.dropout)  # theirs is inside the experts

    def forward(self, x: Tensor, attention: nn.Module, ffn: nn.Module) -> tuple[Tensor, MoEAux | None]:
        """x [N, L, D] -> [N, L, D] and what the ffn says about its routing."""
        x = self.attention_dropout(attention(self.attention_norm(x))) + x
        y, aux = ffn(self.ffn_norm(x))
        return self.ffn_dropout(y) + x, aux


class WideNetEncoder(nn.Module):
    """The blocks, what they share, and the final LayerNorm."""

    def __init__(self, config: WideNetConfig) -> None:
        super().__init__()
        self.attention = Attention(config.hidden_size, config.num_heads)
        self.ffn = shared_ffn(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[MoEAux, ...]]:
        """x [N, L, D] -> [N, L, D], the sum of the balance losses, and one MoEAux per depth (none when dense)."""
        routing = []
        for block in self.blocks:
            x, aux = block(x, self.attention, self.ffn)
            if aux is not None:
                routing.append(aux)
        aux_loss = sum((aux.balance_loss for aux in routing), start=x.new_zeros(()))
        return self.norm(x), aux_loss, tuple(routing)
