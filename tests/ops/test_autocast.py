"""Autocast: the GEMMs run in the autocast dtype, everything else follows its own rule; fp64 is never cast."""

import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_same_bits

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)


@pytest.fixture(params=HALVES, ids=str)
def half(request, device):
    with torch.autocast(device, request.param):
        yield request.param


def make_case(device, dtype=torch.float32):
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    x = inputs.make_x(shape, dtype=dtype, device=device)
    weight = inputs.make_gate_weight(shape, device=device)
    return plan, x, weight, inputs.make_experts(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_moe_ffn_casts_to_the_autocast_dtype(dtype, half, device, backend):
    plan, x, weight, experts = make_case(device, dtype)
    leaves = [t.requires_grad_() for t in (x, weight, *experts)]
    y = wk.moe_ffn(*leaves[:2], plan, *leaves[2:], backend=backend)
    assert y.dtype == half
    y.sum().backward()
    assert [t.grad.dtype for t in leaves] == [dtype, torch.float32, *[dtype] * 4]
    with torch.autocast(device, enabled=False):
        cast = [t.detach().to(half) for t in experts]
        expected = wk.moe_ffn(x.detach().to(half), weight.detach(), plan, *cast, backend=backend)
    assert_same_bits(y.detach(), expected)


def test_grouped_gemm_casts_mixed_inputs(half, device, backend):
    """fp32 master weights and half rows, as they meet under autocast."""
    plan, x, _, (w1, b1, _, _) = make_case(device)
    rows = wk.permute(x, plan, backend=backend)
    out = wk.grouped_gemm(rows.to(torch.bfloat16), w1, plan, b1.to(torch.float16), "gelu", backend=backend)
    assert out.dtype == half
    with torch.autocast(device, enabled=False):
        wide = rows.to(torch.bfloat16).to(half), w1.to(half), b1.to(torch.float16).to(half)
        expected = wk.grouped_gemm(*wide[:2], plan, wide[2], "gelu", backend=backend)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_permute_and_combine_follow_their_rows(dtype, half, device, backend):
    plan, x, weight, _ = make_case(device, dtype)
    x.requires_grad_(), weight.requires_grad_()
    rows = wk.permute(x, plan, backend=backend)
    y = wk.combine(rows, weight, plan, backend=backend)
    y.sum().backward()
    assert (rows.dtype, y.dtype, x.grad.dtype, weight.grad.dtype) == (dtype, dtype, dtype, torch.float32)
    with torch.autocast(device, enabled=False):
        assert_same_bits(y, wk.combine(rows, weight, plan, backend=backend))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gate_route_and_losses_stay_fp32(dtype, half, device, backend):
    shape = inputs.ORDINARY
    x = inputs.make_x(shape, dtype=dtype, device=device).requires_grad_()
    router_weight = inputs.normal(shape.E, shape.D, seed=10, device=device).requires_grad_()
    gate, plan, logits = wk.route(x, router_weight, capacity=6, backend=backend)
    again = wk.topk_gate(logits, 2, backend=backend)
    losses = wk.load_balance_loss(gate.probs, plan), wk.router_z_loss(logits)
    assert {t.dtype for t in (gate.weight, gate.probs, logits, again.weight, again.probs, *losses)} == {torch.float32}
    sum(losses).backward()
    assert (x.grad.dtype, router_weight.grad.dtype) == (dtype, torch.float32)
    with torch.autocast(device, enabled=False):
        plain = wk.route(x, router_weight, capacity=6, backend=backend)
        assert_same_bits(logits, plain[2])
        assert_same_bits(gate.weight, plain[0].weight)
        assert_same_bits(losses[0], wk.load_balance_loss(gate.probs, plan))
        assert_same_bits(losses[1], wk.router_z_loss(logits))


def test_float64_is_never_cast(half, device, backend):
    plan, x, weight, experts = make_case(device, torch.float64)
    y = wk.moe_ffn(x, weight, plan, *experts, backend=backend)
    rows = wk.permute(x, plan, backend=backend)
    out = wk.grouped_gemm(rows, experts[0], plan, experts[1], "gelu", backend=backend)
    gate, _, logits = wk.route(x, experts[0][:, :, 0], backend=backend)
    loss = wk.load_balance_loss(wk.topk_gate(logits, backend=backend).probs, plan)
    assert {t.dtype for t in (y, rows, out, gate.weight, gate.probs, logits, loss)} == {torch.float64}
    with torch.autocast(device, enabled=False):
        assert_same_bits(y, wk.moe_ffn(x, weight, plan, *experts, backend=backend))
        assert_same_bits(out, wk.grouped_gemm(rows, experts[0], plan, experts[1], "gelu", backend=backend))
        assert_same_bits(logits, wk.route(x, experts[0][:, :, 0], backend=backend)[2])


def test_layer_forward_and_backward(half, device, backend):
    layer = wk.MoELayer(8, 12, 4, backend=backend).to(device)
    x = inputs.make_x(inputs.ORDINARY, device=device).requires_grad_()
    y, aux = layer(x)
    assert (y.dtype, aux.balance_loss.dtype, aux.z_loss.dtype) == (half, torch.float32, torch.float32)
    (y.float().square().sum() + aux.balance_loss).backward()
    assert x.grad.dtype == torch.float32
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_grad_buffers(half, device, backend):
    """Buffers stay fp32 and get the half GEMMs' gradients without a rounding between."""
    plan, x, weight, experts = make_case(device)
    leaves = [t.requires_grad_() for t in (x, weight, *experts)]
    buffers = wk.GradBuffers(*(torch.zeros_like(t, requires_grad=False) for t in experts))
    wk.moe_ffn(*leaves[:2], plan, *leaves[2:], grad_buffers=buffers, backend=backend).sum().backward()
    assert all(t.grad is None for t in experts)
    wk.moe_ffn(*leaves[:2], plan, *leaves[2:], backend=backend).sum().backward()
    for name, buffer, parameter in zip(buffers._fields, buffers, experts, strict=True):
        scale = float(parameter.grad.abs().max())
        error = float((buffer - parameter.grad).abs().max())
        assert error <= 2 * torch.finfo(half).eps * scale, f"{name}: off by {error}"
