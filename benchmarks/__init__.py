"""Microbenchmarks of the kernels against peers and the physical limit: ``python -m widenet_kernels bench``."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch's profiler writes to stderr with every profile
