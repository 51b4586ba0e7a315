"""WideNet: a transformer whose blocks share one attention, one router and one set of experts."""

from widenet_kernels.models.block import AuthorsMoELayer, WideNetEncoder, WideNetOutput
from widenet_kernels.models.config import WideNetConfig
from widenet_kernels.models.vision import WideNetForImageClassification

__all__ = [
    "AuthorsMoELayer",
    "WideNetConfig",
    "WideNetEncoder",
    "WideNetForImageClassification",
    "WideNetOutput",
]
