"""The compiled library ``_C.so``: loaded once, and what it says of itself and of this machine."""

import ctypes
import json
import pathlib
import warnings
from typing import Any

import torch

LIBRARY_FILE = pathlib.Path(__file__).parent.parent / "_C.so"
NAMESPACE = "widenet_kernels"
MOST_EXPERTS_ON_GPU = 1024  # of the CUDA kernels of gate and plan: csrc/cuda/kernels.h

_load_error: str | None = "the library has not been loaded yet"
_built: dict[str, str] = {}  # what widenet_build_info in csrc/torch/device.cpp tells
_kernels: set[tuple[str, str]] = set()  # the (op, device type) pairs that are in the library


def load_library() -> None:
    """Load the compiled kernels; where they cannot be used, keep the reason, and warn once if something is amiss."""
    global _load_error
    if not LIBRARY_FILE.exists():
        _load_error = "this installation was built without compiled kernels (WIDENET_NATIVE=OFF)"
        return
    try:
        torch.ops.load_library(str(LIBRARY_FILE))
    except (OSError, RuntimeError) as error:
        _load_error = f"{LIBRARY_FILE.name} could not be loaded: {error.__cause__ or error}"
        _warn(f"widenet_kernels runs on the CPU by its slow reference: {_load_error}")
        return
    _load_error = None
    describe = ctypes.CDLL(str(LIBRARY_FILE)).widenet_build_info
    describe.restype = ctypes.c_char_p
    _built.update(json.loads(describe()))
    for qualified in torch._C._dispatch_get_all_op_names():
        space, _, name = qualified.partition("::")
        if space == NAMESPACE:
            for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
                if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
                    _kernels.add((name, device))
    if "driver serves" in _built["cuda_problem"] and torch.version.cuda:
        _warn(f"widenet_kernels leaves its CUDA C++ kernels aside: {_built['cuda_problem']}")


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def why_not(op: str, device: torch.device) -> str | None:
    """The reason why the library cannot serve ``op`` on ``device``, or None if it can."""
    if (op, device.type) not in _kernels:
        built = device.type != "cuda" or _built.get("cuda_toolkit")
        return _load_error or (f"it has no kernels of this for {device.type}" if built else _built["cuda_problem"])
    if device.type == "cpu":
        return None
    from widenet_kernels.ops import gpu  # when a GPU asks: it imports torch's compiler, which takes a second

    return gpu.why_not(device, _built["cuda_problem"], _built["cuda_architectures"])


def empty_cache() -> int:
    """Give back the memory that the CPU ops keep between calls, as ``torch.cuda.empty_cache`` does for a GPU.

    The ops keep the memory of their large tensors (2 MiB and more, with torch 2.11 or later), gradients and what is
    saved for them included, for the next of about the same size; never more, with what is in use, than was in use at
    once.

    Returns:
        How many bytes that were.
    """
    if _load_error:
        return 0
    release = ctypes.CDLL(str(LIBRARY_FILE)).widenet_empty_cache
    release.restype = ctypes.c_int64
    return int(release())


def build_info() -> dict[str, Any]:
    """What this installation has, and why it cannot use what it cannot.

    Returns:
        version, torch; native (is the compiled library loaded), reason if not, library (its path); native_ops (device
        type -> the ops that are in it); stable_abi (the oldest LibTorch whose ABI it keeps to); cpu_level (of the
        vector instructions that are used); cuda_toolkit and cuda_architectures (CMake's names; empty without CUDA
        kernels); cuda_problem (why those cannot be used on this machine, empty if they can).
    """
    from widenet_kernels import __version__

    return {
        "version": __version__,
        "torch": torch.__version__,
        "native": _load_error is None,
        "reason": _load_error,
        "library": str(LIBRARY_FILE) if LIBRARY_FILE.exists() else None,
        "native_ops": {
            device: sorted(op for op, where in _kernels if where == device)
            for device in sorted({device for _, device in _kernels})
        },
        **_built,
    }
