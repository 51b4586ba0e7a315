"""The sizes and switches of a WideNet (Xue et al. 2021, arXiv 2107.11817), checked when they are set."""

import math
from dataclasses import dataclass
from typing import Any

PRIORITIES = ("choice", "token", "score")
COUNTS = (
    *("image_size", "patch_size", "num_channels", "hidden_size", "ffn_size"),
    *("num_layers", "num_heads", "num_experts", "k", "num_classes"),
)


@dataclass(frozen=True, kw_only=True)
class WideNetConfig:
    """What a WideNet is made of; the defaults are those of WideNet-B on 224 x 224 images.

    Args:
        image_size, patch_size, num_channels: square images of ``num_channels``, cut into square patches.
        hidden_size, ffn_size: D and F; ``ffn_size`` is that of one expert.
        num_layers, num_heads: blocks, and heads of the one attention they share.
        num_experts, k: E and the choices per token.
        capacity_factor: rows an expert may serve, as a multiple of an even share; None: dropless.
        eval_capacity_factor: the same in evaluation; None: as in training.
        priority: who is served first, "choice", "token" or "score".
        noise_std: standard deviation of the router's noise in training; None: 1/E, 0: no noise.
        num_classes: 1,001 as in the paper: ImageNet's 1,000 behind one for the background.
        representation: a Linear and tanh in front of the classifier.
        dropout: on the embedding, the attention's output and the experts' output.
        expert_dropout: behind each of the two layers of an expert.
        aux_loss_weight: lambda, what the sum of the balance losses counts in the loss (eq. 8).
        label_smoothing: of the cross entropy.
        layer_norm_eps: of every LayerNorm.
        dense: one shared dense FFN in place of router and experts; what is said of them then says nothing.
        authors: the exact form of the authors' code: token priority, one slot less per expert, tanh-GELU behind both
            layers of an expert, and ``dropout`` inside the experts instead of on their output. It goes before
            ``priority`` and ``expert_dropout``.
        backend: None (the best there is), "native", "triton" or "reference", for every op of the MoE layer.

    Raises:
        ValueError: naming the field, what was expected and what came.
    """

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    ffn_size: int = 4096
    num_layers: int = 12
    num_heads: int = 12
    num_experts: int = 4
    k: int = 2
    capacity_factor: float | None = 1.2
    eval_capacity_factor: float | None = None
    priority: str = "choice"
    noise_std: float | None = None
    num_classes: int = 1001
    representation: bool = True
    dropout: float = 0.1
    expert_dropout: float = 0.0
    aux_loss_weight: float = 0.01
    label_smoothing: float = 0.0
    layer_norm_eps: float = 1e-6
    dense: bool = False
    authors: bool = False
    backend: str | None = None

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

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                self._refuse(name, "an int of at least 1")
        if self.image_size % self.patch_size:
            self._refuse("patch_size", f"a divisor of image_size {self.image_size}")
        if self.hidden_size % self.num_heads:
            self._refuse("num_heads", f"a divisor of hidden_size {self.hidden_size}")
        if self.k > self.num_experts:
            self._refuse("k", f"1 to {self.num_experts}, the number of experts")
        if self.priority not in PRIORITIES:
            self._refuse("priority", " or ".join(repr(name) for name in PRIORITIES))
        for name in ("capacity_factor", "eval_capacity_factor", "noise_std", "aux_loss_weight"):
            value = getattr(self, name)
            if value is None and name != "aux_loss_weight":
                continue
            if not 0 <= value < math.inf:
                self._refuse(name, "a finite number >= 0")
        for name in ("dropout", "expert_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                self._refuse(name, "at least 0 and below 1")
        if not 0 < self.layer_norm_eps < math.inf:
            self._refuse("layer_norm_eps", "a finite number above 0")
        if self.authors and self.dense:
            self._refuse("authors", "False with dense=True: it is a form of the experts")

    def _refuse(self, name: str, expected: str) -> None:
        raise ValueError(f"WideNetConfig: {name}: expected {expected}, got {getattr(self, name)!r}")
