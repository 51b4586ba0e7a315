"""WideNet for text, and the ALBERT and BERT it is compared with: token ids in, hidden states out (arXiv 2107.11817).

The paper puts WideNet's sharing on ALBERT; what it leaves open is as in ALBERT (Lan et al. 2020, arXiv 1909.11942) and
BERT (Devlin et al. 2019, arXiv 1810.04805). N texts, L positions, D model dim, V the vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from widenet_kernels.models.block import WideNetEncoder
from widenet_kernels.models.config import WideNetTextConfig
from widenet_kernels.models.pretrained import PretrainedModel
from widenet_kernels.nn import Experts, MoEAux, TopKRouter

LABELS = (torch.int64,)
IDS = (torch.int64, torch.int32)
MASKS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INIT_STD = 0.02  # BERT's, who cuts its normal distribution off at two of them; that the router has it is our choice


class WideNetTextOutput(NamedTuple):
    """What :class:`WideNetTextModel` returns."""

    hidden: Tensor  # [N, L, D]; at padding it means nothing
    pooled: Tensor | None  # [N, D]: Linear and tanh of the first position; None without a pooler
    aux_loss: Tensor  # scalar: the unweighted sum of the balance losses over the routings; 0 for a dense network
    routing: tuple[MoEAux, ...]  # one per block with experts (the blocks of a group have the same); empty when dense


def init_normal(module: nn.Module) -> None:
    """Weights N(0, INIT_STD^2), biases 0, LayerNorms as they are; for :meth:`torch.nn.Module.apply`."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    if isinstance(module, nn.Embedding | TopKRouter):
        weights = [module.weight]
    elif isinstance(module, nn.Linear):
        weights, biases = [module.weight], [module.bias]
    elif isinstance(module, Experts):
        weights, biases = [module.w1, module.w2], [module.b1, module.b2]
    for weight in weights:
        nn.init.normal_(weight, std=INIT_STD)
    for bias in biases:
        if bias is not None:
            nn.init.zeros_(bias)


def check_integers(
    model: nn.Module,
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],
    letters: str,
    dtypes: tuple[torch.dtype, ...] = LABELS,
) -> None:
    """Raises TypeError or ValueError unless it is a tensor of these dtypes and this shape ("any": whatever)."""
    owner = type(model).__name__
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{owner}: {name}: expected {letters} of {' or '.join(map(str, dtypes))}, got {got}")
    sizes = tuple(tensor.shape)
    if len(sizes) != len(shape) or any(want not in ("any", have) for have, want in zip(sizes, shape, strict=True)):
        raise ValueError(f"{owner}: {name}: expected {letters} = [{', '.join(map(str, shape))}], got {list(sizes)}")


class WideNetTextModel(PretrainedModel):
    """Factorised embedding, the encoder and, if wanted, a pooler.

    The embeddings of the word, its position and its segment are added, normalised, dropped out and mapped from
    ``embedding_size`` to ``hidden_size``, as in ALBERT. The pooler is BERT's. The ``activation`` "gelu" is the exact
    one, x * Phi(x) (Hendrycks and Gimpel 2016, arXiv 1606.08415); ALBERT's code has "gelu_tanh".

    Args:
        config: ``base`` for WideNet, ``albert_base`` and ``bert_base`` for the others.
        pooler: False for heads that do not use it, so that every parameter gets a gradient.
    """

    config_class = WideNetTextConfig
    config: WideNetTextConfig

    def __init__(self, config: WideNetTextConfig, pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.word_embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.position_embedding = nn.Embedding(config.max_positions, config.embedding_size)
        self.token_type_embedding = nn.Embedding(config.num_token_types, config.embedding_size)
        self.embedding_norm = nn.LayerNorm(config.embedding_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.projection = nn.Linear(config.embedding_size, config.hidden_size)
        self.encoder = WideNetEncoder(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if pooler else None
        self.apply(init_normal)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> WideNetTextOutput:
        """Hidden states of every token, and of the text.

        Nobody attends to padding, no expert serves it and the balance losses leave it out: what stands there changes
        no bit of what comes out elsewhere. Longer padding changes nothing either but the capacity, which is a share of
        all N * L tokens, and the last bits where matrices of another size are multiplied in another order.

        Args:
            input_ids: [N, L] int64 or int32 below V, with L from 1 to ``max_positions``.
            attention_mask: [N, L] bool or integers, True or 1 for tokens, False or 0 for padding; None: no padding.
            token_type_ids: [N, L] int64 or int32, each token's segment; None: all 0.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        mask = self._padding_mask(input_ids, attention_mask)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        else:
            check_integers(self, "token_type_ids", token_type_ids, tuple(input_ids.shape), "[N, L]", IDS)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = (
            self.word_embedding(input_ids)
            + self.position_embedding(positions)
            + self.token_type_embedding(token_type_ids)
        )
        x = self.projection(self.dropout(self.embedding_norm(x)))  # [N, L, D]
        x, aux_loss, routing = self.encoder(x, mask)
        pooled = None if self.pooler is None else self.pooler(x[:, 0]).tanh()
        return WideNetTextOutput(x, pooled, aux_loss, routing)

    @classmethod
    def for_tensors(cls, config: WideNetTextConfig, tensors: dict[str, Tensor]) -> "WideNetTextModel":
        return cls(config, pooler="pooler.weight" in tensors)

    def _padding_mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """[N, L] bool, False at padding, after a look at both arguments; None: there is no padding."""
        check_integers(self, "input_ids", input_ids, ("any", "any"), "[N, L]", IDS)
        if not 1 <= input_ids.shape[1] <= self.config.max_positions:
            raise ValueError(
                f"WideNetTextModel: input_ids: expected [N, L] with L from 1 to max_positions "
                f"{self.config.max_positions}, got {list(input_ids.shape)}"
            )
        if attention_mask is None:
            return None
        check_integers(self, "attention_mask", attention_mask, tuple(input_ids.shape), "[N, L]", MASKS)
        return attention_mask != 0
