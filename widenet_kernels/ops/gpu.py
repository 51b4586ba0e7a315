"""Which GPUs the compiled library's CUDA kernels run on."""

import functools

import torch


@torch.compiler.assume_constant_result
def why_not(device: torch.device, problem: str, architectures: str) -> str | None:
    """The reason why kernels of ``architectures`` cannot run on ``device``, or None; not traced by torch.compile.

    Args:
        problem: what keeps them from any GPU of this machine, or "".
        architectures: as ``build_info()["cuda_architectures"]``.
    """
    return problem or _reason(device, architectures)


@functools.cache
def _reason(device: torch.device, architectures: str) -> str | None:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    major, minor = torch.cuda.get_device_capability(device)
    if serves(architectures, (major, minor)):
        return None
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
