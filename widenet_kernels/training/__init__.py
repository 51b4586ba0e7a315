"""What WideNet is trained with (Xue et al. 2021, arXiv 2107.11817, Table 6): LAMB, a warm-up and decay, mixup."""

from widenet_kernels.training.lamb import Lamb
from widenet_kernels.training.mixup import mixup
from widenet_kernels.training.schedule import warmup_decay

__all__ = ["Lamb", "mixup", "warmup_decay"]
