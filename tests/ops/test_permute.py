"""permute: data movement, so bit for bit; its gradient is a sum in k order."""

import eager
import oracle
import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_gradcheck, assert_op_as_good_as, assert_same_bits

OP = "permute"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", inputs.SHAPES, ids=str)
def test_forward_is_bit_equal(shape, dtype, device, backend):
    x = inputs.make_x(shape, dtype=dtype)
    plan = inputs.make_plan(shape)
    expected = oracle.permute(x, plan)
    plan = inputs.make_plan(shape, device=device)
    rows = wk.permute(x.to(device), plan, backend=backend)
    assert_same_bits(rows.cpu(), expected)
    assert not rows[inputs.unused_rows(plan)].any()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", inputs.LARGE_SHAPES, ids=str)
def test_large(shape, dtype, device, backend, several_threads):
    x = inputs.make_x(shape, dtype=dtype, device=device)
    plan = inputs.make_plan(shape, device=device)
    x.requires_grad_()
    rows = wk.permute(x, plan, backend=backend)
    assert_same_bits(rows.detach(), eager.permute(x.detach(), plan))
    rows.backward(rows.detach())
    served = (plan.choice_row >= 0).sum(1, keepdim=True)  # twice at most: exact
    assert_same_bits(x.grad, x.detach() * served.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", inputs.SHAPES, ids=str)
def test_gradient(shape, dtype, device, backend):
    plan = inputs.make_plan(shape, device=device)
    assert_op_as_good_as(
        lambda x: wk.permute(x, plan, backend=backend),
        lambda x: eager.permute(x, plan),
        {"x": inputs.make_x(shape, dtype=dtype, device=device)},
    )


def test_gradcheck(device, backend):
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    x = inputs.make_x(shape, dtype=torch.float64, device=device).requires_grad_()
    assert_gradcheck(lambda x: wk.permute(x, plan, backend=backend), x)


def test_gradient_is_summed_in_k_order_in_fp32(device, backend):
    """1 + 2**-24 + 2**-24 is 1 in this order and 1 + 2**-23 in the other; in bf16 the small ones would vanish."""
    index = torch.tensor([[0, 1, 2]], device=device)
    plan = wk.plan_routing(index, 3, 1)
    for values, total in (([1.0, 2**-24, 2**-24], 1.0), ([2**-24, 2**-24, 1.0], 1.0 + 2**-23)):
        x = torch.zeros(1, 1, device=device, requires_grad=True)
        wk.permute(x, plan, backend=backend).backward(torch.tensor(values, device=device)[:, None])
        assert x.grad.item() == total
    x = torch.zeros(1, 1, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.tensor([1.0, 2**-8, 2**-8], dtype=torch.bfloat16, device=device)[:, None]
    wk.permute(x, plan, backend=backend).backward(grad)
    assert x.grad.item() == 1.0 + 2**-7


@pytest.mark.parametrize("shape", [inputs.ORDINARY, inputs.DROPLESS], ids=str)
def test_strided_x_and_expanded_gradient(shape, device, backend):
    plan = inputs.make_plan(shape, device=device)
    x = inputs.make_x(shape, device=device)
    expected = wk.permute(x, plan, backend=backend)
    for strange in (x.t().contiguous().t(), torch.stack([x, -x], -1)[..., 0], torch.cat([x, x], 1)[:, : shape.D]):
        strange = strange.detach().requires_grad_()
        rows = wk.permute(strange, plan, backend=backend)
        assert_same_bits(rows.detach(), expected)
        rows.sum().backward()  # a gradient of stride 0
        served = (plan.choice_row >= 0).sum(1, keepdim=True).float()
        assert_same_bits(strange.grad, served.expand(-1, shape.D))
    expanded = x[:1].expand(shape.T, shape.D)
    assert_same_bits(
        wk.permute(expanded, plan, backend=backend), wk.permute(expanded.contiguous(), plan, backend=backend)
    )


@pytest.mark.parametrize("shape", [inputs.ORDINARY, inputs.ONE_PACKED, inputs.ODD_PACKED], ids=str)
def test_nan_in_unused_places_reaches_nothing(shape, device, backend):
    plan = inputs.make_plan(shape, device=device)
    x = inputs.make_x(shape, device=device)
    nobody = inputs.dropped_choices(plan).all(dim=1)
    clean = wk.permute(x, plan, backend=backend)
    x = inputs.poisoned(x, nobody).requires_grad_()
    rows = wk.permute(x, plan, backend=backend)
    assert_same_bits(rows.detach(), clean)
    grad = inputs.normal(plan.num_rows, shape.D, seed=5, device=device)
    rows.backward(inputs.poisoned(grad, inputs.unused_rows(plan)))
    assert x.grad.isfinite().all()
    assert not x.grad[nobody].any()
