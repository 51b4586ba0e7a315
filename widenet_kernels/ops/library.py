"""The compiled library ``_C.so``: loaded once, and what it says of itself and of this machine."""

import ctypes
import functools
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
    if "driver serves" in _built["cuda_problem"]:
        _warn(f"widenet_kernels leaves its CUDA C++ kernels aside: {_built['cuda_problem']}")


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def why_not(op: str, device: torch.device) -> str | None:
    """The reason why the library cannot serve ``op`` on ``device``, or None if it can."""
    if (op, device.type) not in _kernels:
        return _load_error or f"the compiled library has no {op} for device type {device.type!r}"
    return None if device.type == "cpu" else _why_not_on_gpu(device)


@torch.compiler.assume_constant_result
def _why_not_on_gpu(device: torch.device) -> str | None:
    return _built["cuda_problem"] or _reason(device)


@functools.cache
def _reason(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    capability = torch.cuda.get_device_capability(device)
    architectures = _built["cuda_architectures"]
    if serves(architectures, capability):
        return None
    major, minor = capability
    return f"the kernels were built for {architectures}, this device has compute capability {major}.{minor}"


def serves(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for these architectures, as CUDAARCHS names them, run on a device of this compute capability.

    Machine code runs within its major version from its minor version on, PTX from its version on; with the suffix a
    both run on exactly that device, with f within its major version.
    """
    for name in architectures.split(","):
        number, _, form = name.partition("-")
        suffix = number.lstrip("0123456789")
        version = divmod(int(number.removesuffix(suffix)), 10)
        if suffix == "a":
            good = version == capability
        elif suffix or form == "real":
            good = version[0] == capability[0] and version[1] <= capability[1]
        else:
            good = version <= capability
        if good:
            return True
    return False


def build_info() -> dict[str, Any]:
    """What this installation has, and why it cannot use what it cannot.

    Returns:
        version, torch; native (is the compiled library loaded), reason if not, library (its path); native_ops (device
        type -> the ops that are in it); stable_abi (the oldest LibTorch whose ABI it keeps to); cpu_level (vector
        instructions); cuda_toolkit and cuda_architectures (CMake's names; empty without CUDA kernels); cuda_problem
        (why those cannot be used on this machine, empty if they can).
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
