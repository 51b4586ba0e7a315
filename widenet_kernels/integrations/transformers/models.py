"""Our models as transformers knows models: by its Auto classes, with its configs and outputs.

Each class here holds the one of :mod:`widenet_kernels.models` whose name it has, under the same names of tensors, so
that both read what either has written, to the bit.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import modeling_outputs
from transformers.utils.generic import can_return_tuple

from widenet_kernels import models
from widenet_kernels.models.pretrained import PretrainedModel

SIZES = {  # what transformers' own models call them
    "intermediate_size": "ffn_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_experts_per_tok": "k",
}


class _Config(transformers.PreTrainedConfig):
    """The fields of our config of the same name, checked and completed by it; transformers' names for them hold too."""

    own_class: ClassVar[type[models.EncoderConfig]]
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["aux_loss"]  # by transformers' Trainer

    def __post_init__(self, **kwargs: Any) -> None:
        known = self.attribute_map
        kwargs = {known.get(name, name): value for name, value in kwargs.items()}
        if self.id2label is not None:
            kwargs["num_labels"] = len(self.id2label)
        names = {field.name: known.get(field.name, field.name) for field in fields(self.own_class)}
        given = {own: kwargs.pop(name) for own, name in names.items() if name in kwargs}
        super().__post_init__(**asdict(self.own_class(**given)), **kwargs)

    def own(self) -> models.EncoderConfig:
        return self.own_class(**{field.name: getattr(self, field.name) for field in fields(self.own_class)})

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | asdict(self.own())


class WideNetConfig(_Config):
    """:class:`widenet_kernels.models.WideNetConfig`; the labels are its classes."""

    model_type = models.WideNetConfig.model_type
    own_class = models.WideNetConfig
    attribute_map: ClassVar[dict[str, str]] = SIZES | {"num_classes": "num_labels"}


class WideNetTextConfig(_Config):
    """:class:`widenet_kernels.models.WideNetTextConfig`."""

    model_type = models.WideNetTextConfig.model_type
    own_class = models.WideNetTextConfig
    attribute_map: ClassVar[dict[str, str]] = SIZES | {
        "max_position_embeddings": "max_positions",
        "type_vocab_size": "num_token_types",
    }


@dataclass
class ImageClassifierOutput(modeling_outputs.ImageClassifierOutput):
    aux_loss: Tensor | None = None  # in this and the others: the unweighted sum of the balance losses


@dataclass
class TextOutput(modeling_outputs.BaseModelOutputWithPooling):
    aux_loss: Tensor | None = None


@dataclass
class MaskedLMOutput(modeling_outputs.MaskedLMOutput):
    sentence_order_logits: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class SequenceClassifierOutput(modeling_outputs.SequenceClassifierOutput):
    aux_loss: Tensor | None = None


@dataclass
class QuestionAnsweringOutput(modeling_outputs.QuestionAnsweringModelOutput):
    aux_loss: Tensor | None = None


class _Model(transformers.PreTrainedModel):
    """Holds a model of ours, ``own``, whose parts are its own parts."""

    own_class: ClassVar[type[PretrainedModel]]
    base_model_prefix = "model"
    _supports_sdpa = True
    _input_embed_layer = "word_embedding"

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        own = self.own_class(config.own())
        # The dicts themselves: whatever takes the place of a part here (a loaded tensor, an adapter) is also own's part
        self._modules, self._parameters = own._modules, own._parameters
        self._hidden = (own,)  # in a tuple, or its parts would have a second name
        self.post_init()

    @property
    def own(self) -> PretrainedModel:
        return self._hidden[0]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers has it, but with every tensor in memory of its own: what was read lies in the mapped file, at
        no aligned addresses, where products have other last bits."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return loaded

    def init_weights(self) -> None:
        """Our model has drawn them."""

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draws, as our model does, what a folder that has been loaded does not have."""
        missing = {n: p for n, p in self.named_parameters() if not getattr(p, "_is_hf_initialized", False)}
        if missing:
            drawn = self.own_class(self.own.config).state_dict()
            for name, parameter in missing.items():
                parameter.copy_(drawn[name])


class WideNetForImageClassification(_Model):
    """:class:`widenet_kernels.models.WideNetForImageClassification`."""

    config_class = WideNetConfig
    own_class = models.WideNetForImageClassification
    main_input_name = "pixel_values"

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        out = self.own(pixel_values, labels)
        return ImageClassifierOutput(loss=out.loss, logits=out.logits, aux_loss=out.aux_loss)


class WideNetTextModel(_Model):
    """:class:`widenet_kernels.models.WideNetTextModel`, with the pooler."""

    config_class = WideNetTextConfig
    own_class = models.WideNetTextModel

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> TextOutput:
        out = self.own(input_ids, attention_mask, token_type_ids)
        return TextOutput(last_hidden_state=out.hidden, pooler_output=out.pooled, aux_loss=out.aux_loss)


class WideNetForMaskedLM(_Model):
    """:class:`widenet_kernels.models.WideNetForMaskedLM`."""

    config_class = WideNetTextConfig
    own_class = models.WideNetForMaskedLM

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        sentence_order_labels: Tensor | None = None,
    ) -> MaskedLMOutput:
        out = self.own(input_ids, attention_mask, token_type_ids, labels, sentence_order_labels)
        return MaskedLMOutput(
            loss=out.loss,
            logits=out.logits,
            sentence_order_logits=out.sentence_order_logits,
            aux_loss=out.aux_loss,
        )


class WideNetForSequenceClassification(_Model):
    """:class:`widenet_kernels.models.WideNetForSequenceClassification`."""

    config_class = WideNetTextConfig
    own_class = models.WideNetForSequenceClassification

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        out = self.own(input_ids, attention_mask, token_type_ids, labels)
        return SequenceClassifierOutput(loss=out.loss, logits=out.logits, aux_loss=out.aux_loss)


class WideNetForQuestionAnswering(_Model):
    """:class:`widenet_kernels.models.WideNetForQuestionAnswering`."""

    config_class = WideNetTextConfig
    own_class = models.WideNetForQuestionAnswering

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> QuestionAnsweringOutput:
        out = self.own(input_ids, attention_mask, token_type_ids, start_positions, end_positions)
        return QuestionAnsweringOutput(
            loss=out.loss, start_logits=out.start_logits, end_logits=out.end_logits, aux_loss=out.aux_loss
        )


AUTO_CLASSES: dict[type, type[_Model]] = {
    transformers.AutoModelForImageClassification: WideNetForImageClassification,
    transformers.AutoModel: WideNetTextModel,
    transformers.AutoModelForMaskedLM: WideNetForMaskedLM,
    transformers.AutoModelForSequenceClassification: WideNetForSequenceClassification,
    transformers.AutoModelForQuestionAnswering: WideNetForQuestionAnswering,
}


def register_models() -> None:
    """Makes the Auto classes load and make our models; to do it again changes nothing."""
    for config in (WideNetConfig, WideNetTextConfig):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto, model in AUTO_CLASSES.items():
        auto.register(model.config_class, model, exist_ok=True)  # type: ignore[attr-defined]
