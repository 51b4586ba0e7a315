"""Compile what a launch would compile, for a GPU that is not there, and read the binary.

The launchers themselves run, on tensors of device "meta": so tiles, constants and the alignment that Triton assumes are
those of a real launch. Nothing is executed.
"""

import bisect
import dataclasses
import itertools
import pathlib
import re
import struct
import subprocess
import tempfile
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Target(NamedTuple):
    """A GPU to compile for."""

    gpu: GPUTarget
    shared_limit: int  # bytes one block may have
    large_product: str  # the tensor-core instruction of a product of 64 rows or more
    small_product: str


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, r"HMMA", r"HMMA"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, r"HGMMA", r"HG?MMA"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, r"UTC\w*MMA", r"UTC\w*MMA|HMMA"),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024, r"HMMA", r"HMMA"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, r"v_mfma\w*", r"v_mfma\w*"),
}


@dataclasses.dataclass(frozen=True)
class Binary:
    """What was read from one compiled kernel."""

    target: str
    kernel: str
    constants: dict[str, Any]  # the constexpr arguments, num_warps and num_stages
    grid: tuple[int, ...]
    types: tuple[str, ...] = ()  # of the arguments that are pointers or tensor descriptors
    registers: int = 0
    spilled: int = 0  # AMD: registers; NVIDIA: instructions and bytes of the stack
    shared: int = 0  # bytes
    tensor_cores: Counter[str] = dataclasses.field(default_factory=Counter)  # instructions by name
    loads: Counter[int] = dataclasses.field(
        default_factory=Counter
    )  # from global memory: instructions by width in bits
    copies: Counter[int] = dataclasses.field(default_factory=Counter)  # the loads straight to shared memory
    stores: Counter[int] = dataclasses.field(default_factory=Counter)
    ttir: str = ""  # Triton's own first form, which does not depend on the target
    error: str = ""  # why there is no binary

    @property
    def threads(self) -> int:
        return self.constants["num_warps"] * TARGETS[self.target].gpu.warp_size


# ----------------------------------------------------------------------------------------------------- without a GPU


class _Driver:
    """Stands in for Triton's driver of a GPU. JITFunction keeps its kernels by device: each target is one."""

    def __init__(self, target: str):
        self.target = TARGETS[target].gpu
        self.index = 1000 + list(TARGETS).index(target)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def _plain(constant: Any) -> Any:
    return constant if isinstance(constant, int | str | None) else str(constant)


@contextmanager
def compiling(target: str, wanted: Callable[[str], bool] = lambda kernel: True) -> Iterator[list[tuple]]:
    """Inside, a launch compiles for ``target`` and is noted, once for each binary: (kernel, constants, grid, compiled).

    A kernel that is not ``wanted`` by its name is left out.
    """
    launches: dict[str, tuple] = {}
    compile_and_run = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not wanted(self.__name__):
            return None
        names = self.signature.parameters
        bound = self.signature.bind(*args, **{name: value for name, value in kwargs.items() if name in names})
        bound.apply_defaults()
        constants = {p.name: _plain(bound.arguments[p.name]) for p in self.params if p.is_constexpr}
        size = grid(bound.arguments) if callable(grid) else grid
        try:
            compiled = compile_and_run(self, *args, grid=grid, warmup=True, **kwargs)
        except RuntimeError as error:  # a fault of the compiler: the rest is worth knowing all the same
            launches[f"{self.__name__} {constants}"] = (self.__name__, constants, tuple(size), error)
            return None
        constants |= {name: getattr(compiled.metadata, name) for name in ("num_warps", "num_stages")}
        launches.setdefault(compiled.hash, (self.__name__, constants, tuple(size), compiled))
        return compiled

    config = triton.runtime.driver
    with (
        unittest.mock.patch.object(JITFunction, "run", run),
        unittest.mock.patch.object(config, "_active", _Driver(target)),
    ):
        noted: list[tuple] = []
        yield noted
        noted += launches.values()


# ------------------------------------------------------------------------------------------------ what is in a binary


def read(target: str, launches: list[tuple]) -> list[Binary]:
    """What was noted while compiling for ``target``, read; last what did not compile."""
    failed = [launch for launch in launches if isinstance(launch[3], Exception)]
    compiled = [launch for launch in launches if not isinstance(launch[3], Exception)]
    of_target = _read_nvidia if TARGETS[target].gpu.backend == "cuda" else _read_amd
    found = of_target(target, [launch[3] for launch in compiled])
    binaries = [_binary(target, launch, values) for launch, values in zip(compiled, found, strict=True)]
    return binaries + [Binary(target, kernel, constants, grid, error=str(e)) for kernel, constants, grid, e in failed]


def _binary(target: str, launch: tuple, found: dict[str, Any]) -> Binary:
    kernel, constants, grid, compiled = launch
    signature = "\n".join(map(str, compiled.src.signature.values()))
    types = tuple(re.findall(r"^(?:\*|tensordesc<)(\w+)", signature, re.MULTILINE))
    shared, ttir = compiled.metadata.shared, compiled.asm["ttir"]
    return Binary(target, kernel, constants, grid, types, shared=shared, ttir=ttir, **found)


def _read_nvidia(target: str, kernels: list[Any]) -> list[dict[str, Any]]:
    opcodes = _disassembled(target, [_machine_code(kernel.asm["cubin"]) for kernel in kernels])
    return [_nvidia(_resources(kernel.asm["cubin"]), found) for kernel, found in zip(kernels, opcodes, strict=True)]


def _nvidia(usage: dict[str, int], opcodes: Counter[str]) -> dict[str, Any]:
    local = sum(n for opcode, n in opcodes.items() if opcode.partition(".")[0] in ("LDL", "STL"))
    return {
        "registers": usage["REG"],
        "spilled": local + usage["STACK"] + usage["LOCAL"],
        "tensor_cores": _counted(opcodes, r"(HMMA|HGMMA|DMMA|IMMA|QGMMA|UTC\w*MMA)\b", lambda name: name),
        "loads": _counted(opcodes, r"((?:LDG|LDGSTS|UTMALDG)\b.*)", _nvidia_width),
        "copies": _counted(opcodes, r"((?:LDGSTS|UTMALDG)\b.*)", _nvidia_width),
        "stores": _counted(opcodes, r"((?:STG|UTMASTG)\b.*)", _nvidia_width),
    }


def _said(tool: str, *options: str, image: bytes) -> str:
    """What one of the tools that come with Triton prints about a file."""
    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        return subprocess.run([path, *options, file.name], check=True, capture_output=True, text=True).stdout


def _resources(cubin: bytes) -> dict[str, int]:
    usage = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _said("cuobjdump", "-res-usage", image=cubin))
    return {name: int(value) for name, value in usage}


def _machine_code(cubin: bytes) -> bytes:
    """The sections of code of an ELF file of 64 bits."""
    (table,), (size, number, of_names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<I20xQQ", cubin, table + i * size) for i in range(number)]  # name, offset, bytes
    names = headers[of_names][1]
    return b"".join(
        cubin[begin : begin + length] for name, begin, length in headers if cubin.startswith(b".text.", names + name)
    )


def _disassembled(target: str, codes: list[bytes]) -> list[Counter[str]]:
    """The instructions of each piece of code. All are one image: what takes the disassembler time is to start."""
    machine = target.replace("_", "").upper() + ("a" if int(target[3:]) >= 90 else "")
    text = _said("nvdisasm", "--binary", machine, image=b"".join(codes)) if codes else ""
    ends = list(itertools.accumulate(map(len, codes)))
    opcodes: list[Counter[str]] = [Counter() for _ in codes]
    line = r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
    for address, opcode in re.findall(line, text, re.MULTILINE):
        opcodes[bisect.bisect_right(ends, int(address, 16))][opcode] += 1
    return opcodes


def _nvidia_width(opcode: str) -> int:
    parts = opcode.split(".")
    if parts[0].startswith("UTMA"):  # a tile by the copy engine
        return 128
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((widths[part] for part in parts if part in widths), 32)


def _read_amd(target: str, kernels: list[Any]) -> list[dict[str, Any]]:
    return [_amd(kernel.asm["amdgcn"]) for kernel in kernels]


def _amd(text: str) -> dict[str, Any]:
    number = {name: int(value) for name, value in re.findall(r"^\s+(?:- )?\.(\w+): +(\d+)$", text, re.MULTILINE)}
    opcodes = Counter(re.findall(r"^\s+((?:v_mfma|global_|buffer_|flat_|scratch_)\w+)", text, re.MULTILINE))
    return {
        "registers": number["vgpr_count"],
        "spilled": number["vgpr_spill_count"] + number["private_segment_fixed_size"],  # scalars spill to registers
        "tensor_cores": _counted(opcodes, r"(v_mfma\w*)", lambda name: name),
        "loads": _counted(opcodes, r"((?:global|buffer|flat)_load_\w+)", _amd_width),
        "copies": Counter(),
        "stores": _counted(opcodes, r"((?:global|buffer|flat)_store_\w+)", _amd_width),
    }


def _amd_width(opcode: str) -> int:
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
    return next(width for name, width in widths.items() if name in opcode)


def _counted(opcodes: Counter[str], pattern: str, key: Callable[[str], Any]) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for opcode, count in opcodes.items():
        if match := re.match(pattern, opcode):
            total[key(match[1])] += count
    return total
