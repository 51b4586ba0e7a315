"""The CUDA kernels under the emulator: the tests of the CPU kernels again, in shuffled orders of threads and blocks."""

import pytest
import test_numpy_kernels as shared
import test_robustness as robustness
import torch
from native import DTYPES, Kernels, math_dtype, to_numpy, to_torch

from widenet_kernels.reference.plan import plan_routing
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_same_bits

SEED = 1  # of the order of threads and blocks; 0 would be in order


@pytest.fixture
def kernels(module):
    module.set_emulator_seed(SEED)
    yield Kernels(module, "cuda")
    module.set_emulator_seed(0)


test_gate = shared.test_gate
test_gate_backward = shared.test_gate_backward
test_gate_backward_without_some_gradient = shared.test_gate_backward_without_some_gradient
test_corrupted_row_choice = robustness.test_corrupted_row_choice
test_corrupted_choice_row = robustness.test_corrupted_choice_row
test_corrupted_expert_index = robustness.test_corrupted_expert_index
test_no_choices_at_all = robustness.test_no_choices_at_all
test_no_columns = robustness.test_no_columns


# without the shape of many tokens, which is for the CPU's threads: a row is a warp, and the emulator's are slow
of_shape = pytest.mark.parametrize("shape", inputs.SHAPES, ids=str)
of_math = pytest.mark.parametrize("wide", [False, True], ids=["", "float64"])


@shared.of_dtype
@of_shape
def test_permute(kernels, shape, dtype):
    shared.test_permute(kernels, shape, dtype)
    plan, x = inputs.make_plan(shape), inputs.make_x(shape, dtype=dtype)
    expected = Kernels(kernels.module, "baseline").permute(x, plan.row_choice, shape.K)
    assert_same_bits(kernels.permute(x, plan.row_choice, shape.K), expected)


@of_math
@shared.of_dtype
@of_shape
def test_combine(kernels, shape, dtype, wide):
    shared.test_combine(kernels, shape, dtype, False, wide)


@shared.of_dtype
@of_shape
def test_combine_without_weight(kernels, shape, dtype):
    shared.test_combine_without_weight(kernels, shape, dtype)


@of_math
@shared.of_dtype
@of_shape
def test_combine_backward(kernels, shape, dtype, wide):
    shared.test_combine_backward(kernels, shape, dtype, wide)


@pytest.mark.parametrize("num_experts", [1, 2, 3, 8, 9, 33, 200, 257, 600, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gate_shares_a_token_among_lanes(kernels, dtype, num_experts):
    """Every way in which lanes and experts meet: ranks as the CPU's, ties and NaN included."""
    logits = inputs.normal(19, num_experts, seed=3, dtype=dtype).mul(4).round().div(4)
    logits[3, ::2] = float("nan")
    logits[4] = float("nan")
    logits[5] = -float("inf")
    k = min(16, num_experts)
    ours, cpu = kernels.gate(logits, k), Kernels(kernels.module, "baseline").gate(logits, k)
    assert_same_bits(ours[1], cpu[1])
    bound = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]  # a few roundings of exp and of a sum in another order
    for out, expected in ((ours[0], cpu[0]), (ours[2], cpu[2])):
        torch.testing.assert_close(out, expected, rtol=bound, atol=bound, equal_nan=True)


def test_too_many_experts(kernels):
    with pytest.raises(ValueError, match=r"topk_gate: expected at most 1,024 experts, got 1025"):
        kernels.gate(torch.zeros(2, 1025), 2)
    with pytest.raises(ValueError, match=r"plan_routing: expected at most 1,024 experts, got 1025"):
        kernels.plan_routing(torch.zeros(2, 1, dtype=torch.int32), 1025)


def assert_same_plan(kernels, index, num_experts, capacity, priority):
    score = torch.arange(len(index)).mul(7).remainder(5).float() if priority == "score" else None
    order = None if score is None else (-score).argsort(stable=True)
    ours = kernels.plan_routing(index, num_experts, capacity, priority, order=order)
    for out, expected in zip(ours, plan_routing(index, num_experts, capacity, priority, score), strict=True):
        assert_same_bits(out, expected)


@pytest.mark.parametrize("priority", ["choice", "token", "score"])
@shared.of_shape
def test_plan(kernels, shape, priority):
    assert_same_plan(kernels, inputs.make_expert_index(shape), shape.E, shape.C, priority)


@pytest.mark.parametrize("priority", ["choice", "token"])
@pytest.mark.parametrize("capacity", [None, 3, 40])
@pytest.mark.parametrize("num_experts", [1, 31, 1024])
def test_plan_of_indices_out_of_range(kernels, num_experts, capacity, priority):
    """Of 64 bits, some of which narrow to an expert; several parts of several blocks of threads."""
    index = torch.randint(-2, num_experts + 2, (1500, 2), generator=torch.Generator().manual_seed(0))
    index[::7, 0] += 2**32
    assert_same_plan(kernels, index, num_experts, capacity, priority)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "odd"])
@pytest.mark.parametrize("dim", [8, 7, 64, 600])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accesses_of_every_width(kernels, dtype, dim, offset):
    """Rows that begin at multiples of 16 bytes and rows that do not; the ends are the sanitizers'."""
    plan = inputs.make_plan(inputs.ORDINARY)
    num_tokens, k = plan.choice_row.shape
    x = inputs.normal(num_tokens * dim + offset, seed=1, dtype=dtype)[offset:].view(num_tokens, dim)
    rows = kernels.permute(x, plan.row_choice, k)
    assert_same_bits(rows, Kernels(kernels.module, "baseline").permute(x, plan.row_choice, k))
    weight = inputs.normal(num_tokens, k, seed=2, dtype=math_dtype(dtype))
    expected = Kernels(kernels.module, "baseline").combine(rows, weight, plan.choice_row)
    torch.testing.assert_close(kernels.combine(rows, weight, plan.choice_row), expected)


@pytest.mark.parametrize(
    ("num_experts", "dim"), [(1, 1), (2, 0), (3, 37), (4, 600), (5, 64), (8, 264), (13, 70), (16, 48)]
)
@of_math
@shared.of_dtype
def test_route_backward(kernels, dtype, wide, num_experts, dim):
    """Parts of the tokens that are full and one that is not; tokens that asked for nothing hold NaN."""
    math, num_tokens = torch.float64 if wide else math_dtype(dtype), 150
    grad = inputs.normal(num_tokens, num_experts, seed=3, dtype=math)
    router_weight = inputs.normal(num_experts, dim, seed=1, dtype=math)
    grad[::7] = 0
    x = inputs.normal(num_tokens, dim, seed=2, dtype=dtype)
    x[::7] = 0
    exact_x, exact_weight = grad.double() @ router_weight.double(), grad.double().t() @ x.double()
    plain_x, plain_weight = (grad @ router_weight).to(dtype), grad.t() @ x.to(math)
    x[::7] = float("nan")
    shared.assert_good(kernels.route_backward_x(grad, x, router_weight), plain_x, exact_x)
    shared.assert_good(kernels.route_backward_weight(grad, x, router_weight), plain_weight, exact_weight)


def test_many_experts_are_refused(kernels):
    grad, x, router_weight = torch.ones(3, 17), torch.ones(3, 8), torch.ones(17, 8)
    with pytest.raises(ValueError, match="route_backward: expected at most 16 experts, got 17"):
        kernels.route_backward_x(grad, x, router_weight)


@pytest.mark.parametrize("dim", [0, 1, 8, 37])
@shared.of_dtype
def test_asked_rows(module, kernels, dtype, dim):
    """x where any gradient of the token is not zero, NaN included; else zeros, whatever x holds."""
    grad = torch.zeros(70, 40, dtype=math_dtype(dtype))
    grad[::3, 39], grad[1::5, 7], grad[4, 2] = 1e-30, float("nan"), -0.0
    asked = (grad != 0).any(dim=1)
    x = inputs.normal(70, dim, seed=1, dtype=dtype)
    expected = torch.where(asked[:, None], x, 0).to(grad.dtype)
    x[~asked] = float("nan")
    assert_same_bits(to_torch(module.asked_rows(to_numpy(grad), to_numpy(x))), expected)


def everything(kernels, dtype):
    """Every kernel, forward and backward, on sizes of several blocks and parts of blocks."""
    shape = inputs.Shape(700, 40, 8, 5, 3, 300, "holes", "")
    x, math = inputs.make_x(shape, dtype=dtype), math_dtype(dtype)
    weight, index, probs = kernels.gate(inputs.make_logits(shape, dtype=dtype), shape.K, normalize=True)
    grads = [inputs.normal(*t.shape, seed=seed, dtype=math) for seed, t in enumerate((weight, probs, probs))]
    yield from (weight, index, probs, kernels.gate_backward(*grads, weight, index, probs, normalize=True))
    order = weight[:, 0].argsort(stable=True)
    for capacity, priority in ((None, "token"), (None, "score"), (shape.C, "choice")):
        plan = kernels.plan_routing(index, shape.E, capacity, priority, order=order if priority == "score" else None)
        yield from plan
    choice_row, row_choice, *_ = plan
    rows = kernels.permute(x, row_choice, shape.K)
    yield from (rows, kernels.combine(rows, weight, choice_row))
    yield from kernels.combine_backward(x, rows, weight, choice_row, row_choice)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_any_order_of_threads_and_blocks_gives_the_same_bits(module, dtype):
    kernels = Kernels(module, "cuda")
    expected = list(everything(kernels, dtype))
    try:
        for seed in range(1, 21):
            module.set_emulator_seed(seed)
            for out, first in zip(everything(kernels, dtype), expected, strict=True):
                assert_same_bits(out, first, f"seed {seed}")
    finally:
        module.set_emulator_seed(0)
