"""transformers (5 or later, not installed with us): its experts by our kernels, and our models in its Auto classes."""

from widenet_kernels.integrations.transformers.experts import register_experts
from widenet_kernels.integrations.transformers.models import register_models

__all__ = ["register"]


def register() -> None:
    """Tells transformers of our kernels and of our models; to do it again changes nothing.

    ``experts_implementation="widenet"``, in ``from_pretrained`` or ``model.set_experts_implementation``, then runs the
    experts of Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss and the other families of its ``ExpertsInterface`` by our
    kernels, on the parameters as they lie; checkpoints stay what they are. And a folder that our ``save_pretrained``
    wrote is loaded by ``AutoModelForImageClassification``, ``AutoModelForMaskedLM`` and so on.
    """
    register_experts()
    register_models()
