"""The routing losses against the literal loops, their gradients and their edges."""

import math

import oracle
import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_float64, assert_gradcheck

SHAPES = [s for s in inputs.SHAPES if s.routing in ("even", "skewed", "one", "empty")]


def routed(shape, device, mask=None):
    x = inputs.make_x(shape, dtype=torch.float64, device=device)
    router_weight = inputs.normal(shape.E, shape.D, seed=10, dtype=torch.float64, device=device)
    return wk.route(x, router_weight, shape.K, shape.C, mask=mask)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(shape, masked, device):
    """The demand is counted before dropping: the loss knows the choices, not the rows."""
    mask = inputs.make_mask(shape.T, device=device) if masked else None
    gate, plan, logits = routed(shape, device, mask)
    cpu_mask = None if mask is None else mask.cpu()
    balance = oracle.load_balance_loss(gate.probs.cpu(), gate.expert_index.cpu(), cpu_mask)
    z = oracle.router_z_loss(logits.cpu(), cpu_mask)
    assert_float64(wk.load_balance_loss(gate.probs, plan, mask).cpu(), torch.tensor(balance, dtype=torch.float64))
    assert_float64(wk.router_z_loss(logits, mask).cpu(), torch.tensor(z, dtype=torch.float64))


def test_balanced_routing_has_loss_one(device):
    index = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]], device=device)
    probs = torch.full((4, 4), 0.25, device=device)
    assert wk.load_balance_loss(probs, wk.plan_routing(index, 4, 1)).item() == 1.0


def test_all_on_one_expert_has_loss_of_num_experts(device):
    index = torch.zeros(8, 1, dtype=torch.int32, device=device)
    probs = torch.tensor([[1.0, 0, 0, 0]] * 8, device=device)
    assert wk.load_balance_loss(probs, wk.plan_routing(index, 4, 1)).item() == 4.0


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradcheck(masked, device):
    shape = inputs.ORDINARY
    mask = inputs.make_mask(shape.T, device=device) if masked else None
    gate, plan, logits = routed(shape, device, mask)
    probs, logits = gate.probs.detach().requires_grad_(), logits.detach().requires_grad_()
    assert_gradcheck(lambda p: wk.load_balance_loss(p, plan, mask), probs)
    assert_gradcheck(lambda z: wk.router_z_loss(z, mask), logits)


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_valid_tokens(num_tokens, device):
    mask = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    logits = torch.randn(num_tokens, 4, device=device, requires_grad=True)
    index = torch.full((num_tokens, 2), -1, dtype=torch.int32, device=device)
    balance = wk.load_balance_loss(logits.softmax(-1), wk.plan_routing(index, 4, 2), mask)
    z = wk.router_z_loss(logits, mask)
    assert balance.item() == 0.0
    assert z.item() == 0.0
    (balance + z).backward()
    assert not logits.grad.any()


def test_no_tokens_without_a_mask(device):
    gate, plan, logits = routed(inputs.NO_TOKENS, device)
    assert wk.load_balance_loss(gate.probs, plan).item() == 0.0
    assert wk.router_z_loss(logits).item() == 0.0


def test_nan_of_a_masked_token_reaches_nothing(device):
    shape = inputs.ORDINARY
    mask = inputs.make_mask(shape.T, device=device)
    gate, plan, logits = routed(shape, device, mask)
    for function, values in ((lambda p, m: wk.load_balance_loss(p, plan, m), gate.probs), (wk.router_z_loss, logits)):
        clean = values.detach().requires_grad_()
        strange = inputs.poisoned(values, ~mask).requires_grad_()
        expected, loss = function(clean, mask), function(strange, mask)
        assert torch.equal(loss, expected)
        expected.backward(), loss.backward()
        assert torch.equal(strange.grad, clean.grad)
        assert not strange.grad[~mask].any()


def test_z_loss_of_large_logits_is_finite(device):
    logits = torch.full((3, 4), 1e4, device=device)
    assert wk.router_z_loss(logits).item() == pytest.approx((1e4 + math.log(4)) ** 2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_z_loss_is_computed_in_fp32(dtype, device):
    logits = inputs.make_logits(inputs.ORDINARY, dtype=dtype, device=device)
    loss = wk.router_z_loss(logits)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(oracle.router_z_loss(logits.cpu()), rel=1e-5)


def test_gradient_of_balance_flows_through_probs_alone(device):
    shape = inputs.ORDINARY
    gate, plan, _ = routed(shape, device)
    probs = gate.probs.detach().requires_grad_()
    wk.load_balance_loss(probs, plan).backward()
    share = plan.expert_demand.double() / (shape.T * shape.K)
    assert_float64(probs.grad, (shape.E * share / shape.T).expand(shape.T, -1).contiguous())
