"""What WideNet is trained with (Xue et al. 2021, arXiv 2107.11817, Table 6)."""

from widenet_kernels.training.lamb import Lamb

__all__ = ["Lamb"]
