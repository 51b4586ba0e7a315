"""The gelu of 16-bit results, which is not erf's."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from widenet_kernels.triton.activation import short_normal_cdf  # noqa: E402

pytestmark = pytest.mark.interpreted


@triton.jit
def normal_cdf_kernel(z_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + offset, mask=offset < size, other=0.0)
    tl.store(out_ptr + offset, short_normal_cdf(z), mask=offset < size)


def normal_cdf(z):
    out = torch.empty_like(z)
    normal_cdf_kernel[(1,)](z, out, z.numel(), BLOCK=triton.next_power_of_2(z.numel()))
    return out.double()


def test_as_near_as_it_says():
    """Below 0 it is the tail itself, relative to which it is good; above, 1 minus that."""
    z = torch.linspace(-8, 8, 40_001)
    exact = 0.5 * torch.erfc(-z.double() * 0.5**0.5)
    error = (normal_cdf(z) - exact).abs()
    assert (error / exact)[(z >= -7) & (z < 0)].max() < 1.3e-5
    assert (error / exact)[z < 0].max() < 2e-3
    assert error[z >= 0].max() < 0.6e-5


def test_falls_beyond():
    """A polynomial could turn back."""
    z = -torch.logspace(0, 30, 2000)
    tail = normal_cdf(z)
    assert (tail.diff() <= 0).all()
    assert (tail[z < -14] == 0).all()


def test_ends():
    z = torch.tensor([float("nan"), float("inf"), -float("inf"), -1e20, 0.0])
    expected = torch.tensor([float("nan"), 1.0, 0.0, 0.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(normal_cdf(z), expected, equal_nan=True, rtol=1e-5, atol=0)
