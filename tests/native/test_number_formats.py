"""bfloat16 and float16 in the kernels, in integers of their own: every half pattern, and floats all over the range."""

import pytest
import torch
from native import DTYPES

HALVES = pytest.mark.parametrize("dtype", DTYPES[1:3], ids=["bfloat16", "float16"])


def all_patterns(dtype):
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_patterns(out, expected):
    """The very bits, the sign of zero included; any NaN for a NaN."""
    assert out.dtype == expected.dtype
    integer = torch.int32 if out.dtype == torch.float32 else torch.int16
    same = (out.view(integer) == expected.view(integer)) | (out.isnan() & expected.isnan())
    assert same.all(), f"{(~same).sum()} differ, the first: {out[~same][:4]} instead of {expected[~same][:4]}"


def narrowed(kernels, values, dtype):
    """float32 values rounded to the dtype, by a kernel that adds them to -0.0 (which changes nothing)."""
    return kernels.reduce_chunks(values[None], torch.empty(len(values), dtype=dtype))


@HALVES
def test_widen_every_pattern(kernels, dtype):
    halves = all_patterns(dtype)
    out = kernels.accumulate(halves, torch.full((2**16,), -0.0))
    assert_same_patterns(out, halves.float())


@HALVES
def test_round_trip_of_every_pattern(kernels, dtype):
    """grad_rows = 1 * grad: widened, and narrowed again. A NaN stays one, and keeps its sign."""
    halves = all_patterns(dtype).view(256, 256)
    row_choice = torch.arange(256, dtype=torch.int32)
    out, _ = kernels.combine_backward(
        halves, torch.zeros_like(halves), torch.ones(256, 1), row_choice[:, None].contiguous(), row_choice
    )
    assert_same_patterns(out.view(-1), halves.view(-1))
    assert (out.signbit() == halves.signbit()).all()


@HALVES
def test_narrow_floats_of_the_whole_range(kernels, dtype):
    """A million patterns all over float32, and the neighbourhood of every half and of every middle of two halves."""
    spread = torch.arange(0, 2**32, 4093, dtype=torch.int64)
    halves = all_patterns(dtype).float()
    halves = halves[halves.isfinite()].sort().values
    middles = (halves[1:].double() / 2 + halves[:-1].double() / 2).float()
    around = torch.cat([halves, middles]).view(torch.int32).to(torch.int64)
    bits = torch.cat([spread, *(around + step for step in (-2, -1, 0, 1, 2))]) & 0xFFFFFFFF
    floats = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    floats = floats[floats.view(torch.int32) != -(2**31)]  # 0 + -0.0 is 0: the sign is test_round_trip's
    assert_same_patterns(narrowed(kernels, floats, dtype), floats.to(dtype))


@HALVES
def test_narrow_at_the_edges(kernels, dtype):
    largest = torch.finfo(dtype).max
    ulp = {torch.float16: 32.0, torch.bfloat16: 2.0**120}[dtype]
    smallest = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}[dtype]
    edge = torch.tensor(largest + ulp / 2)  # the middle between the largest and what would follow: to even, infinity
    below = torch.nextafter(edge, torch.tensor(0.0))
    values = torch.stack([edge, below, torch.tensor(smallest / 2), torch.tensor(smallest * 0.75)])
    assert narrowed(kernels, values, dtype).double().tolist() == [float("inf"), largest, 0.0, smallest]
