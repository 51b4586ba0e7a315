"""The hand-written backward of every stage against torch's autograd of the reference forward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from widenet_kernels.reference import combine, gate, grouped_gemm, moe, permute, route
from widenet_kernels.reference.activation import activate, activate_backward
from widenet_kernels.routing import ACTIVATIONS
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_float64

# Without rows or tokens the reference forward is a constant, and autograd has nothing to say.
SHAPES = [s for s in inputs.SHAPES if s.E < 100 and s.T and s.C != 0]
WIDE = torch.float64


def leaf(tensor):
    return tensor.detach().requires_grad_()


def random_like(tensor, seed=30):
    return inputs.normal(*tensor.shape, seed=seed, dtype=tensor.dtype)


def rows_of(plan, width, seed):
    return inputs.normal(plan.num_rows, width, seed=seed, dtype=WIDE)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activation(activation):
    z = leaf(inputs.normal(40, 6, seed=1, dtype=WIDE) * 3)
    out = activate(z, activation)
    grad = random_like(out)
    assert_float64(activate_backward(grad, z.detach(), activation), torch.autograd.grad(out, z, grad)[0])


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("through", ["weight", "probs", "both"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate(shape, through, normalize):
    logits = leaf(inputs.make_logits(shape, dtype=WIDE))
    weight, index, probs = gate.topk_gate(logits, shape.K, None, normalize)
    grad_weight = random_like(weight) if through != "probs" else None
    grad_probs = random_like(probs) if through != "weight" else None
    pairs = [(t, g) for t, g in ((weight, grad_weight), (probs, grad_probs)) if g is not None]
    (expected,) = torch.autograd.grad([t for t, _ in pairs], logits, [g for _, g in pairs])
    ours = gate.topk_gate_backward(grad_weight, grad_probs, weight.detach(), index, probs.detach(), normalize)
    assert_float64(ours, expected)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route(shape, normalize, masked):
    x = leaf(inputs.make_x(shape, dtype=WIDE))
    router_weight = leaf(inputs.normal(shape.E, shape.D, seed=10, dtype=WIDE))
    mask = inputs.make_mask(shape.T) if masked else None
    weight, index, probs, logits, *_ = route.route(x, router_weight, shape.K, shape.C, None, normalize, "choice", mask)
    grads = [random_like(t, seed) for seed, t in enumerate((weight, probs, logits))]
    expected = torch.autograd.grad((weight, probs, logits), (x, router_weight), grads)
    saved = (x.detach(), router_weight.detach(), weight.detach(), index, probs.detach())
    for ours, exact in zip(route.route_backward(*grads, *saved, normalize, True, True), expected, strict=True):
        assert_float64(ours, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_permute(shape):
    plan, x = inputs.make_plan(shape), leaf(inputs.make_x(shape, dtype=WIDE))
    rows = permute.permute(x, plan.choice_row, plan.row_choice)
    grad = random_like(rows)
    assert_float64(permute.permute_backward(grad, plan.choice_row), torch.autograd.grad(rows, x, grad)[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combine(shape):
    plan = inputs.make_plan(shape)
    rows, weight = leaf(rows_of(plan, shape.D, 6)), leaf(inputs.make_gate_weight(shape, dtype=WIDE))
    y = combine.combine(rows, weight, plan.choice_row, plan.row_choice)
    grad = random_like(y)
    expected = torch.autograd.grad(y, (rows, weight), grad, materialize_grads=True)
    ours = combine.combine_backward(grad, rows.detach(), weight.detach(), plan.choice_row, plan.row_choice, True, True)
    for result, exact in zip(ours, expected, strict=True):
        assert_float64(result, exact)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
@pytest.mark.parametrize("shape", [inputs.ORDINARY, inputs.ODD, inputs.ODD_PACKED], ids=str)
def test_grouped_gemm(shape, activation, bias):
    plan = inputs.make_plan(shape)
    places = (plan.expert_begin, plan.expert_count)
    w1, b1, _, _ = inputs.make_experts(shape, activation, bias=bias, dtype=WIDE)
    leaves = [leaf(rows_of(plan, shape.D, 6)), leaf(w1), *([leaf(b1)] if bias else [])]
    rows, weight = leaves[:2]
    out, z = grouped_gemm.grouped_gemm(rows, weight, leaves[2] if bias else None, *places, activation, True)
    grad = random_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    saved = (rows.detach(), weight.detach(), z.detach())
    ours = grouped_gemm.grouped_gemm_backward(grad, *saved, *places, activation, True, True, bias)
    for result, exact in zip(ours, expected, strict=False):
        assert_float64(result, exact)
    assert bias or ours[2].numel() == 0


def moe_case(shape, activation, bias):
    plan = inputs.make_plan(shape)
    places = (plan.choice_row, plan.row_choice, plan.expert_begin, plan.expert_count)
    x, weight = inputs.make_x(shape, dtype=WIDE), inputs.make_gate_weight(shape, dtype=WIDE)
    experts = inputs.make_experts(shape, activation, bias=bias, dtype=WIDE)
    x, weight, w1, b1, w2, b2 = leaves = [None if t is None else leaf(t) for t in (x, weight, *experts)]
    y, z = moe.moe_ffn(x, weight, *places, w1, b1, w2, b2, activation, True)
    grad = random_like(y)
    wanted = [t for t in leaves if t is not None]
    expected = iter(torch.autograd.grad(y, wanted, grad, materialize_grads=True))
    expected = [None if t is None else next(expected) for t in leaves]
    saved = [t if t is None else t.detach() for t in (grad, x, weight, *places, z, w1, w2, b2)]
    return [*saved, activation], expected


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [inputs.ORDINARY, inputs.ODD, inputs.ODD_PACKED], ids=str)
def test_moe_ffn(shape, activation, bias):
    saved, expected = moe_case(shape, activation, bias)
    ours = moe.moe_ffn_backward(*saved, True, True, True, bias, True, bias)
    for result, exact in zip(ours, expected, strict=True):
        assert result.numel() == 0 if exact is None else assert_float64(result, exact) is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moe_ffn_shapes(shape):
    saved, expected = moe_case(shape, "gelu", True)
    for result, exact in zip(moe.moe_ffn_backward(*saved, *[True] * 6), expected, strict=True):
        assert_float64(result, exact)


class Products(TorchDispatchMode):
    """How many there are."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("wanted", "products"), list(enumerate([2, 1, 2, 1, 1, 0])), ids=["x", "weight", "w1", "b1", "w2", "b2"]
)
def test_moe_ffn_of_one_input_alone(wanted, products):
    """With no more products than lead to it, for each expert."""
    saved, expected = moe_case(inputs.ORDINARY, "gelu", True)
    with Products() as made:
        results = moe.moe_ffn_backward(*saved, *(i == wanted for i in range(6)))
    assert made.count == products * inputs.ORDINARY.E
    for i, result in enumerate(results):
        if i == wanted:
            assert_float64(result, expected[i])
        else:
            assert result.numel() == 0


def test_accumulate_adds_what_the_backward_gives():
    saved, expected = moe_case(inputs.ORDINARY, "gelu", True)
    buffers = [torch.ones(t.shape, dtype=WIDE) for t in expected[2:]]
    grad_x, grad_weight = moe.moe_ffn_backward_accumulate(*saved, True, True, *buffers)
    assert_float64(grad_x, expected[0])
    assert_float64(grad_weight, expected[1])
    for buffer, exact in zip(buffers, expected[2:], strict=True):
        assert_float64(buffer - 1, exact)
