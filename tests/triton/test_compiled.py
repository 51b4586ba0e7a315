"""Every kernel, compiled for every target without its GPU: the binaries obey the rules, and the rules can fail."""

import dataclasses

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from widenet_kernels.triton import report, tiles  # noqa: E402
from widenet_kernels.triton.binaries import TARGETS, compiling, read  # noqa: E402
from widenet_kernels.triton.tiles import Problem, Tile, choose_tile, family  # noqa: E402

KERNELS = {  # those of every launcher; one that is new is asked for here
    "_activation_backward_kernel",
    "_combine_backward_kernel",
    "_count_kernel",
    "_gather_sum_kernel",
    "_multiply_kernel",
    "_output_backward_kernel",
    "_permute_kernel",
    "_place_kernel",
    "_route_backward_kernel",
    "_route_kernel",
    "_router_weight_gradient_kernel",
    "_sum_parts_kernel",
    "_sum_slots_kernel",
    "_topk_gate_backward_kernel",
    "_topk_gate_kernel",
    "_weight_gradient_kernel",
}


def tile_of(binary):
    """How its products are cut, whatever else its tile says."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "GROUP")
    return Tile(*(binary.constants[name] for name in names)) if "GROUP" in binary.constants else None


def plain(tile):
    return tile._replace(described=False, registers=0)


@pytest.mark.parametrize("target", TARGETS)
class TestBinaries:
    def test_rules(self, binaries, target):
        broken = [
            f"{b.kernel} {report.config(b)}: {words}" for b in binaries[target] for words in report.broken_rules(b)
        ]
        assert not broken, "\n".join(broken)

    def test_every_kernel_was_compiled(self, binaries, target):
        assert {binary.kernel for binary in binaries[target]} == KERNELS

    def test_every_default_tile_was_compiled(self, binaries, target):
        compiled = {tile_of(binary) for binary in binaries[target]}
        defaults = {*tiles._HALF[family(target)].values(), tiles._TF32, *tiles._PLAIN.values()}
        assert set(map(plain, defaults)) <= compiled

    def test_described_operands_come_by_the_copy_engine(self, binaries, target):
        described = [binary for binary in binaries[target] if binary.constants.get("DESCRIBED")]
        forms = {"kn", "nk"} if target in report.TMA_TARGETS else set()
        assert {binary.constants["DESCRIBED"] for binary in described} == forms
        assert all(binary.copies and set(binary.copies) == {128} for binary in described)

    def test_shrunk_tiles_were_compiled(self, binaries, target):
        assert {16, 32} <= {tile.block_m for tile in map(tile_of, binaries[target]) if tile is not None}

    def test_tensor_cores_are_counted(self, binaries, target):
        products = [binary for binary in binaries[target] if "_multiply_kernel" in binary.kernel]
        assert any("bf16" in b.types and any(b.tensor_cores.values()) for b in products)
        assert {kind for b in products for kind in b.types} >= {"bf16", "fp16", "fp32", "fp64"}


# -------------------------------------------------------------------------------------------------- rules that can fail


@triton.jit
def spilling_kernel(x_ptr, out_ptr, N: tl.constexpr):
    """A whole matrix in the registers of one warp."""
    offset = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offset)
    tl.store(out_ptr + offset, tl.exp(x) * tl.sum(x, axis=0)[None, :] + tl.max(x, axis=1)[:, None])


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, stride, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for first in range(0, stride, K):
        a = tl.load(a_ptr + row * stride + first + k[None, :])
        b = tl.load(b_ptr + (first + k[:, None]) * stride + column)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out_ptr + row * stride + column, total)


@triton.jit
def sum_of_products_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    """What a product beside the tensor cores looks like."""
    row, column = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    total = tl.zeros((M, N), tl.float32)
    for k in range(N):
        total += tl.load(a_ptr + row * N + k).to(tl.float32) * tl.load(b_ptr + k * N + column).to(tl.float32)
    tl.store(out_ptr + row * N + column, total)


@triton.jit
def copy_kernel(x_ptr, out_ptr, stride, N: tl.constexpr):
    offset = tl.arange(0, N)[:, None] * stride + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offset, tl.load(x_ptr + offset))


def compiled(target, kernel, *arguments, **constants):
    with compiling(target) as launches:
        kernel[(1,)](*arguments, **constants)
    (binary,) = read(target, launches)
    return binary


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def product(target, stride=512, **constants):
    a = empty(256, 512, dtype=torch.bfloat16)
    return compiled(target, product_kernel, a, a, empty(256, 512), stride, **constants)


@pytest.mark.parametrize("target", TARGETS)
class TestRules:
    def test_spilling_is_reported(self, target):
        size = 256 if target.startswith("gfx") else 128  # 64 lanes of 512 registers, or 32 of 255
        binary = compiled(target, spilling_kernel, empty(size, size), empty(size, size), N=size, num_warps=1)
        assert binary.spilled
        assert "spill" in report.spills(binary)[0]
        assert report.broken_rules(binary)

    def test_a_plain_product_obeys(self, target):
        binary = product(target, M=128, N=128, K=32, num_warps=8, num_stages=3)
        assert report.broken_rules(binary) == []
        assert report.products(binary) == [report.Product(128, "bf16", "ieee")]

    def test_too_much_shared_memory_is_reported(self, target):
        binary = product(target, M=128, N=128, K=128, num_warps=8, num_stages=5)
        assert "shared" in report.shared_memory(binary)[0]

    def test_a_product_without_tensor_cores_is_reported(self, target):
        """The instructions of sums, held against a form that asks for a product."""
        a = empty(128, 128, dtype=torch.bfloat16)
        sums = compiled(target, sum_of_products_kernel, a, a, empty(128, 128), M=128, N=128, num_warps=8)
        assert not sums.tensor_cores
        asked = product(target, M=128, N=128, K=32, num_warps=8, num_stages=3)
        assert report.tensor_cores(asked) == []
        assert "product" in report.tensor_cores(dataclasses.replace(asked, tensor_cores=sums.tensor_cores))[0]

    def test_narrow_loads_and_stores_are_reported(self, target):
        wide = compiled(target, copy_kernel, empty(64, 64), empty(64, 64), 64, N=64)
        narrow = compiled(target, copy_kernel, empty(64, 63), empty(64, 63), 63, N=64)
        assert report.broken_rules(wide) == []
        broken = report.wide_loads(narrow) + report.wide_stores(narrow)
        assert [words.split()[0] for words in broken] == ["loads", "stores"]

    def test_a_grid_that_cuda_refuses_is_reported(self, target):
        binary = compiled(target, copy_kernel, empty(64, 64), empty(64, 64), 64, N=64)
        assert report.grid_size(dataclasses.replace(binary, grid=(2**31 - 1, 65_535))) == []
        assert report.grid_size(dataclasses.replace(binary, grid=(2**31,)))
        assert report.grid_size(dataclasses.replace(binary, grid=(1, 65_536)))


def test_narrow_operands_are_reported():
    """Rows that start anywhere: what an asynchronous copy may bring at a time is 4 bytes at most."""
    binary = product("sm_90", stride=514, M=128, N=128, K=32, num_warps=8, num_stages=3)
    assert report.wide_loads(binary)


def test_a_compiler_that_fails_is_reported(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr("triton.runtime.jit.JITFunction._do_compile", fail)
    binary = compiled("sm_90", copy_kernel, empty(48, 48), empty(48, 48), 48, N=16)
    assert report.broken_rules(binary) == ["does not compile: PassManager::run failed"]
    assert report.row(binary)


def test_the_driver_and_triton_are_left_as_they_were():
    from triton.runtime.jit import JITFunction

    run, active = JITFunction.run, triton.runtime.driver._active
    with compiling("sm_90"):
        assert tiles.current_target() == "sm_90"
    with pytest.raises(ZeroDivisionError), compiling("sm_90"):
        raise ZeroDivisionError
    assert JITFunction.run is run
    assert triton.runtime.driver._active is active


def test_the_report_prints_a_table_and_says_what_is_broken(capfd, monkeypatch):
    arguments = ["--target", "sm_90", "--kernel", "_permute_kernel"]
    assert report.main(arguments) == 0
    head, *lines = capfd.readouterr().out.splitlines()
    assert head.split()[:3] == ["target", "kernel", "types"]
    assert lines[0].split()[:2] == ["sm_90", "_permute_kernel"]
    assert lines[-1].endswith("0 broken rules")

    monkeypatch.setattr(report, "broken_rules", lambda binary: ["too slow"])
    assert report.main(arguments) == 1
    assert "too slow" in capfd.readouterr().out
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert report.main(arguments) == 2
    assert "TRITON_INTERPRET" in capfd.readouterr().err


def test_a_report_on_no_kernel_is_a_failure(capfd):
    assert report.main(["--target", "sm_90", "--kernel", "no such kernel"]) == 1


# ----------------------------------------------------------------------------------------------------------- the tiles

LARGE = {form: Problem(form, torch.bfloat16, 25_000, 4096, 4096) for form in tiles.FORMS}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_defaults(target):
    for form, problem in LARGE.items():
        assert choose_tile(problem, target) == tiles._HALF[target][form]
        assert choose_tile(problem._replace(dtype=torch.float16), target) == tiles._HALF[target][form]


@pytest.mark.parametrize(
    ("target", "same"),
    [("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_120", "sm_80"), ("sm_121", "sm_80"), ("sm_103", "sm_100")],
)
def test_other_gpus_take_the_tiles_of_a_relative(target, same):
    assert [choose_tile(p, target) for p in LARGE.values()] == [choose_tile(p, same) for p in LARGE.values()]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("form", tiles.FORMS)
def test_small_problems_get_small_tiles(target, dtype, form):
    large = choose_tile(Problem(form, dtype, 25_000, 4096, 4096), target)
    for m in (1, 4, 16, 17, 33, 64, 100):
        tile = choose_tile(Problem(form, dtype, m, 4096, 4096), target)
        assert tile.block_m <= max(16, 2 * m)
        assert tile.block_m >= min(large.block_m, m / 2)
        assert (tile.block_n, tile.block_k) == (large.block_n, large.block_k)
    narrow = choose_tile(Problem(form, dtype, 25_000, 16, 4096), target)
    assert narrow.block_n == min(large.block_n, 32)
    tiny = choose_tile(Problem(form, dtype, 0, 0, 0), target)
    assert tiny.block_m >= 16
    assert tiny.num_warps <= large.num_warps


@pytest.mark.parametrize("target", [*TARGETS, "sm_86", "sm_89"])
def test_operands_fit_shared_memory(target):
    """What the pipeline holds at a time: num_stages tiles of each operand, two of the second when gated."""
    limit = TARGETS[target].shared_limit if target in TARGETS else 99 * 1024
    for form, problem in LARGE.items():
        for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float64, "ieee")):
            tile = choose_tile(problem._replace(dtype=dtype, precision=precision), target)
            columns = tile.block_m + tile.block_n * (2 if form == "glu" else 1)
            stages = tile.num_stages - 1 if target == "gfx942" else tile.num_stages  # AMD: one is in registers
            assert columns * tile.block_k * dtype.itemsize * stages <= limit, (form, tile)


def test_the_interpreter_has_tiles_of_two_sizes():
    """Small ones, for several in every test; large ones where many programs would take minutes."""
    assert choose_tile(Problem("rows", torch.float32, 300, 48, 2049), "interpreter")[:3] == (32, 32, 512)


@pytest.mark.parametrize(
    ("target", "precision"),
    [("sm_80", "tf32"), ("sm_120", "tf32"), ("gfx942", "tf32"), ("gfx950", "ieee"), ("gfx90a", "ieee")],
)
def test_tf32_where_the_tensor_cores_have_it(target, precision, monkeypatch):
    monkeypatch.setattr(tiles, "current_target", lambda: target)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert tiles.input_precision(torch.float32) == precision
        assert tiles.input_precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
