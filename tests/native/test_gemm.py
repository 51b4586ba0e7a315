"""The CPU's own GEMM at every level of vector instructions, against torch and against the same product in float64."""

import native
import pytest
import torch

from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_as_good_as, assert_same_bits

pytestmark = pytest.mark.parametrize("kernels", native.GEMM_LEVELS, indirect=True)

# M, K, N: single elements; a tile of 6 or 12 rows and 16 or 32 columns, one less, one more; pieces of 192 of K, of bf16
# 512 or, in pairs, 1,024; blocks of 256 columns, or of 128 where rows are few; more rows than are packed at a time
# (3,072), more of K than is packed at a time beside them. Where both lie along K, dot products of up to 40 or 72 rows,
# of bf16 up to 12 or 16, or 32 in pairs: a tile of 2 or 4 rows and 4 or 6 columns, one less, one more; pieces of 1,024
# of K, or of 2,048 of bf16.
SIZES = (
    (1, 1, 1),
    (2, 3, 5),
    (6, 192, 16),
    (11, 191, 31),
    (13, 193, 33),
    (64, 30, 256),
    (25, 600, 257),
    (3073, 9, 17),
    (700, 1030, 40),
    (25, 1051, 70),
    (3, 16, 6),
    (5, 2049, 11),
    (12, 70, 13),
    (16, 70, 13),
    (17, 70, 13),
    (32, 70, 13),
    (33, 70, 13),
    (40, 100, 15),
    (41, 100, 15),
    (72, 100, 15),
    (73, 100, 15),
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def of_sizes(*sizes):
    return pytest.mark.parametrize("size", sizes, ids=lambda size: "x".join(map(str, size)))


of_size = of_sizes(*SIZES)
of_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype)[6:])


def operands(size, dtype, transpose_a=False, transpose_b=False):
    """a and b as the kernel takes them, and views of them that are [M, K] and [K, N]."""
    m, k, n = size
    a = inputs.normal(*((k, m) if transpose_a else (m, k)), seed=1, dtype=dtype)
    b = inputs.normal(*((n, k) if transpose_b else (k, n)), seed=2, dtype=dtype)
    return a, b, a.t() if transpose_a else a, b.t() if transpose_b else b


@pytest.mark.parametrize("transpose_b", [False, True], ids=["b", "bt"])
@pytest.mark.parametrize("transpose_a", [False, True], ids=["a", "at"])
@of_dtype
@of_size
def test_product(kernels, size, dtype, transpose_a, transpose_b):
    a, b, a_view, b_view = operands(size, dtype, transpose_a, transpose_b)
    out = kernels.gemm(a, b, transpose_a=transpose_a, transpose_b=transpose_b)
    assert_as_good_as(out, a_view @ b_view, a_view.double() @ b_view.double(), "product")


@pytest.mark.parametrize("transpose_b", [False, True], ids=["b", "bt"])
@of_dtype
@of_size
def test_accumulates_in_float(kernels, size, dtype, transpose_b):
    a, b, _, b_view = operands(size, dtype, transpose_b=transpose_b)
    initial = inputs.normal(size[0], size[2], seed=3)
    out = kernels.gemm(a, b, initial=initial, transpose_b=transpose_b)
    plain = initial + a.float() @ b_view.float()
    assert_as_good_as(out, plain, initial.double() + a.double() @ b_view.double(), "initial + product")


@pytest.mark.parametrize("transpose_b", [False, True], ids=["b", "bt"])
@of_dtype
@of_sizes((100, 1024, 256), (25, 1024, 300), (100, 1030, 520))
def test_whole_blocks_of_b(kernels, size, dtype, transpose_b):
    """As much as is ever packed of b at a time: with one thread parts are as wide as they can be."""
    kernels.module.set_num_threads(1)
    a, b, _, b_view = operands(size, dtype, transpose_b=transpose_b)
    out = kernels.gemm(a, b, transpose_b=transpose_b)
    assert_as_good_as(out, a @ b_view, a.double() @ b_view.double(), "product")


@pytest.mark.parametrize("transpose_b", [False, True], ids=["b", "bt"])
@of_dtype
@of_sizes((25, 600, 257), (700, 1030, 40), (800, 300, 520), (5, 40, 16))
def test_same_bits_at_every_number_of_threads(kernels, size, dtype, transpose_b):
    a, b, *_ = operands(size, dtype, transpose_b=transpose_b)
    results = []
    for threads in (1, 2, 3, 4, 7):
        kernels.module.set_num_threads(threads)
        results.append(kernels.gemm(a, b, transpose_b=transpose_b))
    kernels.module.set_num_threads(1)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("transpose_b", [False, True], ids=["b", "bt"])
@of_dtype
def test_nan_stays_in_its_row_and_column(kernels, dtype, transpose_b):
    """Tiles at the edges are filled up with zeros, and neighbours share registers: nothing leaks."""
    a, b, _, b_view = operands((20, 300, 50), dtype, transpose_b=transpose_b)
    clean = kernels.gemm(a, b, transpose_b=transpose_b)
    a[19, 7], b_view[299, 49] = float("nan"), float("inf")
    dirty = kernels.gemm(a, b, transpose_b=transpose_b)
    assert_same_bits(dirty[:19, :49], clean[:19, :49])
    assert dirty[19].isnan().all()
    assert not dirty[:, 49].isfinite().any()


def test_sums_become_the_nearest_half(kernels):
    """Each half times numbers that leave most products between two halves, below the normal ones or beyond the last."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).view(-1, 1)
    factors = torch.linspace(0.3, 3, 17, dtype=torch.float16).view(1, -1)
    out, expected = kernels.gemm(halves, factors), (halves.float() * factors.float()).half()
    assert torch.equal(out.isnan(), expected.isnan())
    assert_same_bits(out.nan_to_num(nan=0), expected.nan_to_num(nan=0))


@of_sizes((0, 3, 4), (3, 4, 0))
def test_nothing_to_do(kernels, size):
    a, b, *_ = operands(size, torch.float32)
    assert kernels.gemm(a, b).shape == (size[0], size[2])
