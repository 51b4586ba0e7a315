"""Whether every kernel compiled to what it should be: ``python -m widenet_kernels.triton.report`` prints it.

For each target, without its GPU: the launchers run at real sizes, and the binaries are read and held against rules. A
spilled register, too much shared memory, products beside the tensor cores or narrow loads cost a multiple of the time
and show in no test of results.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import re
import sys
import unittest.mock
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from widenet_kernels.routing import GATED
from widenet_kernels.triton.binaries import TARGETS, Binary, compiling, read
from widenet_kernels.triton.tiles import Problem, Tile, choose_tile, current_target

# ------------------------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    """The sizes of one model, in the alphabet of :mod:`widenet_kernels.routing`; C None is dropless."""

    T: int
    D: int
    F: int
    E: int
    K: int
    C: int | None
    activation: str
    dtype: torch.dtype
    bias: bool = False
    tf32: bool = False


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WIDENET = Case(50432, 768, 4096, 4, 2, 30259, "gelu", BF16, bias=True)
MIXTRAL = Case(8192, 4096, 14336, 8, 2, None, "swiglu", BF16)
FINE = Case(8192, 2048, 768, 128, 8, None, "swiglu", BF16)
CASES = (
    WIDENET,
    MIXTRAL,
    WIDENET._replace(dtype=FP32),
    WIDENET._replace(dtype=FP64, activation="relu"),
)
FUSED_CASES = (  # of moe_ffn alone
    FINE,
    MIXTRAL._replace(dtype=FP16),
    WIDENET._replace(activation="swiglu"),  # gated with a bias, what needs the most registers
    WIDENET._replace(activation="geglu"),
    WIDENET._replace(dtype=FP32, tf32=True),
    # decoding: a few rows an expert
    WIDENET._replace(T=64, C=30),
    MIXTRAL._replace(T=16),
)
TMA_TARGETS = ("sm_90", "sm_100", "sm_120")  # with an engine that copies what a tensor descriptor describes
ROUTERS = ((WIDENET.E, WIDENET.K), (FINE.E, FINE.K), (1024, 16))


class Tensors:
    """What the ops on rows take, without data."""

    def __init__(self, case: Case):
        rows = case.T * case.K if case.C is None else case.E * case.C
        width = 2 * case.F if case.activation in GATED else case.F

        def make(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        index = functools.partial(make, dtype=torch.int32)
        self.maps, self.places = (index(case.T, case.K), index(rows)), (index(case.E), index(case.E))
        self.x, self.rows = make(case.T, case.D), make(rows, case.D)
        self.z, self.hidden = make(rows, width), make(rows, case.F)
        self.weight = make(case.T, case.K, dtype=torch.promote_types(case.dtype, FP32))
        self.w1, self.w2 = make(case.E, case.D, width), make(case.E, case.F, case.D)
        self.b1 = make(case.E, width) if case.bias else None
        self.b2 = make(case.E, case.D) if case.bias else None


def stages(case: Case) -> None:
    """Launch every stage on its own, forward and backward."""
    from widenet_kernels.triton import combine, grouped_gemm, permute

    t = Tensors(case)
    permute.permute(t.x, *t.maps)
    permute.permute_backward(t.rows, t.maps[0])
    combine.combine(t.rows, t.weight, *t.maps)
    combine.combine_backward(t.x, t.rows, t.weight, *t.maps, True, True)
    for activation, grad in ((case.activation, t.hidden), ("", t.z)):
        grouped_gemm.grouped_gemm(t.rows, t.w1, t.b1, *t.places, activation, bool(activation))
        grouped_gemm.grouped_gemm_backward(grad, t.rows, t.w1, t.z, *t.places, activation, True, True, case.bias)


def fused(case: Case) -> None:
    """Launch moe_ffn, forward and backward."""
    from widenet_kernels.triton import moe

    t = Tensors(case)
    for save in (False, True):
        moe.moe_ffn(t.x, t.weight, *t.maps, *t.places, t.w1, t.b1, t.w2, t.b2, case.activation, save)
    saved = (t.x, t.x, t.weight, *t.maps, *t.places, t.z, t.w1, t.w2, t.b2, case.activation)
    moe.moe_ffn_backward(*saved, True, True, True, case.bias, True, case.bias)
    buffers = [None if p is None else torch.empty_like(p, dtype=FP32) for p in (t.w1, t.b1, t.w2, t.b2)]
    moe.moe_ffn_backward_accumulate(*saved, True, True, *buffers)


def described(case: Case) -> None:
    """Launch the products that gather nothing in their second form, by tensor descriptors."""
    from widenet_kernels.triton import grouped_gemm

    def choose(problem: Problem, target: str) -> Tile:
        return choose_tile(problem, target)._replace(described=True)

    t = Tensors(case)
    with unittest.mock.patch.object(grouped_gemm, "choose_tile", choose):
        grouped_gemm.grouped_gemm(t.rows, t.w1, t.b1, *t.places, case.activation, True)
        grouped_gemm.grouped_gemm(t.hidden, t.w2, t.b2, *t.places, "", False)
        grouped_gemm.grouped_gemm_backward(t.z, t.rows, t.w1, t.z, *t.places, "", True, False, False)


def router(num_experts: int, k: int, dtype: torch.dtype, num_tokens: int = 50432, dim: int = 768) -> None:
    """Launch gate and route, forward and backward; route ends with a plan."""
    from widenet_kernels.triton import gate, route

    math_dtype = torch.promote_types(dtype, FP32)

    def make(*shape: int, dtype: torch.dtype = math_dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, router_weight = make(num_tokens, dim, dtype=dtype), make(num_experts, dim, dtype=dtype)
    logits, noise = make(num_tokens, num_experts, dtype=dtype), make(num_tokens, num_experts)
    weight, probs, index = make(num_tokens, k), make(num_tokens, num_experts), make(num_tokens, k, dtype=torch.int32)
    mask = make(num_tokens, dtype=torch.bool)

    gate.topk_gate(logits, k, None, False)
    gate.topk_gate(logits, k, noise, True)
    gate.topk_gate_backward(weight, probs, weight, index, probs, False)
    gate.topk_gate_backward(weight, None, weight, index, probs, True)
    route.route(x, router_weight, k, num_tokens * k // num_experts, None, False, "choice", None)
    route.route(x, router_weight, k, None, noise, True, "choice", mask)
    route.route_backward(weight, probs, None, x, router_weight, weight, index, probs, False, True, True)


def plans(num_experts: int, k: int, num_tokens: int = 50432) -> None:
    """Launch plans of every priority, and of another type of index."""
    from widenet_kernels.triton import plan

    index = torch.empty(num_tokens, k, dtype=torch.int32, device="meta")
    score, capacity = torch.empty(num_tokens, device="meta"), num_tokens * k // num_experts
    for priority in ("choice", "token", "score"):
        plan.plan_routing(index, num_experts, capacity, priority, score if priority == "score" else None)
    plan.plan_routing(index.to(torch.int64), num_experts, None, "choice", None)


def launch_all() -> None:
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        for case in CASES + FUSED_CASES:
            torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
            fused(case)
            if case in CASES:
                stages(case)
        if current_target() in TMA_TARGETS:
            for case in (WIDENET, MIXTRAL):
                described(case)
        plans(WIDENET.E, WIDENET.K)
        for num_experts, k in ROUTERS:
            router(num_experts, k, BF16)
        for dtype in (FP32, FP64):
            router(WIDENET.E, WIDENET.K, dtype)
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


def compile_all(target: str, kernel: str = "") -> list[Binary]:
    """What all launches compile to on a target, of the kernels with ``kernel`` in their name."""
    with compiling(target, lambda name: kernel in name) as launches:
        launch_all()
    return read(target, launches)


def compile_for(targets: list[str], kernel: str = "") -> Iterator[list[Binary]]:
    """The same for several targets at a time, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        yield from pool.map(compile_all, targets, [kernel] * len(targets))


# ------------------------------------------------------------------------------------------------------------- rules


def broken_rules(binary: Binary) -> list[str]:
    """In words; none if the binary is as it should be."""
    if binary.error:
        return [f"does not compile: {binary.error}"]
    rules = (spills, shared_memory, tensor_cores, wide_loads, wide_copies, wide_stores, grid_size)
    return [broken for rule in rules for broken in rule(binary)]


def spills(binary: Binary) -> list[str]:
    return [f"registers spill to memory ({binary.spilled})"] if binary.spilled else []


def shared_memory(binary: Binary) -> list[str]:
    limit = TARGETS[binary.target].shared_limit
    return [f"{binary.shared} bytes of shared memory, of {limit}"] if binary.shared > limit else []


def grid_size(binary: Binary) -> list[str]:
    """CUDA's limits: 2^31 - 1 programs in x, 65,535 in y and z."""
    x, *others = binary.grid
    return [f"a grid of {binary.grid}"] if x >= 2**31 or any(size > 65_535 for size in others) else []


class Product(NamedTuple):
    """A ``tl.dot``."""

    rows: int
    operands: str  # such as bf16
    precision: str


def products(binary: Binary) -> list[Product]:
    pattern = r"= tt\.dot .*? : tensor<(\d+)x\d+x(\w+)> \* "
    return [
        Product(int(found[1]), found[2], "tf32" if "inputPrecision = tf32 " in found[0] else "ieee")
        for found in re.finditer(pattern, binary.ttir)
    ]


def tensor_cores(binary: Binary) -> list[str]:
    """Every kind of product that the tensor cores can do is there; fp32 in full and fp64 need not be."""
    target = TARGETS[binary.target]
    for product in products(binary):
        if product.operands in ("bf16", "f16") or product.precision == "tf32":
            wanted = target.large_product if product.rows >= 64 else target.small_product
            if not any(re.fullmatch(wanted, name) for name in binary.tensor_cores):
                return [f"no {wanted} for a product of {product.rows} rows in {product.operands}"]
    return []


def expected(binary: Binary, operation: str, most: int = 128) -> Counter[int]:
    """The instructions by width that "load" or "store" every tile of floats once, each thread its share of a tile.

    Triton knows of a stride whether it is a multiple of 16: rows of E logits are so at some E alone.
    """
    tiles = re.findall(rf"tt\.{operation} .*?: tensor<(\d+)x(\d+)x!tt\.ptr<b?f(\d+)>>", binary.ttir)
    total: Counter[int] = Counter()
    for rows, columns, bits in (tuple(map(int, tile)) for tile in tiles):
        if columns == binary.constants.get("E_PADDED") and binary.constants["E"] % 16:
            continue
        share = max(bits, bits * rows * columns // binary.threads)
        width = min(most, bits * columns, share)
        total[width] += share // width
    return total


def lacking(kind: str, expected: Counter[int], found: Counter[int]) -> list[str]:
    for width in sorted(expected, reverse=True):
        wanted = sum(size * n for size, n in expected.items() if size >= width)
        total = sum(size * n for size, n in found.items() if size >= width)
        if total < wanted:
            return [f"{kind} of {width} bits or more move {total} bits a thread, expected {wanted}"]
    return []


def operand_width(binary: Binary) -> int:
    """An operand that a product wants transposed reaches shared memory by the element where that is 32 or 64 bits."""
    alone = [p for p in products(binary) if p.operands == "f64" or (p.operands == "f32" and p.precision == "tf32")]
    return min((int(product.operands[1:]) for product in alone), default=128)


def wide_loads(binary: Binary) -> list[str]:
    return lacking("loads", expected(binary, "load", operand_width(binary)), binary.loads)


def wide_copies(binary: Binary) -> list[str]:
    """Operands come to shared memory in wide pieces; a few narrow ones fetch indices."""
    possible = min(expected(binary, "load", operand_width(binary)), default=0)
    total = sum(width * n for width, n in binary.copies.items())
    narrow = sum(width * n for width, n in binary.copies.items() if width < possible)
    return [f"{100 * narrow // total} % of operands copied by less than {possible} bits"] if narrow > total / 4 else []


def wide_stores(binary: Binary) -> list[str]:
    """AMD's accumulators hold 4 columns each, 64 bits of a 16-bit type; those of fp32 products in full perhaps one."""
    most = 128
    if TARGETS[binary.target].gpu.backend == "hip":
        most = 32 if any(p.operands == "f32" and p.precision == "ieee" for p in products(binary)) else 64
    return lacking("stores", expected(binary, "store", most), binary.stores)


# ------------------------------------------------------------------------------------------------------------- table


def config(binary: Binary) -> str:
    """Such as "128x256x64 w8 s3 CLEAR gelu"."""
    constants = binary.constants
    blocks = "x".join(str(value) for name, value in constants.items() if name.startswith("BLOCK"))
    words = [name for name, value in constants.items() if value is True]
    words += [value for value in constants.values() if isinstance(value, str) and value]
    return " ".join(
        [blocks or "-", f"w{constants.get('num_warps', '?')}", f"s{constants.get('num_stages', '?')}", *words]
    )


def row(binary: Binary) -> tuple[str, ...]:
    def listed(counts: Counter) -> str:
        return " ".join(f"{name}:{n}" for name, n in sorted(counts.items(), reverse=True)) or "-"

    types = [kind for kind in dict.fromkeys(binary.types) if kind.startswith(("bf", "fp"))]
    return (
        binary.target,
        binary.kernel,
        ",".join(types) or "-",
        config(binary),
        str(binary.registers),
        str(binary.spilled),
        str(binary.shared),
        listed(binary.tensor_cores),
        listed(binary.loads),
        listed(binary.stores),
    )


HEAD = ("target", "kernel", "types", "tile", "regs", "spilled", "shared", "tensor cores", "loads", "stores")


def print_table(rows: list[tuple[str, ...]]) -> None:
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, wide, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m widenet_kernels.triton.report", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; all without it")
    parser.add_argument("--kernel", default="", help="only the kernels with this in their name")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("report: under TRITON_INTERPRET=1 nothing is compiled; unset it", file=sys.stderr)
        return 2
    binaries = [b for found in compile_for(options.target or list(TARGETS), options.kernel) for b in found]
    print_table([HEAD, *sorted(map(row, binaries))])
    broken = [(binary, words) for binary in binaries for words in broken_rules(binary)]
    print(f"\n{len(binaries)} binaries, {len(broken)} broken rules")
    for binary, words in broken:
        print("  ", binary.target, binary.kernel, row(binary)[2], config(binary), "-", words)
    return 1 if broken or not binaries else 0


if __name__ == "__main__":
    sys.exit(main())
