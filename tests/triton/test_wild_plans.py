"""Whatever a plan holds, no kernel leaves its tensors: the interpreter of these tests checks every address.

What comes out of a plan that is none is not looked at, but where a map alone is wild: such a choice or row is unused.
"""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from widenet_kernels.reference import permute as reference  # noqa: E402
from widenet_kernels.testing import inputs  # noqa: E402
from widenet_kernels.testing.numerics import assert_same_bits  # noqa: E402
from widenet_kernels.triton import combine, gate, grouped_gemm, moe, permute, plan, route  # noqa: E402

pytestmark = pytest.mark.interpreted

T, D, F, E, K, R = 37, 19, 34, 5, 3, 75
LEAST, MOST = -(2**31), 2**31 - 1
WILD = (-1, -2, LEAST, LEAST + 1, MOST, MOST - 1, 10**6, -(10**6))
BEGINS = ([0] * E, [MOST] * E, [LEAST] * E, [9, 3, -7, MOST, LEAST], [MOST, 0, 0, 0, 0], [0, 15, 30, 45, 60])
COUNTS = ([15] * E, [MOST] * E, [LEAST] * E, [-1, 0, R, R + 1, MOST])


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def wild(shape, most):
    """Every other entry wild or at the edge of what is allowed, the rest allowed."""
    out = torch.randint(0, most, shape, dtype=torch.int32).view(-1)
    out[::2] = int32([*WILD, most - 1, most, most + 1]).repeat(len(out))[: len(out[::2])]
    return out.view(shape)


def normal(*shape, seed=0):
    return inputs.normal(*shape, seed=seed)


@pytest.mark.parametrize("count", COUNTS, ids=str)
@pytest.mark.parametrize("begin", BEGINS, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_wild_places(activation, begin, count):
    places, width = (int32(begin), int32(count)), 2 * F if activation == "swiglu" else F
    rows, w1, b1, z = normal(R, D), normal(E, D, width), normal(E, width), normal(R, width)
    x, weight, w2, b2 = normal(T, D), normal(T, K), normal(E, F, D), normal(E, D)
    maps = wild((T, K), R), wild((R,), T * K)
    taken = (*places, rows, w1, b1, z, x, weight, w2, b2, *maps)
    before = [tensor.clone() for tensor in taken]
    grouped_gemm.grouped_gemm(rows, w1, b1, *places, activation, True)
    grouped_gemm.grouped_gemm_backward(normal(R, F), rows, w1, z, *places, activation, True, True, True)
    moe.moe_ffn(x, weight, *maps, *places, w1, b1, w2, b2, activation, True)
    saved = (x, x, weight, *maps, *places, z, w1, w2, b2, activation)
    moe.moe_ffn_backward(*saved, True, True, True, True, True, True)
    for tensor, as_it_was in zip(taken, before, strict=True):  # inside a kernel's tensors are its arguments too
        assert_same_bits(tensor, as_it_was)


def test_wild_maps():
    x, rows, weight, maps = normal(T, D), normal(R, D), normal(T, K), (wild((T, K), R), wild((R,), T * K))
    cleaned = torch.where((maps[1] >= 0) & (maps[1] < T * K), maps[1], -1)
    assert_same_bits(permute.permute(x, *maps), reference.permute(x, maps[0], cleaned))
    cleaned = torch.where((maps[0] >= 0) & (maps[0] < R), maps[0], -1)
    assert_same_bits(combine.combine(rows, weight, *maps), combine.combine(rows, weight, cleaned, maps[1]))
    assert_same_bits(permute.permute_backward(rows, maps[0]), permute.permute_backward(rows, cleaned))
    grad_weight = combine.combine_backward(x, rows, weight, *maps, True, True)[1]
    assert not grad_weight[cleaned < 0].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_wild_experts(dtype):
    index = wild((T, K), E).to(dtype)
    if dtype == torch.int64:
        index[::3] += 2**32  # a narrowed one would be allowed
    cleaned = torch.where((index >= 0) & (index < E), index, -1)
    for capacity in (None, 0, 4):
        for ours, expected in zip(
            plan.plan_routing(index, E, capacity, "choice", None),
            plan.plan_routing(cleaned, E, capacity, "choice", None),
            strict=True,
        ):
            assert_same_bits(ours, expected)


def test_wild_experts_in_the_gradient():
    index, grad_weight, probs = wild((T, K), E), normal(T, K), normal(T, E).softmax(1)
    cleaned = torch.where((index >= 0) & (index < E), index, -1)
    for normalize in (False, True):
        wild_grad = gate.topk_gate_backward(grad_weight, None, normal(T, K), index, probs, normalize)
        assert_same_bits(wild_grad, gate.topk_gate_backward(grad_weight, None, normal(T, K), cleaned, probs, normalize))
        args = (grad_weight, probs, None, normal(T, D), normal(E, D), normal(T, K), index, probs, normalize)
        route.route_backward(*args, True, True)


# ---------------------------------------------------------------------------------- the checks see what they should


@triton.jit
def add_kernel(x_ptr, out_ptr, ahead, N: tl.constexpr):
    offset = tl.arange(0, N)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset + ahead))


@triton.jit
def scale_kernel(x_ptr, scale):
    tl.store(x_ptr, tl.program_id(0) * scale + scale * scale)


def test_a_load_outside_is_seen():
    x, out = torch.arange(16.0), torch.zeros(16)
    add_kernel[(1,)](x, out, 0, N=16)
    assert_same_bits(x, out)
    for ahead in (1, -1):
        with pytest.raises(Exception, match="a load outside the kernel's tensors"):
            add_kernel[(1,)](x, out, ahead, N=16)


def test_a_store_outside_is_seen():
    with pytest.raises(Exception, match="a store outside the kernel's tensors"):
        add_kernel[(1,)](torch.zeros(16), torch.zeros(15), 0, N=16)


def test_an_integer_that_overflows_is_seen():
    x = torch.zeros(1, dtype=torch.int32)
    scale_kernel[(1,)](x, 46340)
    assert int(x) == 46340**2
    with np.errstate(over="ignore"), pytest.raises(Exception, match="overflow"):
        scale_kernel[(1,)](x, 46341)
