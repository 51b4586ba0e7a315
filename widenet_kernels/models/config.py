"""The sizes and switches of a WideNet (Xue et al. 2021, arXiv 2107.11817) and its baselines, checked when set."""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

PRIORITIES = ("choice", "token", "score")
POOLINGS = ("mean", "token")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
BACKENDS = (None, "native", "triton", "reference")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What every network here is made of, whatever comes in and goes out.

    Args:
        hidden_size, ffn_size: D and F; ``ffn_size`` is that of one expert.
        num_layers, num_heads: blocks, and heads of attention.
        share_blocks: one attention and one FFN, router included, for all blocks; False: each has its own.
        share_norms: one pair of LayerNorms for all blocks, as in ALBERT; False: each has its own, as in WideNet.
        pre_norm: LayerNorm in front of attention and FFN and one behind the last block (ViT); False: behind each sum,
            as in BERT and ALBERT.
        dense: dense FFNs in place of router and experts; what is said of them then says nothing.
        dense_ffn_size: F of the dense FFNs; None: ``ffn_size``.
        moe_layers: how many of the last blocks have experts, the others a dense FFN (ViT-MoE); None: all. Fewer than
            all need ``share_blocks=False``.
        routing_groups: the blocks fall into so many groups of consecutive ones; a group's first block routes, the
            others use its gate weights and its plan (Figure 3 of the paper). None: every block routes. Needs the one
            router of ``share_blocks=True``.
        num_experts, k: E and the choices per token.
        normalize: divide the gate weights by the sum over a token's k choices; False: as they are, as in WideNet.
        activation: of the experts and dense FFNs, and of the head that predicts words: "gelu", "gelu_tanh", "relu" or
            "silu".
        capacity_factor: rows an expert may serve, as a multiple of an even share; None: dropless.
        eval_capacity_factor: the same in evaluation; None: as in training.
        priority: who is served first, "choice", "token" or "score".
        noise_std: standard deviation of the router's noise in training; None: 1/E, 0: no noise.
        dropout: on the embedding, the attention's output and the FFN's output, and in front of a classifier of texts.
        attention_dropout: on the attention's weights.
        expert_dropout: behind each of the two layers of an expert or dense FFN.
        aux_loss_weight: lambda, what the sum of the balance losses counts in the loss (eq. 8).
        layer_norm_eps: of every LayerNorm.
        authors: the exact form of the authors' code: token priority, one slot less per expert, tanh-GELU behind both
            layers of an expert, and ``dropout`` inside the experts instead of on their output. It goes before
            ``activation``, ``priority`` and ``expert_dropout``.
        backend: None (the best there is), "native", "triton" or "reference", for every op of the MoE layer.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    model_type: ClassVar[str]  # the config's name in a file

    hidden_size: int = 768
    ffn_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    share_blocks: bool = True
    share_norms: bool = False
    pre_norm: bool = True
    dense: bool = False
    dense_ffn_size: int | None = None
    moe_layers: int | None = None
    routing_groups: int | None = None
    num_experts: int = 4
    k: int = 2
    normalize: bool = False
    activation: str = "gelu"
    capacity_factor: float | None = 1.2
    eval_capacity_factor: float | None = None
    priority: str = "choice"
    noise_std: float | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    expert_dropout: float = 0.0
    aux_loss_weight: float = 0.01
    layer_norm_eps: float = 1e-6
    authors: bool = False
    backend: str | None = None

    @property
    def first_moe_layer(self) -> int:
        """The first block with experts; those before it are dense."""
        if self.dense:
            return self.num_layers
        return 0 if self.moe_layers is None else self.num_layers - self.moe_layers

    @property
    def blocks_per_routing(self) -> int:
        """Consecutive blocks that go the same ways."""
        return 1 if self.dense or self.routing_groups is None else self.num_layers // self.routing_groups

    def __post_init__(self) -> None:
        self._check_counts("hidden_size", "ffn_size", "num_layers", "num_heads", "num_experts", "k")
        for name in ("dense_ffn_size", "moe_layers", "routing_groups"):
            if getattr(self, name) is not None:
                self._check_counts(name)
        if self.hidden_size % self.num_heads:
            self._refuse("num_heads", f"a divisor of hidden_size {self.hidden_size}")
        if self.k > self.num_experts:
            self._refuse("k", f"1 to {self.num_experts}, the number of experts")
        self._check_choice("priority", PRIORITIES)
        self._check_choice("activation", ACTIVATIONS)
        self._check_choice("backend", BACKENDS)
        for name in ("capacity_factor", "eval_capacity_factor", "noise_std", "aux_loss_weight"):
            value = getattr(self, name)
            if value is None and name != "aux_loss_weight":
                continue
            if not (is_number(value) and 0 <= value < math.inf):
                self._refuse(name, "a finite number >= 0")
        self._check_shares("dropout", "attention_dropout", "expert_dropout")
        if not (is_number(self.layer_norm_eps) and 0 < self.layer_norm_eps < math.inf):
            self._refuse("layer_norm_eps", "a finite number above 0")
        for field in fields(self):
            if field.type is bool and not isinstance(getattr(self, field.name), bool):
                self._refuse(field.name, "True or False")
        self._check_who_routes()
        if self.authors and self.first_moe_layer:
            self._refuse("authors", "False with dense=True or fewer moe_layers: it is a form of the experts alone")

    def _check_who_routes(self) -> None:
        if self.moe_layers is not None:
            if self.moe_layers > self.num_layers:
                self._refuse("moe_layers", f"at most num_layers {self.num_layers}")
            if self.share_blocks and self.moe_layers < self.num_layers:
                self._refuse(
                    "moe_layers", f"None or {self.num_layers} with share_blocks=True: one FFN serves all blocks"
                )
        if self.routing_groups is not None:
            if self.num_layers % self.routing_groups:
                self._refuse("routing_groups", f"a divisor of num_layers {self.num_layers}")
            if not self.share_blocks:
                self._refuse("routing_groups", "None with share_blocks=False: each block has a router of its own")

    def _check_counts(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                self._refuse(name, "an int of at least 1")

    def _check_shares(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value < 1):
                self._refuse(name, "at least 0 and below 1")

    def _check_choice(self, name: str, choices: tuple[str | None, ...]) -> None:
        if getattr(self, name) not in choices:
            self._refuse(name, " or ".join(map(repr, choices)))

    def _refuse(self, name: str, expected: str) -> None:
        raise ValueError(f"{type(self).__name__}: {name}: expected {expected}, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class WideNetConfig(EncoderConfig):
    """A WideNet for images, or a vision transformer to compare it with; the defaults are WideNet-B's at 224 x 224.

    Args:
        image_size, patch_size, num_channels: square images of ``num_channels``, cut into square patches.
        pooling: "mean" over all positions, or the first one's "token".
        num_classes: 1,001 as in the paper: ImageNet's 1,000 behind one for the background.
        representation: a Linear and tanh in front of the classifier.
        label_smoothing: of the cross entropy.

    The others are those of :class:`EncoderConfig`, with ``ffn_size`` 4,096: WideNet-B's experts are wider than ViT-B's
    FFN. ``vit_base(share_blocks=True)`` is a ViT that shares attention and FFN.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    model_type = "widenet"

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    ffn_size: int = 4096
    pooling: str = "mean"
    num_classes: int = 1001
    representation: bool = True
    label_smoothing: float = 0.0

    @classmethod
    def base(cls, **overrides: Any) -> "WideNetConfig":
        """WideNet-B: 29,691,369 parameters."""
        return cls(**overrides)

    @classmethod
    def large(cls, **overrides: Any) -> "WideNetConfig":
        """WideNet-L: 40,942,569 parameters."""
        return cls(**{"hidden_size": 1024, "num_layers": 24, "num_heads": 16} | overrides)

    @classmethod
    def huge(cls, **overrides: Any) -> "WideNetConfig":
        """WideNet-H: 63,343,081 parameters."""
        return cls(**{"hidden_size": 1280, "ffn_size": 5120, "num_layers": 32, "num_heads": 16} | overrides)

    @classmethod
    def vit_base(cls, **overrides: Any) -> "WideNetConfig":
        """ViT-B as the paper trains it (Table 1), nothing shared and no experts: 87,158,249 parameters."""
        return cls.base(**{"share_blocks": False, "dense": True, "ffn_size": 3072, "pooling": "token"} | overrides)

    @classmethod
    def vit_large(cls, **overrides: Any) -> "WideNetConfig":
        """ViT-L: 305,376,233 parameters."""
        return cls.large(**{"share_blocks": False, "dense": True, "pooling": "token"} | overrides)

    @classmethod
    def vit_moe_base(cls, **overrides: Any) -> "WideNetConfig":
        """ViT-MoE-B (Table 1), nothing shared, experts in the last two blocks: 128,090,089 parameters."""
        return cls.base(**{"share_blocks": False, "moe_layers": 2, "dense_ffn_size": 3072} | overrides)

    @classmethod
    def vit_moe_large(cls, **overrides: Any) -> "WideNetConfig":
        """ViT-MoE-L, experts in the last four blocks: 406,117,353 parameters."""
        return cls.large(**{"share_blocks": False, "moe_layers": 4} | overrides)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self) -> None:
        self._check_counts("image_size", "patch_size", "num_channels", "num_classes")
        super().__post_init__()
        if self.image_size % self.patch_size:
            self._refuse("patch_size", f"a divisor of image_size {self.image_size}")
        self._check_choice("pooling", POOLINGS)
        self._check_shares("label_smoothing")


@dataclass(frozen=True, kw_only=True)
class WideNetTextConfig(EncoderConfig):
    """A WideNet for text, or an ALBERT or BERT to compare it with; the defaults are those with four experts.

    The paper names embeddings of 128 and the experts; the rest is ALBERT-base's (Lan et al. 2020, arXiv 1909.11942),
    which the parameter counts confirm: 12 blocks of 768, FFN 3,072, LayerNorms behind the sums.

    Args:
        vocab_size: V.
        embedding_size: the width of the embeddings, in front of the Linear to ``hidden_size``.
        max_positions: the longest text.
        num_token_types: segments that a text may have.
        num_labels: classes of :class:`WideNetForSequenceClassification`.

    The others are those of :class:`EncoderConfig`, with BERT's and ALBERT's dropouts of 0.1, ``pre_norm=False`` and
    ``layer_norm_eps`` of 1e-12.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    model_type = "widenet_text"

    vocab_size: int = 30_000
    embedding_size: int = 128
    max_positions: int = 512
    num_token_types: int = 2
    num_labels: int = 2
    pre_norm: bool = False
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12

    @classmethod
    def base(cls, num_experts: int = 4, **overrides: Any) -> "WideNetTextConfig":
        """WideNet with 4, 8 or 16 experts (Table 2): 25,887,744, 44,780,544 or 82,566,144 parameters, with pooler."""
        return cls(num_experts=num_experts, **overrides)

    @classmethod
    def albert_base(cls, **overrides: Any) -> "WideNetTextConfig":
        """ALBERT-base, which shares the LayerNorms too and has no experts: 11,683,584 parameters."""
        return cls(**{"dense": True, "share_norms": True} | overrides)

    @classmethod
    def bert_base(cls, **overrides: Any) -> "WideNetTextConfig":
        """BERT-base with ALBERT's factorised embedding, nothing shared (Table 2): 89,650,176 parameters."""
        return cls(**{"dense": True, "share_blocks": False} | overrides)

    def __post_init__(self) -> None:
        self._check_counts("vocab_size", "embedding_size", "max_positions", "num_token_types", "num_labels")
        super().__post_init__()
