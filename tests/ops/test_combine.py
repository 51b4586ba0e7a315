"""combine: weighted rows back to tokens, summed in k order in fp32."""

import eager
import oracle
import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_float64, assert_gradcheck, assert_op_as_good_as, assert_same_bits

OP = "combine"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make_rows(shape, dtype=torch.float32, device="cpu"):
    num_rows = shape.T * shape.K if shape.C is None else shape.E * shape.C
    return inputs.normal(num_rows, shape.D, seed=6, dtype=dtype, device=device)


@pytest.mark.parametrize("shape", inputs.SHAPES, ids=str)
def test_oracle(shape, device, backend):
    plan = inputs.make_plan(shape, device=device)
    rows, weight = make_rows(shape, torch.float64), inputs.make_gate_weight(shape, dtype=torch.float64)
    y = wk.combine(rows.to(device), weight.to(device), plan, backend=backend)
    assert_float64(y.cpu(), oracle.combine(rows, weight, inputs.make_plan(shape)))


def assert_good(shape, dtype, weight_dtype, device, backend):
    plan = inputs.make_plan(shape, device=device)
    assert_op_as_good_as(
        lambda rows, weight: wk.combine(rows, weight, plan, backend=backend),
        lambda rows, weight: eager.combine(rows, weight, plan),
        {
            "rows": make_rows(shape, dtype, device),
            "weight": inputs.make_gate_weight(shape, dtype=weight_dtype, device=device),
        },
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", inputs.SHAPES, ids=str)
def test_as_good_as_torch(shape, dtype, device, backend):
    assert_good(shape, dtype, torch.float64 if dtype == torch.float64 else torch.float32, device, backend)


@pytest.mark.parametrize("shape", inputs.LARGE_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_large(shape, dtype, device, backend, several_threads):
    assert_good(shape, dtype, torch.float32, device, backend)


@pytest.mark.parametrize("weight_dtype", DTYPES[1:3], ids=lambda d: f"weight-{d}")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_half_weights(dtype, weight_dtype, device, backend):
    assert_good(inputs.WIDE, dtype, weight_dtype, device, backend)


@pytest.mark.parametrize("shape", [inputs.ORDINARY, inputs.DROPLESS], ids=str)
def test_gradcheck(shape, device, backend):
    plan = inputs.make_plan(shape, device=device)
    rows = make_rows(shape, torch.float64, device).requires_grad_()
    weight = inputs.make_gate_weight(shape, dtype=torch.float64, device=device).requires_grad_()
    assert_gradcheck(lambda r, w: wk.combine(r, w, plan, backend=backend), (rows, weight))


def test_sum_is_in_k_order_in_fp32(device, backend):
    plan = wk.plan_routing(torch.tensor([[0, 1, 2]], device=device), 3, 1)
    ones = torch.ones(1, 3, device=device)
    for values, total in (([1.0, 2**-24, 2**-24], 1.0), ([2**-24, 2**-24, 1.0], 1.0 + 2**-23)):
        assert wk.combine(torch.tensor(values, device=device)[:, None], ones, plan, backend=backend).item() == total
    rows = torch.tensor([1.0, 2**-8, 2**-8], dtype=torch.bfloat16, device=device)[:, None]
    assert wk.combine(rows, ones, plan, backend=backend).item() == 1.0 + 2**-7


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda d: f"weight-{d}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, weight_dtype, device, backend):
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    rows = make_rows(shape, dtype, device).requires_grad_()
    weight = inputs.make_gate_weight(shape, dtype=weight_dtype, device=device).requires_grad_()
    y = wk.combine(rows, weight, plan, backend=backend)
    y.sum().backward()
    assert (y.dtype, rows.grad.dtype, weight.grad.dtype) == (dtype, dtype, weight_dtype)


def test_math_is_in_float64_when_anything_is(device, backend):
    """A weight of 1 + 2**-40 in fp64 on fp32 rows: 2**20 (1 + 2**-40) - 2**20 leaves 2**-20, unless cut to fp32."""
    plan = wk.plan_routing(torch.tensor([[0, 1]], device=device), 2, 1)
    rows = torch.tensor([[2.0**20], [2.0**20]], device=device)
    weight = torch.tensor([[1 + 2**-40, -1.0]], dtype=torch.float64, device=device)
    y = wk.combine(rows, weight, plan, backend=backend)
    assert (y.dtype, y.item()) == (torch.float32, 2.0**-20)


@pytest.mark.parametrize("shape", [s for s in inputs.SHAPES if s.T and s.E < 100], ids=str)
def test_nan_in_unused_places_reaches_nothing(shape, device, backend):
    plan = inputs.make_plan(shape, device=device)
    unused, dropped = inputs.unused_rows(plan), inputs.dropped_choices(plan)
    rows, weight = make_rows(shape, device=device), inputs.make_gate_weight(shape, device=device)

    def run(rows, weight):
        rows, weight = rows.detach().requires_grad_(), weight.detach().requires_grad_()
        y = wk.combine(rows, weight, plan, backend=backend)
        grad = inputs.normal(shape.T, shape.D, seed=5, device=device)
        return y.detach(), *torch.autograd.grad(y, (rows, weight), inputs.poisoned(grad, dropped.all(dim=1)))

    clean = run(rows, weight)
    y, grad_rows, grad_weight = run(inputs.poisoned(rows, unused), inputs.poisoned(weight, dropped))
    for ours, theirs in zip((y, grad_rows, grad_weight), clean, strict=True):
        assert_same_bits(ours, theirs)
        assert ours.isfinite().all()
    assert not grad_rows[unused].any()
    assert not grad_weight[dropped].any()
    assert not y[dropped.all(dim=1)].any()


def test_a_served_nan_is_not_hidden(device, backend):
    plan = inputs.make_plan(inputs.ORDINARY, device=device)
    rows, weight = make_rows(inputs.ORDINARY, device=device), inputs.make_gate_weight(inputs.ORDINARY, device=device)
    y = wk.combine(inputs.poisoned(rows, ~inputs.unused_rows(plan)), torch.zeros_like(weight), plan, backend=backend)
    served = ~inputs.dropped_choices(plan).all(dim=1)
    assert y[served].isnan().all()


def test_strided_rows_weight_and_gradient(device, backend):
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    rows, weight = make_rows(shape, device=device), inputs.make_gate_weight(shape, device=device)[:, :1].repeat(1, 2)

    def run(rows, weight, grad):
        rows, weight = rows.detach().requires_grad_(), weight.detach().requires_grad_()
        y = wk.combine(rows, weight, plan, backend=backend)
        return y.detach(), *torch.autograd.grad(y, (rows, weight), grad)

    ones = torch.ones(shape.T, shape.D, device=device)
    expected = run(rows, weight, ones)
    for strange_rows in (rows.t().contiguous().t(), torch.stack([rows, -rows], -1)[..., 0], rows):
        for strange_weight in (weight[:, :1].expand(-1, 2), weight.t().contiguous().t()):
            for grad in (torch.ones((), device=device).expand(shape.T, shape.D), ones.t().contiguous().t()):
                for ours, theirs in zip(run(strange_rows, strange_weight, grad), expected, strict=True):
                    assert_same_bits(ours, theirs)


def test_rows_without_columns(device, backend):
    plan = inputs.make_plan(inputs.ORDINARY, device=device)
    weight = inputs.make_gate_weight(inputs.ORDINARY, device=device).requires_grad_()
    rows = torch.empty(plan.num_rows, 0, device=device, requires_grad=True)
    y = wk.combine(rows, weight, plan, backend=backend)
    grad_rows, grad_weight = torch.autograd.grad(y.sum(), [rows, weight])
    assert y.shape == (inputs.ORDINARY.T, 0)
    assert grad_rows.shape == rows.shape
    assert not grad_weight.any()
