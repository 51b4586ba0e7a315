"""moe_ffn: the four stages as one op, its gradients, and gradients into buffers."""

import eager
import oracle
import pytest
import torch
from test_grouped_gemm import LAYOUTS

import widenet_kernels as wk
from widenet_kernels.routing import ACTIVATIONS
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import (
    assert_float64,
    assert_gradcheck,
    assert_op_as_good_as,
    assert_same_bits,
    value_and_grads,
)

OP = "moe_ffn"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("w1", "b1", "w2", "b2")


def make_case(shape, activation="gelu", dtype=torch.float32, device="cpu", bias=True, weight_dtype=None):
    weight_dtype = weight_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    experts = inputs.make_experts(shape, activation, bias=bias, dtype=dtype, device=device)
    return {
        "x": inputs.make_x(shape, dtype=dtype, device=device),
        "weight": inputs.make_gate_weight(shape, dtype=weight_dtype, device=device),
        **dict(zip(NAMES, experts, strict=True)),
    }


def op(plan, activation, backend, **options):
    def run(x, weight, w1, b1, w2, b2):
        return wk.moe_ffn(x, weight, plan, w1, b1, w2, b2, activation, backend=backend, **options)

    return run


def plain(plan, activation):
    return lambda x, weight, w1, b1, w2, b2: eager.moe_ffn(x, weight, plan, w1, b1, w2, b2, activation)


@pytest.mark.parametrize("shape", inputs.SHAPES, ids=str)
def test_oracle(shape, device, backend):
    case = make_case(shape, dtype=torch.float64)
    expected = oracle.moe_ffn(plan=inputs.make_plan(shape), activation="gelu", **case)
    plan = inputs.make_plan(shape, device=device)
    y = op(plan, "gelu", backend)(**{name: t.to(device) for name, t in case.items()})
    assert_float64(y.cpu(), expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_against_the_oracle(activation, bias, device, backend):
    shape = inputs.ODD
    case = make_case(shape, activation, torch.float64, bias=bias)
    expected = oracle.moe_ffn(plan=inputs.make_plan(shape), activation=activation, **case)
    plan = inputs.make_plan(shape, device=device)
    y = op(plan, activation, backend)(**{name: None if t is None else t.to(device) for name, t in case.items()})
    assert_float64(y.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", inputs.SHAPES, ids=str)
def test_as_good_as_torch(shape, dtype, device, backend):
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, dtype=dtype, device=device)
    assert_op_as_good_as(op(plan, "gelu", backend), plain(plan, "gelu"), case)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_as_good_as_torch(activation, dtype, bias, device, backend):
    shape = inputs.WIDE
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, activation, dtype, device, bias)
    assert_op_as_good_as(op(plan, activation, backend), plain(plan, activation), case)


@pytest.mark.parametrize("missing", ["b1", "b2"])
def test_one_bias_alone(missing, device, backend):
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    case = {**make_case(shape, dtype=torch.float64, device=device), missing: None}
    assert_op_as_good_as(op(plan, "gelu", backend), plain(plan, "gelu"), case)


@pytest.mark.parametrize(
    ("shape", "dtype"), [(inputs.LARGE_CAPACITY, torch.float64), (inputs.MANY_TOKENS, torch.float32)], ids=str
)
def test_large(shape, dtype, device, backend, several_threads):
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, "silu", dtype, device)
    assert_op_as_good_as(op(plan, "silu", backend), plain(plan, "silu"), case)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_experts(dtype, activation, bias, device, backend, several_threads):
    shape = inputs.SMALL_EXPERTS
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, activation, dtype, device, bias)
    assert_op_as_good_as(op(plan, activation, backend), plain(plan, activation), case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("capacity", [3, None], ids=["C3", "dropless"])
def test_gradcheck(capacity, activation, device, backend):
    shape = inputs.Shape(5, 3, 2, 3, 2, capacity, "skewed", "small")
    plan = inputs.make_plan(shape, device=device)
    leaves = [t.requires_grad_() for t in make_case(shape, activation, torch.float64, device).values()]
    assert_gradcheck(op(plan, activation, backend), leaves)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda d: f"weight-{d}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, weight_dtype, device, backend):
    case = make_case(inputs.ORDINARY, dtype=dtype, weight_dtype=weight_dtype, device=device)
    results = value_and_grads(op(inputs.make_plan(inputs.ORDINARY, device=device), "gelu", backend), case)
    weight = results.pop("grad of weight")
    assert weight.dtype == weight_dtype
    assert {t.dtype for t in results.values()} == {dtype}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [inputs.ORDINARY, inputs.DROPLESS], ids=str)
def test_gate_weights_of_zero(shape, dtype, device, backend):
    """Their gradient does not vanish with them."""
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, dtype=dtype, device=device)
    case["weight"][::2] = 0.0
    case["weight"][1] = -0.0
    assert_op_as_good_as(op(plan, "gelu", backend), plain(plan, "gelu"), case)
    served = plan.choice_row[0] >= 0
    assert served.any()
    assert value_and_grads(op(plan, "gelu", backend), case)["grad of weight"][0][served].all()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("shape", [s for s in inputs.SHAPES if s.T and s.E < 100], ids=str)
def test_nan_in_unused_places_reaches_nothing(shape, activation, device, backend):
    plan = inputs.make_plan(shape, device=device)
    dropped, empty = inputs.dropped_choices(plan), plan.expert_count == 0
    nobody = dropped.all(dim=1)
    case = make_case(shape, activation, device=device)
    poisoned = {name: inputs.poisoned(t, empty) for name, t in case.items() if name in NAMES}
    poisoned |= {"x": inputs.poisoned(case["x"], nobody), "weight": inputs.poisoned(case["weight"], dropped)}

    def run(case, poison):
        leaves = {name: case[name].detach().requires_grad_() for name in ("x", "weight", *NAMES)}
        y = op(plan, activation, backend)(**leaves)
        grad = inputs.normal(shape.T, shape.D, seed=5, device=device)
        grads = torch.autograd.grad(y, list(leaves.values()), inputs.poisoned(grad, nobody) if poison else grad)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    clean, ours = run(case, poison=False), run(poisoned, poison=True)
    for name in clean:
        assert_same_bits(ours[name], clean[name], name)
        assert ours[name].isfinite().all(), name
    assert not ours["y"][nobody].any()
    assert not ours["x"][nobody].any()
    assert not ours["weight"][dropped].any()
    for name in NAMES:
        assert not ours[name][empty].any(), name


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_expert_weight_layouts(layout, activation, device, backend):
    shape = inputs.ODD
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, activation, torch.float64, device)
    for name in ("w1", "w2"):
        strange = {**case, name: LAYOUTS[layout](case[name])}
        ours = value_and_grads(op(plan, activation, backend), strange)
        same = value_and_grads(op(plan, activation, backend), {**case, name: strange[name].contiguous()})
        for result in ours:
            assert_float64(ours[result], same[result], f"{name}: {result}")


def test_strided_x_expanded_weight_biases_and_gradient(device, backend):
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, dtype=torch.float64, device=device)
    case["weight"] = case["weight"][:, :1].expand(-1, shape.K)
    for name in ("b1", "b2"):
        case[name] = case[name][:1].expand(shape.E, -1)

    def run(case, grad):
        leaves = {name: t.detach().requires_grad_() for name, t in case.items()}
        y = op(plan, "gelu", backend)(**leaves)
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)

    ones = torch.ones(shape.T, shape.D, dtype=torch.float64, device=device)
    expected = run({name: t.contiguous() for name, t in case.items()}, ones)
    for x in (case["x"].t().contiguous().t(), torch.stack([case["x"], -case["x"]], -1)[..., 0]):
        for grad in (ones[:1, :1].expand_as(ones), ones.t().contiguous().t()):
            for result, exact in zip(run({**case, "x": x}, grad), expected, strict=True):
                assert_float64(result, exact)


@pytest.mark.parametrize("frozen", ["x", "weight", "w1", "b1", "w2", "b2", "all but x", "all but weight", "all but b2"])
def test_frozen_inputs(frozen, device, backend):
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, device=device)
    wanted = {frozen[8:]} if frozen.startswith("all but") else case.keys() - {frozen}
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in case.items()}
    op(plan, "gelu", backend)(**leaves).sum().backward()
    full = {name: t.detach().requires_grad_() for name, t in case.items()}
    op(plan, "gelu", backend)(**full).sum().backward()
    for name, leaf in leaves.items():
        if name in wanted:
            assert_same_bits(leaf.grad, full[name].grad, name)
        else:
            assert leaf.grad is None, name


def test_nothing_is_saved_without_gradients(device, backend):
    """The private op gives the pre-activation back as a second output: of no rows when nobody will need it."""
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, device=device)
    expected = op(plan, "gelu", backend)(**case)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            y = op(plan, "gelu", backend)(**{name: t.requires_grad_() for name, t in case.items()})
        assert not saved
        assert_same_bits(y, expected)
        op(plan, "gelu", backend)(**case)
    sizes = sorted(t.numel() for t in saved if t.is_floating_point())
    pre_activation = plan.num_rows * shape.F
    assert sizes == sorted([pre_activation, *(case[n].numel() for n in ("x", "weight", "w1", "w2", "b2"))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("shape", [inputs.ODD, inputs.SMALL_EXPERTS], ids=str)
def test_grad_buffers(shape, layout, dtype, device, backend, several_threads):
    """The buffers get what the gradients would have been, on top of what they held; x and weight theirs as ever."""
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, dtype=dtype, device=device)
    if layout != "contiguous":
        case |= {name: LAYOUTS[layout](case[name]) for name in ("w1", "w2")}
    leaves = {name: t.detach().requires_grad_() for name, t in case.items()}
    buffers = wk.GradBuffers(*(torch.full(case[name].shape, 0.5, device=device) for name in NAMES))
    grad = inputs.normal(shape.T, shape.D, seed=5, dtype=dtype, device=device)
    y = op(plan, "gelu", backend, grad_buffers=buffers)(**leaves)
    y.backward(grad)
    assert all(leaves[name].grad is None for name in NAMES)

    full = {name: t.detach().requires_grad_() for name, t in case.items()}
    expected = op(plan, "gelu", backend)(**full)
    expected.backward(grad)
    assert_same_bits(y, expected)
    assert_same_bits(leaves["x"].grad, full["x"].grad)
    assert_same_bits(leaves["weight"].grad, full["weight"].grad)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for name, buffer in zip(NAMES, buffers, strict=True):
        exact = full[name].grad.double()
        error = (buffer.double() - 0.5 - exact).abs().max()
        assert error <= 4 * eps * max(1.0, float(exact.abs().max())), f"{name}: off by {error}"


def test_some_grad_buffers_alone(device, backend):
    """A buffer of None: no gradient for that one, and no work for it."""
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    leaves = {name: t.requires_grad_() for name, t in make_case(shape, device=device).items()}
    buffers = wk.GradBuffers(None, torch.zeros_like(leaves["b1"]), torch.zeros_like(leaves["w2"]), None)
    op(plan, "gelu", backend, grad_buffers=buffers)(**leaves).sum().backward()
    full = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    op(plan, "gelu", backend)(**full).sum().backward()
    torch.testing.assert_close(buffers.b1, full["b1"].grad)
    torch.testing.assert_close(buffers.w2, full["w2"].grad)
    assert leaves["w1"].grad is None


def test_grad_buffers_over_several_uses(device, backend):
    """The second use must not find its inputs modified by the first one's backward."""
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, dtype=torch.float64, device=device)

    def run(buffers):
        leaves = {name: t.detach().requires_grad_() for name, t in case.items()}
        x, y = leaves.pop("x"), None
        for _ in range(3):
            y = op(plan, "gelu", backend, grad_buffers=buffers)(x if y is None else y, **leaves)
        y.sum().backward()
        return x.grad, leaves

    buffers = wk.GradBuffers(*(torch.zeros(case[name].shape, device=device) for name in NAMES))
    grad_x, _ = run(buffers)
    expected_x, expected = run(None)
    assert_same_bits(grad_x, expected_x)
    for name, buffer in zip(NAMES, buffers, strict=True):
        torch.testing.assert_close(buffer, expected[name].grad.float(), msg=lambda text, n=name: f"{n}: {text}")
