"""What the kernels share: how they find their rows, multiply and round, and how large their tiles are.

The alphabet is that of :mod:`widenet_kernels.routing`. Addresses are int64 throughout: an index is widened before it
meets a stride.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The interpreter computes with the bits of bf16 as if they were integers: there everything is widened first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# ---------------------------------------------------------------------------------------------------- in the kernels


@triton.jit
def find_rows(slot, expert_begin_ptr, expert_count_ptr, num_rows, E: tl.constexpr, BLOCK: tl.constexpr):
    """The expert of a slot, the slot's first row, where the rows the expert serves end, and where its room ends.

    A slot is BLOCK rows of one expert. Expert e owns the slots from ``begin[e] // BLOCK + e`` on: that leaves each
    expert enough of them whatever the counts are, so that ``num_rows // BLOCK + E`` slots cover all rows and the grid
    follows from shapes alone. Room that no row uses begins at ``served`` and ends at ``room``.
    """
    experts = tl.arange(0, triton.next_power_of_2(E))
    begins = tl.maximum(tl.load(expert_begin_ptr + experts, mask=experts < E, other=0), 0)
    owned = (begins // BLOCK + experts <= slot) & (experts < E)
    expert = tl.maximum(tl.sum(owned.to(tl.int32), axis=0) - 1, 0)
    begin = tl.maximum(tl.load(expert_begin_ptr + expert), 0)
    room = tl.load(expert_begin_ptr + expert + 1, mask=expert + 1 < E, other=num_rows)
    room = tl.minimum(room, num_rows).to(tl.int64)
    count = tl.load(expert_count_ptr + expert)
    first_row = begin.to(tl.int64) + (slot - (begin // BLOCK + expert)).to(tl.int64) * BLOCK
    served = tl.minimum(begin.to(tl.int64) + count, room)
    return expert.to(tl.int64), first_row, served, room


@triton.jit
def load_row_weight(weight_ptr, stride_t, stride_k, row_choice_ptr, rows, served, num_choices, K: tl.constexpr):
    """The flat choice of each row (-1: none) and its gate weight (0 where there is none)."""
    choice = tl.load(row_choice_ptr + rows, mask=rows < served, other=-1)
    valid = (choice >= 0) & (choice < num_choices)
    token = (choice // K).to(tl.int64)
    weight_ptrs = weight_ptr + token * stride_t + (choice % K).to(tl.int64) * stride_k
    return tl.where(valid, choice, -1), tl.load(weight_ptrs, mask=valid, other=0.0)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b on the tensor cores; fp32 operands in tf32 or in full, as PRECISION says."""
    if INTERPRETED:
        a, b = a.to(total.dtype), b.to(total.dtype)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def convert(tile, dtype: tl.constexpr):
    """To another float type; between bf16 and fp64 by way of fp32, the only one that the interpreter takes bf16 to."""
    if tile.dtype == tl.bfloat16 or dtype == tl.bfloat16:
        tile = tile.to(tl.float32)
    return tile.to(dtype)


@triton.jit
def halves(tile):
    """The left and the right half of the columns: what follows a product needs fewer registers a half at a time."""
    split = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(split, (0, 2, 1)))


@triton.jit
def place(pid, num_slots, num_columns, GROUP: tl.constexpr):
    """Slot and column tile of a program: GROUP slots share the columns' weights while these are in the cache."""
    per_group = GROUP * num_columns
    first = pid // per_group * GROUP
    size = tl.minimum(num_slots - first, GROUP)
    return first + pid % per_group % size, pid % per_group // size


# ------------------------------------------------------------------------------------------------------ on the host


class Tile(NamedTuple):
    """The sizes of one program of a GEMM: BLOCK_M by BLOCK_N results, BLOCK_K of the summed dimension at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8  # row tiles that go through the columns together
    described: bool = False  # operands by tensor descriptors (TMA), where the strides allow it
    registers: int = 0  # of a thread at most, so that two blocks share a multiprocessor; 0: as the compiler likes

    def __str__(self) -> str:
        text = f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages} g{self.group}"
        return text + " described" * self.described + f" r{self.registers}" * (self.registers > 0)

    def launch(self) -> dict[str, int]:
        """As keywords of a kernel."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return limit | {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP": self.group,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


class Problem(NamedTuple):
    """What the choice of a tile depends on."""

    form: str  # one of FORMS
    dtype: torch.dtype
    m: int  # rows of one expert's result, were they shared out evenly
    n: int  # columns of the result
    k: int  # the summed dimension
    precision: str = "ieee"  # "tf32": fp32 operands on the tensor cores


# Rows times weight, without an activation behind it, with one, and with a gated one; the weight gradient.
FORMS = ("rows", "activated", "glu", "weight")

# For 16-bit operands and results of at least 128 x 128. Those of sm_90 were measured (benchmarks/sweeps.py), the others
# set by reading binaries.
_HALF = {
    "sm_80": {
        "rows": Tile(128, 128, 32, 8, 4),
        "activated": Tile(128, 128, 32, 8, 4),
        "glu": Tile(128, 64, 32, 8, 3),
        "weight": Tile(128, 128, 32, 8, 4),
    },
    "sm_90": {
        "rows": Tile(128, 256, 64, 8, 4, described=True),
        "activated": Tile(128, 128, 64, 8, 3, described=True, registers=128),
        "glu": Tile(128, 128, 64, 8, 4, described=True),
        "weight": Tile(128, 256, 64, 8, 4, described=True),
    },
    "sm_100": {
        "rows": Tile(128, 256, 64, 8, 3),
        "activated": Tile(128, 256, 64, 8, 3),
        "glu": Tile(128, 128, 32, 8, 6),
        "weight": Tile(128, 256, 64, 8, 3),
    },
    "gfx942": {
        "rows": Tile(128, 128, 64, 8, 2),
        "activated": Tile(128, 128, 64, 8, 2),
        "glu": Tile(128, 64, 64, 8, 2),
        "weight": Tile(128, 128, 64, 8, 2),
    },
}
_TF32 = Tile(128, 64, 32, 8, 3)
_PLAIN = {32: Tile(64, 64, 32, 4, 2), 64: Tile(64, 32, 16, 4, 2)}  # no tensor cores: fp32 in full, fp64


def family(target: str) -> str:
    """The target whose tiles serve this one: 99 KiB of shared memory (sm_86, sm_89, sm_120) take those of sm_80."""
    if target.startswith("sm_"):
        capability = int(target[3:])
        return "sm_90" if capability == 90 else "sm_100" if 100 <= capability < 120 else "sm_80"
    return "gfx942"


@functools.lru_cache(1024)
def choose_tile(problem: Problem, target: str) -> Tile:
    """The tile for a problem on a target such as "sm_90": a pure function, so that nothing is tuned while training."""
    if target == "interpreter":  # small, for several tiles in every test; but many programs take minutes
        block_m, block_n, block_k = (512 if size > 2048 else 32 for size in (problem.m, problem.n, problem.k))
        return Tile(block_m, block_n, block_k, 4, 1)
    if problem.dtype.itemsize == 2:
        tile = _HALF[family(target)][problem.form]
    else:
        tile = _TF32 if problem.precision == "tf32" else _PLAIN[problem.dtype.itemsize * 8]
    return _shrunk(tile, problem)


def _shrunk(tile: Tile, problem: Problem) -> Tile:
    """Not much larger than the result: few rows an expert, as in decoding, would waste most of a tile."""
    block_m, block_n = tile.block_m, tile.block_n
    while block_m > 16 and block_m >= 2 * problem.m:
        block_m //= 2
    while block_n > 32 and block_n >= 2 * problem.n:
        block_n //= 2
    smaller = block_m * block_n < tile.block_m * tile.block_n // 4
    whole = (block_m, block_n) == (tile.block_m, tile.block_n)  # to make descriptors takes the host 60 us
    return tile._replace(
        block_m=block_m,
        block_n=block_n,
        num_warps=4 if smaller else tile.num_warps,
        described=tile.described and whole,
        registers=tile.registers if whole else 0,
    )


def movement_blocks(dim: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns of a program that moves rows: 8 KiB, 4 loads of 16 bytes a thread.

    The columns divide D where a power of two of a useful size does, so that no thread idles at D = 768.
    """
    factor = dim & -dim
    columns = min(factor if factor >= 128 else triton.next_power_of_2(max(dim, 1)), 1024)
    return 8192 // itemsize // columns, columns


def current_target() -> str:
    """Such as "sm_90" or "gfx942"; "interpreter" where Triton runs on the CPU."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


def sum_dtype(*tensors: Tensor | None) -> tl.dtype:
    """fp32, or fp64 if anything is fp64: the precision of sums and activations."""
    is_wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return tl.float64 if is_wide else tl.float32


def input_precision(dtype: torch.dtype) -> str:
    """How fp32 operands enter the tensor cores: as torch's own products do on this machine."""
    asked = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if asked and current_target().startswith(("sm_", "gfx942")) else "ieee"  # who has it
