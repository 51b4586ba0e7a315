"""What tests/interpreted.py adds to Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.interpreted


@triton.jit
def round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offset = tl.arange(0, N)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset).to(tl.bfloat16))


@triton.jit
def reach_kernel(x_ptr, out_ptr, N: tl.constexpr, OFFSET: tl.constexpr):
    offset = tl.arange(0, N)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset + OFFSET))


@triton.jit
def overflow_kernel(out_ptr, number, stride):
    tl.store(out_ptr, number * stride)


def test_bf16_is_rounded_to_nearest():
    x = torch.cat([torch.randn(1018), torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 3.4e38, 1e-45])])
    out = torch.empty(1024, dtype=torch.bfloat16)
    round_kernel[(1,)](x, out, 1024)
    torch.testing.assert_close(out, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("offset", [-1, 1])
def test_a_load_outside_is_an_error(offset):
    x, out = torch.zeros(64), torch.zeros(64)
    reach_kernel[(1,)](x, out, 64, 0)
    with pytest.raises(Exception, match="a load outside the kernel's tensors"):
        reach_kernel[(1,)](x, out, 64, offset)


def test_an_overflow_of_32_bits_is_an_error():
    out = torch.zeros(1, dtype=torch.int32)
    overflow_kernel[(1,)](out, 65_535, 32_767)
    with pytest.raises(Exception, match="overflow"):
        overflow_kernel[(1,)](out, 65_536, 65_536)
