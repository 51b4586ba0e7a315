"""WideNet: a transformer whose blocks share one attention, one router and one set of experts; and its baselines."""

from widenet_kernels.models.block import AuthorsMoELayer, WideNetEncoder, WideNetOutput
from widenet_kernels.models.config import EncoderConfig, WideNetConfig, WideNetTextConfig
from widenet_kernels.models.text import WideNetTextModel, WideNetTextOutput
from widenet_kernels.models.text_heads import (
    WideNetForMaskedLM,
    WideNetForQuestionAnswering,
    WideNetForSequenceClassification,
    WideNetMaskedLMOutput,
    WideNetQuestionAnsweringOutput,
)
from widenet_kernels.models.upcycle import upcycle_albert, upcycle_vit
from widenet_kernels.models.vision import WideNetForImageClassification

__all__ = [
    "AuthorsMoELayer",
    "EncoderConfig",
    "WideNetConfig",
    "WideNetEncoder",
    "WideNetForImageClassification",
    "WideNetForMaskedLM",
    "WideNetForQuestionAnswering",
    "WideNetForSequenceClassification",
    "WideNetMaskedLMOutput",
    "WideNetOutput",
    "WideNetQuestionAnsweringOutput",
    "WideNetTextConfig",
    "WideNetTextModel",
    "WideNetTextOutput",
    "upcycle_albert",
    "upcycle_vit",
]
