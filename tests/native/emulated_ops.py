"""A pytest plugin: the CPU's routing ops are those of csrc/cuda, run by the emulator, in the order of a seed."""

import native
import torch

import widenet_kernels  # noqa: F401  the ops are defined before their kernels are replaced

torch.ops.load_library(str(native.build(sanitize=False).with_name("_emulated_ops.so")))


@torch.library.impl("aten::mm.dtype_out", "CPU")
def mm_dtype_out(a, b, out_dtype, *, out):
    """Which torch has for GPUs alone."""
    return torch.mm(a.to(out_dtype), b.to(out_dtype), out=out)
