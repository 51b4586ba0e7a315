"""Ways into code that is there already: FFNs of somebody's model that become mixtures of experts (:func:`widen`), and
``widenet_kernels.integrations.transformers``, our experts in its models and our models in its Auto classes, which is
imported when its user asks for it."""

from widenet_kernels.integrations.balance import moe_losses
from widenet_kernels.integrations.widen import WidenReport, widen

__all__ = ["WidenReport", "moe_losses", "widen"]
