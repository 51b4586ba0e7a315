"""Microbenchmarks of the kernels against peers and the physical limit: ``python -m widenet_kernels bench``."""
