"""What the text models are trained for: pre-training as ALBERT's, classes of texts, and answers to questions.

Losses are computed in fp32 or wider and leave padding out; each is a mean over what has a label, 0 if nothing has.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widenet_kernels.models.block import WideNetOutput, activate, widened
from widenet_kernels.models.config import WideNetTextConfig
from widenet_kernels.models.pretrained import PretrainedModel
from widenet_kernels.models.text import WideNetTextModel, check_integers, init_normal
from widenet_kernels.nn import MoEAux

IGNORED = -100  # the label of what has none, as torch.nn.functional.cross_entropy has it


class WideNetMaskedLMOutput(NamedTuple):
    """What :class:`WideNetForMaskedLM` returns."""

    loss: Tensor | None  # scalar: both cross entropies + aux_loss_weight * aux_loss; None without labels
    logits: Tensor  # [N, L, V]
    sentence_order_logits: Tensor  # [N, 2]
    aux_loss: Tensor  # as in WideNetOutput
    routing: tuple[MoEAux, ...]


class WideNetQuestionAnsweringOutput(NamedTuple):
    """What :class:`WideNetForQuestionAnswering` returns."""

    loss: Tensor | None  # scalar: the mean of both cross entropies + aux_loss_weight * aux_loss; None without labels
    start_logits: Tensor  # [N, L]; -inf at padding
    end_logits: Tensor  # [N, L]; -inf at padding
    aux_loss: Tensor  # as in WideNetOutput
    routing: tuple[MoEAux, ...]


class TextHead(PretrainedModel):
    """A :class:`WideNetTextModel`, on which a head stands."""

    config_class = WideNetTextConfig
    config: WideNetTextConfig

    def __init__(self, config: WideNetTextConfig, pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.model = WideNetTextModel(config, pooler)

    def _cross_entropy(self, name: str, logits: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The mean over what has a label; ``name`` is that of the argument.

        logits [..., C], labels [...] int64, attention_mask [...] (0 or False: no label) -> scalar.
        """
        shape = tuple(logits.shape[:-1])
        check_integers(self, name, labels, shape, "[N, L]" if len(shape) == 2 else "[N]")
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, IGNORED)
        total = F.cross_entropy(widened(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp(min=1)


class WideNetForMaskedLM(TextHead):
    """The two tasks of ALBERT's pre-training (Lan et al. 2020, arXiv 1909.11942): masked words, order of sentences.

    Words: Linear to ``embedding_size``, the config's activation, LayerNorm, and the word embedding itself with a bias
    as the decoder. Order: a Linear on the pooled output, to "in order" and "swapped".

    Trained on one of the two alone, the head of the other (with the pooler, where it is the order) gets no gradient:
    DistributedDataParallel then needs ``find_unused_parameters=True``.
    """

    def __init__(self, config: WideNetTextConfig) -> None:
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, config.layer_norm_eps)
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.sentence_order = nn.Linear(config.hidden_size, 2)
        for layer in (self.dense, self.sentence_order):
            init_normal(layer)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        sentence_order_labels: Tensor | None = None,
    ) -> WideNetMaskedLMOutput:
        """Logits, and with labels of either kind the loss.

        Args:
            input_ids, attention_mask, token_type_ids: as in :meth:`WideNetTextModel.forward`.
            labels: [N, L] int64, the word that stood there; -100 and padding count nothing.
            sentence_order_labels: [N] int64, 0 or 1 (swapped); -100 counts nothing.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        encoded = self.model(input_ids, attention_mask, token_type_ids)
        hidden = self.norm(activate(self.dense(encoded.hidden), self.config.activation))  # [N, L, embedding_size]
        logits = F.linear(hidden, self.model.word_embedding.weight, self.decoder_bias)
        order_logits = self.sentence_order(encoded.pooled)
        losses = []
        if labels is not None:
            losses.append(self._cross_entropy("labels", logits, labels, attention_mask))
        if sentence_order_labels is not None:
            losses.append(self._cross_entropy("sentence_order_labels", order_logits, sentence_order_labels))
        loss = sum(losses) + self.config.aux_loss_weight * encoded.aux_loss if losses else None
        return WideNetMaskedLMOutput(loss, logits, order_logits, encoded.aux_loss, encoded.routing)


class WideNetForSequenceClassification(TextHead):
    """A class for each text: dropout and a Linear on the pooled output (Devlin et al. 2019, arXiv 1810.04805).

    A pre-trained model is loaded with ``classifying.model.load_state_dict(pretrained.model.state_dict())``.
    """

    def __init__(self, config: WideNetTextConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        init_normal(self.head)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> WideNetOutput:
        """Logits [N, num_labels], and with labels the loss.

        Args:
            input_ids, attention_mask, token_type_ids: as in :meth:`WideNetTextModel.forward`.
            labels: [N] int64 classes; -100 counts nothing.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        encoded = self.model(input_ids, attention_mask, token_type_ids)
        logits = self.head(self.dropout(encoded.pooled))
        loss = None
        if labels is not None:
            loss = self._cross_entropy("labels", logits, labels) + self.config.aux_loss_weight * encoded.aux_loss
        return WideNetOutput(loss, logits, encoded.aux_loss, encoded.routing)


class WideNetForQuestionAnswering(TextHead):
    """Where in the text the answer starts and ends: one Linear to both logits (Devlin et al. 2019, section 4.2).

    It has no pooler: the rest of a pre-trained model is loaded with
    ``answering.model.load_state_dict(pretrained.model.state_dict(), strict=False)``.
    """

    def __init__(self, config: WideNetTextConfig) -> None:
        super().__init__(config, pooler=False)
        self.head = nn.Linear(config.hidden_size, 2)
        init_normal(self.head)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> WideNetQuestionAnsweringOutput:
        """Logits, and with both positions the loss.

        Args:
            input_ids, attention_mask, token_type_ids: as in :meth:`WideNetTextModel.forward`.
            start_positions, end_positions: [N] int64, the answer's first and last token, none of them padding; -100
                counts nothing.

        Raises:
            ValueError, TypeError: naming the argument, what was expected and what came.
        """
        encoded = self.model(input_ids, attention_mask, token_type_ids)
        logits = self.head(encoded.hidden)  # [N, L, 2]
        if attention_mask is not None:
            logits = logits.masked_fill((attention_mask == 0)[..., None], -torch.inf)
        start_logits, end_logits = logits.unbind(-1)
        if (start_positions is None) != (end_positions is None):
            missing = "start_positions" if start_positions is None else "end_positions"
            raise ValueError(f"WideNetForQuestionAnswering: {missing}: expected both positions or none, got one")
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = self._cross_entropy("start_positions", start_logits, start_positions)
            end_loss = self._cross_entropy("end_positions", end_logits, end_positions)
            loss = (start_loss + end_loss) / 2 + self.config.aux_loss_weight * encoded.aux_loss
        return WideNetQuestionAnsweringOutput(loss, start_logits, end_logits, encoded.aux_loss, encoded.routing)
