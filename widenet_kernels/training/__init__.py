"""What WideNet is trained with (Xue et al. 2021, arXiv 2107.11817, Table 6)."""

from widenet_kernels.training.lamb import Lamb
from widenet_kernels.training.schedule import warmup_decay

__all__ = ["Lamb", "warmup_decay"]
