"""grouped_gemm: every expert's linear layer and activation on exactly its own rows."""

import eager
import oracle
import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.routing import ACTIVATIONS
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import (
    assert_as_good_as,
    assert_float64,
    assert_gradcheck,
    assert_op_as_good_as,
    assert_same_bits,
    value_and_grads,
)

OP = "grouped_gemm"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make_case(shape, activation="gelu", dtype=torch.float32, device="cpu", bias=True):
    num_rows = shape.T * shape.K if shape.C is None else shape.E * shape.C
    weight, bias, _, _ = inputs.make_experts(shape, activation or "gelu", dtype=dtype, device=device, bias=bias)
    return {
        "rows": inputs.normal(num_rows, shape.D, seed=6, dtype=dtype, device=device),
        "weight": weight,
        "bias": bias,
    }


def op(plan, activation, backend):
    return lambda rows, weight, bias: wk.grouped_gemm(rows, weight, plan, bias, activation, backend=backend)


@pytest.mark.parametrize("shape", inputs.SHAPES, ids=str)
def test_oracle(shape, device, backend):
    plan, case = inputs.make_plan(shape, device=device), make_case(shape, dtype=torch.float64)
    out = op(plan, "gelu", backend)(**{name: t.to(device) for name, t in case.items()})
    expected = oracle.grouped_gemm(case["rows"], case["weight"], inputs.make_plan(shape), case["bias"], "gelu")
    assert_float64(out.cpu(), expected)
    assert not out[inputs.unused_rows(plan)].any()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations_against_the_oracle(activation, bias, device, backend):
    shape = inputs.ODD
    plan, case = inputs.make_plan(shape), make_case(shape, activation, torch.float64, bias=bias)
    expected = oracle.grouped_gemm(case["rows"], case["weight"], plan, case["bias"], activation)
    on_device = {name: None if t is None else t.to(device) for name, t in case.items()}
    out = op(inputs.make_plan(shape, device=device), activation, backend)(**on_device)
    assert_float64(out.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", inputs.SHAPES, ids=str)
def test_as_good_as_torch(shape, dtype, device, backend):
    plan = inputs.make_plan(shape, device=device)
    assert_op_as_good_as(
        op(plan, "gelu", backend),
        lambda rows, weight, bias: eager.grouped_gemm(rows, weight, plan, bias, "gelu"),
        make_case(shape, dtype=dtype, device=device),
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations_as_good_as_torch(activation, dtype, bias, device, backend):
    shape = inputs.WIDE
    plan = inputs.make_plan(shape, device=device)
    assert_op_as_good_as(
        op(plan, activation, backend),
        lambda rows, weight, bias: eager.grouped_gemm(rows, weight, plan, bias, activation),
        make_case(shape, activation, dtype, device, bias),
    )


@pytest.mark.parametrize("activation", [None, "gelu", "swiglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_experts(dtype, activation, device, backend, several_threads):
    plan = inputs.make_plan(inputs.SMALL_EXPERTS, device=device)
    assert_op_as_good_as(
        op(plan, activation, backend),
        lambda rows, weight, bias: eager.grouped_gemm(rows, weight, plan, bias, activation),
        make_case(inputs.SMALL_EXPERTS, activation, dtype, device),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(activation, device, backend):
    """Where exp overflows and erf saturates, forward and gradient stay finite and right."""
    plan = wk.plan_routing(torch.zeros(9, 1, dtype=torch.int32, device=device), 1, 9)
    rows = torch.tensor([-1e4, -300.0, -90.0, -20.0, 0.0, 20.0, 90.0, 300.0, 1e4], device=device)[:, None]
    weight = torch.ones(1, 1, 2 if activation in ("swiglu", "geglu") else 1, device=device)
    case = {"rows": rows, "weight": weight, "bias": None}
    ours = value_and_grads(op(plan, activation, backend), case)
    assert all(t.isfinite().all() for t in ours.values())
    plain = lambda rows, weight, bias: eager.grouped_gemm(rows, weight, plan, bias, activation)  # noqa: E731
    for name, exact in value_and_grads(plain, {"rows": rows.double(), "weight": weight.double(), "bias": None}).items():
        torch.testing.assert_close(
            ours[name].double(), exact, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_gradcheck(activation, device, backend):
    shape = inputs.Shape(5, 3, 2, 3, 2, 3, "skewed", "small")
    plan = inputs.make_plan(shape, device=device)
    leaves = [t.requires_grad_() for t in make_case(shape, activation, torch.float64, device).values()]
    assert_gradcheck(op(plan, activation, backend), leaves)


@pytest.mark.parametrize("activation", [None, "gelu", "swiglu"])
@pytest.mark.parametrize("shape", [s for s in inputs.SHAPES if s.T and s.E < 100], ids=str)
def test_nan_in_unused_rows_reaches_nothing(shape, activation, device, backend):
    plan = inputs.make_plan(shape, device=device)
    unused, empty = inputs.unused_rows(plan), plan.expert_count == 0
    case = make_case(shape, activation, device=device)
    function = op(plan, activation, backend)

    def run(case, poison):
        leaves = [t.detach().requires_grad_() for t in case.values()]
        out = function(*leaves)
        grad = inputs.normal(*out.shape, seed=8, device=device)
        return out.detach(), *torch.autograd.grad(out, leaves, inputs.poisoned(grad, unused) if poison else grad)

    clean = run(case, poison=False)
    case = {**case, "rows": inputs.poisoned(case["rows"], unused), "weight": inputs.poisoned(case["weight"], empty)}
    ours = run({**case, "bias": inputs.poisoned(case["bias"], empty)}, poison=True)
    for result, expected in zip(ours, clean, strict=True):
        assert_same_bits(result, expected)
        assert result.isfinite().all()
    out, grad_rows, grad_weight, grad_bias = ours
    assert not out[unused].any()
    assert not grad_rows[unused].any()
    assert not grad_weight[empty].any()
    assert not grad_bias[empty].any()


def gaps(t):
    """The same values, with storage between the rows and between the experts."""
    wide = torch.full((t.shape[0], t.shape[1] + 3, t.shape[2] + 5), torch.nan, dtype=t.dtype, device=t.device)
    wide[:, : t.shape[1], : t.shape[2]] = t
    return wide[:, : t.shape[1], : t.shape[2]]


# "rounding": a transposed operand is another call into the GEMM, whose sums may come in another order
LAYOUTS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "gaps": gaps,
    "transposed with gaps": lambda t: gaps(t.transpose(1, 2)).transpose(1, 2),
    "experts innermost": lambda t: t.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "no unit stride": lambda t: torch.stack([t, -t], -1)[..., 0],
    "experts expanded": lambda t: t[:1].expand_as(t),
    "reversed experts": lambda t: t.flip(0).contiguous().flip(0),
}


@pytest.mark.parametrize("activation", [None, "gelu", "geglu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_layouts(layout, activation, device, backend):
    shape = inputs.ODD
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, activation, torch.float64, device)
    case["weight"] = LAYOUTS[layout](case["weight"])
    ours = value_and_grads(op(plan, activation, backend), case)
    plain = value_and_grads(op(plan, activation, backend), {**case, "weight": case["weight"].contiguous()})
    for name in ours:
        assert_float64(ours[name], plain[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_layouts_in_other_dtypes(layout, dtype, device, backend):
    """Whose products may be those of another GEMM than float64's."""
    plan = inputs.make_plan(inputs.ODD, device=device)
    case = make_case(inputs.ODD, "gelu", dtype, device)
    case["weight"] = LAYOUTS[layout](case["weight"])
    ours = value_and_grads(op(plan, "gelu", backend), case)
    plain = value_and_grads(op(plan, "gelu", "reference"), {**case, "weight": case["weight"].contiguous()})
    exact = value_and_grads(op(plan, "gelu", "reference"), {name: t.double() for name, t in case.items()})
    for name in ours:
        assert_as_good_as(ours[name], plain[name], exact[name], name)


def test_expanded_bias_strided_rows_and_expanded_gradient(device, backend):
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    case = make_case(shape, "gelu", torch.float64, device)
    case["bias"] = case["bias"][:1].expand(shape.E, -1)

    def run(rows, bias, grad):
        leaves = [t.detach().requires_grad_() for t in (rows, case["weight"], bias)]
        out = op(plan, "gelu", backend)(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    rows = case["rows"]
    ones = torch.ones(plan.num_rows, shape.F, dtype=torch.float64, device=device)
    expected = run(rows, case["bias"].contiguous(), ones)
    for strange in (rows.t().contiguous().t(), torch.stack([rows, -rows], -1)[..., 0]):
        for grad in (ones[:1, :1].expand_as(ones), ones.t().contiguous().t()):
            for result, exact in zip(run(strange, case["bias"], grad), expected, strict=True):
                assert_float64(result, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, device, backend):
    shape = inputs.ORDINARY
    case = make_case(shape, dtype=dtype, device=device)
    results = value_and_grads(op(inputs.make_plan(shape, device=device), "silu", backend), case)
    assert {t.dtype for t in results.values()} == {dtype}


@pytest.mark.parametrize("frozen", ["rows", "weight", "bias"])
def test_frozen_inputs(frozen, device, backend):
    shape = inputs.ORDINARY
    case = make_case(shape, device=device)
    leaves = {name: t.requires_grad_(name != frozen) for name, t in case.items()}
    function = op(inputs.make_plan(shape, device=device), "gelu", backend)
    function(**leaves).sum().backward()
    full = {name: t.detach().requires_grad_() for name, t in case.items()}
    function(**full).sum().backward()
    assert leaves[frozen].grad is None
    for name in case.keys() - {frozen}:
        assert_same_bits(leaves[name].grad, full[name].grad, name)
