"""Every stage as Triton kernels, forward and backward: for NVIDIA (sm_80 and later) and AMD GPUs, no compiler needed.

A launcher has the name and the arguments of its twin in :mod:`widenet_kernels.reference`. On a CPU they run under
Triton's interpreter (``TRITON_INTERPRET=1``), for checking alone.
"""

import functools
import importlib.util

import torch


@torch.compiler.assume_constant_result
def why_not(device: torch.device) -> str | None:
    """The reason why these kernels cannot run on ``device``, or None if they can; not traced by torch.compile."""
    return _reason(device)


@functools.cache
def _reason(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if device.type == "cpu":
        return None if triton.knobs.runtime.interpret else "a CPU runs Triton under TRITON_INTERPRET=1 alone"
    if device.type != "cuda":
        return f"there are no Triton kernels for device type {device.type!r}"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compute capability 8.0 or later is needed, this device has {major}.{minor}"
    return None
