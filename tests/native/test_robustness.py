"""What must hold whatever comes: corrupted plans, wrong calls, any number of threads. Run under ASan and UBSan too."""

import numpy as np
import pytest
import torch
from native import DTYPES, GEMM_LEVELS, Kernels, math_dtype

from widenet_kernels.reference.gate import topk_gate_backward
from widenet_kernels.reference.plan import plan_routing
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_same_bits

T, D, E, K = 37, 19, 5, 3
LEAST, MOST = -(2**31), 2**31 - 1
WILD = (-1, -2, LEAST, LEAST + 1, MOST, MOST - 1, 10**6, -(10**6))

of_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def corrupted(good, *edges):
    """Every other entry wild or at the edge of what is allowed, the rest as it was."""
    wild = torch.tensor([*WILD, *edges], dtype=torch.int32)
    out = good.clone().view(-1)
    out[::2] = wild.repeat(len(out))[: len(out[::2])]
    return out.view(good.shape)


def wild_row_choice():
    num_rows = T * K + 8
    return corrupted(torch.randint(0, T * K, (num_rows,), dtype=torch.int32), T * K - 1, T * K, T * K + 1)


def inverse(row_choice):
    """choice_row [T, K] as that row_choice would have it; wild for the choices that no row serves."""
    choice_row = torch.tensor(WILD, dtype=torch.int32).repeat(T * K)[: T * K]
    for row, choice in enumerate(row_choice.tolist()):
        if 0 <= choice < T * K:
            choice_row[choice] = row
    return choice_row.view(T, K)


@of_dtype
def test_corrupted_row_choice(kernels, dtype):
    """Rows whose choice does not exist are unused: zero in what permute and combine's backward give."""
    row_choice, math = wild_row_choice(), math_dtype(dtype)
    valid = (row_choice >= 0) & (row_choice < T * K)
    token = torch.where(valid, row_choice, 0).long() // K
    x = inputs.normal(T, D, seed=0, dtype=dtype)
    expected = torch.where(valid[:, None], x[token], 0)
    assert_same_bits(kernels.permute(x, row_choice, K), expected)

    rows, weight = inputs.normal(len(row_choice), D, seed=1, dtype=dtype), torch.ones(T, K, dtype=math)
    grad_rows, grad_weight = kernels.combine_backward(x, rows, weight, inverse(row_choice), row_choice)
    assert_same_bits(grad_rows, expected)
    untouched = torch.ones(T * K, dtype=torch.bool).index_fill(0, row_choice[valid].long(), False)
    assert not grad_weight.view(-1)[untouched].any()
    assert grad_weight.isfinite().all()


@of_dtype
def test_corrupted_row_choice_of_weight_gradient(kernels, dtype):
    row_choice, math = wild_row_choice(), math_dtype(dtype)
    valid = (row_choice >= 0) & (row_choice < T * K)
    untouched = torch.ones(T * K, dtype=torch.bool).index_fill(0, row_choice[valid].long(), False)
    rows = inputs.normal(len(row_choice), D, seed=1, dtype=dtype)
    dot = torch.arange(1, len(row_choice) + 1).to(math)
    out = kernels.weight_gradient(dot, rows, row_choice, T * K, bias=rows[0].clone())
    assert not out[untouched].any()
    assert (out[~untouched] != 0).any()


@of_dtype
def test_corrupted_choice_row(kernels, dtype):
    num_rows = 23
    good = torch.randint(0, num_rows, (T, K), dtype=torch.int32)
    choice_row = corrupted(good, num_rows - 1, num_rows, num_rows + 1)
    rows, weight = inputs.normal(num_rows, D, seed=1, dtype=dtype), torch.ones(T, K, dtype=math_dtype(dtype))
    cleaned = torch.where((choice_row >= 0) & (choice_row < num_rows), choice_row, -1)
    assert (cleaned != choice_row).any()
    assert_same_bits(kernels.combine(rows, weight, choice_row), kernels.combine(rows, weight, cleaned))
    everything = torch.full((T, K), MOST, dtype=torch.int32)
    assert not kernels.combine(rows, weight, everything).any()


@pytest.mark.parametrize("begin", [[0] * E, [MOST] * E, [LEAST] * E, [9, 3, -7, MOST, LEAST], [MOST, 0, 0, 0, 0]])
def test_corrupted_expert_begin(kernels, begin):
    """Some expert's bias is added, never anything else."""
    rows, weight = torch.zeros(23, D), torch.ones(T, 1)
    choice_row = torch.randint(0, 23, (T, 1), dtype=torch.int32)
    bias = torch.arange(1.0, E + 1)[:, None].repeat(1, D)
    y = kernels.combine(rows, weight, choice_row, bias=bias, expert_begin=torch.tensor(begin, dtype=torch.int32))
    assert torch.isin(y, torch.arange(1.0, E + 1)).all()


def test_corrupted_expert_index(kernels):
    """An index outside [0, E) is no choice: in the gate's backward and in the plan."""
    weight, index, probs = kernels.gate(inputs.normal(T, E, seed=0), K)
    wild = corrupted(index, E - 1, E, E + 1)
    cleaned = torch.where((wild >= 0) & (wild < E), wild, -1)
    grads = inputs.normal(T, K, seed=1), inputs.normal(T, E, seed=2)
    out = kernels.gate_backward(*grads, None, weight, wild, probs)
    torch.testing.assert_close(out, topk_gate_backward(*grads, weight, cleaned, probs, False))
    for capacity in (None, 0, 4):
        for ours, expected in zip(
            kernels.plan_routing(wild, E, capacity), plan_routing(wild, E, capacity, "choice", None), strict=True
        ):
            assert_same_bits(ours, expected)


def test_no_choices_at_all(kernels):
    """K = 0: every row is unused, nothing is divided by it."""
    row_choice = torch.tensor([-1, 0, 5], dtype=torch.int32)
    assert not kernels.permute(torch.ones(4, 3), row_choice, 0).any()
    weight, choice_row = torch.empty(4, 0), torch.empty(4, 0, dtype=torch.int32)
    rows = torch.ones(3, 3)
    grad_rows, grad_weight = kernels.combine_backward(torch.ones(4, 3), rows, weight, choice_row, row_choice)
    assert not grad_rows.any()
    assert grad_weight.shape == (4, 0)
    assert not kernels.combine(rows, weight, choice_row).any()


@of_dtype
def test_no_columns(kernels, dtype):
    """D = 0, with null pointers as torch has them."""
    math, index = math_dtype(dtype), torch.tensor([0, -1, 2], dtype=torch.int32)
    nothing, weight = torch.empty(3, 0, dtype=dtype), torch.ones(3, 1, dtype=math)
    assert kernels.permute(nothing, index, 1).shape == (3, 0)
    assert kernels.combine(nothing, weight, index[:, None].contiguous()).shape == (3, 0)
    grad_rows, grad_weight = kernels.combine_backward(nothing, nothing, weight, index[:, None].contiguous(), index)
    assert grad_rows.shape == (3, 0)
    assert not grad_weight.any()


@of_dtype
def test_no_columns_of_route_and_activation(kernels, dtype):
    math, nothing = math_dtype(dtype), torch.empty(3, 0, dtype=dtype)
    assert not kernels.route(nothing, torch.empty(2, 0, dtype=math)).any()
    assert (
        kernels.route_backward_weight(torch.ones(3, 2, dtype=math), nothing, torch.empty(2, 0, dtype=math)).numel() == 0
    )
    assert kernels.activation(nothing, "gelu", bias=nothing[0])[1].shape == (3, 0)


SCORE = [0.0, float("nan"), -0.0, 2.0, float("-inf"), float("inf"), 2.0, -1.0, float("nan")]


@pytest.mark.parametrize("wide_index", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("priority", ["choice", "token", "score"])
@pytest.mark.parametrize("capacity", [None, 0, 3000, 12_000])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_plan_in_blocks(module, threads, capacity, priority, wide_index):
    """More choices than one block takes (8,192), with holes, and scores full of ties, NaN and signed zeros."""
    module.set_num_threads(threads)
    shape = inputs.Shape(20_000, 1, 1, 7, 2, capacity, "holes", "more choices than two blocks")
    index = inputs.make_expert_index(shape).to(torch.int64 if wide_index else torch.int32)
    if wide_index:
        index[::5, 0] = 2**32 + 1  # expert 1, if it were cut to 32 bits
    score = torch.tensor(SCORE, dtype=torch.float64 if wide_index else torch.float32).repeat(shape.T)[: shape.T]
    score = score if priority == "score" else None
    kernels = Kernels(module, "baseline")  # the plan is integers only: one build for all levels
    ours = kernels.plan_routing(index, shape.E, capacity, priority=priority, score=score)
    for out, expected in zip(ours, plan_routing(index, shape.E, capacity, priority, score), strict=True):
        assert_same_bits(out, expected)


def run_everything(kernels, dtype):
    """Every kernel that is spread over threads, forward and backward, on sizes that no number of threads divides."""
    math = math_dtype(dtype)
    shape = inputs.Shape(T, D, 300, E, K, 20, "holes", "")
    plan, x = inputs.make_plan(shape), inputs.make_x(shape, dtype=dtype)
    weight, index, probs = kernels.gate(inputs.make_logits(shape, dtype=dtype), K, normalize=True)
    yield from (weight, index, probs)
    grads = [inputs.normal(*t.shape, seed=seed, dtype=math) for seed, t in enumerate((weight, probs, probs))]
    yield kernels.gate_backward(*grads, weight, index, probs, normalize=True)
    router_weight = inputs.normal(E, D, seed=1, dtype=math)
    yield kernels.route(x, router_weight)
    yield kernels.route_backward_x(grads[1], x, router_weight)
    yield kernels.route_backward_weight(grads[1], x, router_weight)
    rows = kernels.permute(x, plan.row_choice, K)
    bias = inputs.normal(E, D, seed=2, dtype=dtype)
    yield rows
    yield kernels.combine(rows, weight, plan.choice_row, bias=bias, expert_begin=plan.expert_begin)
    yield from kernels.combine_backward(x, rows, weight, plan.choice_row, plan.row_choice)
    z, row_weight = inputs.normal(100, 2 * shape.F, seed=3, dtype=dtype), inputs.normal(100, seed=4, dtype=math)
    for name, grad in (("gelu", z), ("geglu", z[:, : shape.F].contiguous())):
        yield from kernels.activation(z, name, bias=z[0].clone())
        yield from kernels.activation_backward(z, grad, name, row_weight=row_weight)
    sums = kernels.column_sum(z, row_weight=row_weight)
    yield from (sums, kernels.reduce_chunks(sums, z[0].clone(), accumulate=True))
    dot = inputs.normal(plan.num_rows, seed=5, dtype=math)
    yield kernels.weight_gradient(dot, rows, plan.row_choice, T * K, bias=bias[0].clone())
    yield kernels.accumulate(z.view(-1), torch.ones(z.numel()))


@of_dtype
def test_any_number_of_threads_gives_the_same_bits(module, kernels, dtype):
    module.set_num_threads(1)
    expected = [out.view(torch.uint8) for out in run_everything(kernels, dtype)]
    for threads in (2, 3, 5, 16, 64):
        module.set_num_threads(threads)
        for i, out in enumerate(run_everything(kernels, dtype)):
            assert out.view(torch.uint8).equal(expected[i]), f"result {i}, {threads} threads"
    assert i == len(expected) - 1


def test_levels(module):
    assert module.levels()[-1] == "baseline"
    assert set(module.levels()) <= set(GEMM_LEVELS)


X, ROW_CHOICE = np.ones((4, 3), np.float32), np.zeros(5, np.int32)
CHOICE_ROW, WEIGHT = np.zeros((4, 2), np.int32), np.ones((4, 2), np.float32)
MISALIGNED = np.zeros(49, np.uint8)[1:].view(np.float32).reshape(4, 3)
WRONG_CALLS = {
    "level": (lambda m: m.permute(X, ROW_CHOICE, 2, level="sse9"), ValueError, "level"),
    "a list": (lambda m: m.permute([[1.0]], ROW_CHOICE, 2), TypeError, "incompatible"),
    "element type": (lambda m: m.permute(X.astype(np.int32), ROW_CHOICE, 2), TypeError, "x: expected float32"),
    "byte order": (lambda m: m.permute(X.astype(">f4"), ROW_CHOICE, 2), TypeError, "x: expected float32"),
    "index type": (lambda m: m.permute(X, ROW_CHOICE.astype(np.int64), 2), TypeError, "row_choice: expected int32"),
    "dimensions": (lambda m: m.permute(X[0], ROW_CHOICE, 2), ValueError, "x: expected 2 dimensions"),
    "strides": (lambda m: m.permute(X.T, ROW_CHOICE, 2), ValueError, "x: expected a C-contiguous"),
    "alignment": (lambda m: m.permute(MISALIGNED, ROW_CHOICE, 2), ValueError, "x: expected a C-contiguous, aligned"),
    "negative k": (lambda m: m.permute(X, ROW_CHOICE, -1), ValueError, "k: expected"),
    "k = 0": (lambda m: m.gate(X, 0), ValueError, "k: expected 1 to"),
    "k > E": (lambda m: m.gate(X, 4), ValueError, "k: expected 1 to"),
    "no experts": (lambda m: m.gate(X[:, :0].copy(), 1), ValueError, "k: expected 1 to"),
    "noise": (lambda m: m.gate(X, 1, noise=X[:2]), ValueError, r"noise: expected shape \[4, 3\]"),
    "mask": (lambda m: m.gate(X, 1, mask=np.ones(4, np.uint8)), TypeError, "mask: expected bool"),
    "math type": (lambda m: m.route(X.astype(float), X), ValueError, "router_weight: expected float64"),
    "half math": (lambda m: m.route(X, X.astype(np.float16)), TypeError, "router_weight: expected float32 or"),
    "weight": (lambda m: m.combine(X, WEIGHT[:3], CHOICE_ROW), ValueError, r"weight: expected shape \[4, 2\]"),
    "bias alone": (lambda m: m.combine(X, WEIGHT, CHOICE_ROW, bias=X), ValueError, "expert_begin: expected"),
    "activation": (lambda m: m.activation(X, "tanh"), ValueError, "activation: there is no 'tanh'"),
    "odd gated width": (lambda m: m.activation(X, "swiglu"), ValueError, "z: expected an even width"),
    "in place, gated": (lambda m: m.activation(WEIGHT, "swiglu", in_place=True), ValueError, "in_place: expected"),
    "grad": (lambda m: m.activation_backward(X, WEIGHT, "gelu"), ValueError, r"grad: expected shape \[4, 3\]"),
    "sums alone": (lambda m: m.activation_backward(X, X, "gelu", outputs=["column_sums"]), ValueError, "outputs: exp"),
    "capacity": (lambda m: m.plan_routing(CHOICE_ROW, 4, 2**29), ValueError, "capacity: expected"),
    "negative capacity": (lambda m: m.plan_routing(CHOICE_ROW, 4, -1), ValueError, "capacity: expected"),
    "experts": (lambda m: m.plan_routing(CHOICE_ROW, 0), ValueError, "num_experts: expected"),
    "priority": (lambda m: m.plan_routing(CHOICE_ROW, 4, priority="last"), ValueError, "priority: expected"),
    "no score": (lambda m: m.plan_routing(CHOICE_ROW, 4, priority="score"), ValueError, "score: expected"),
    "index": (lambda m: m.plan_routing(CHOICE_ROW.astype(np.int16), 4), TypeError, "expert_index: expected int32"),
    "accumulate": (lambda m: m.accumulate(X[0], X[0].astype(float)), TypeError, "sum: expected float32"),
    "threads": (lambda m: m.set_num_threads(0), ValueError, "count: expected 1 to 256"),
}


@pytest.mark.parametrize(("call", "error", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_calls_raise(module, call, error, message):
    with pytest.raises(error, match=message):
        call(module)
