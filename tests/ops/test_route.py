"""route: the router's logits in fp32 products, then exactly topk_gate and plan_routing."""

import math

import oracle
import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_float64, assert_gradcheck, assert_op_as_good_as, assert_same_bits

OP = "route"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PRIORITIES = ("choice", "token", "score")


def make_router_weight(shape, dtype=torch.float32, device="cpu"):
    return inputs.normal(shape.E, shape.D, seed=10, dtype=dtype, device=device)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("shape", inputs.SHAPES, ids=str)
def test_is_logits_gate_and_plan(shape, normalize, masked, device, backend):
    x = inputs.make_x(shape, dtype=torch.float64, device=device)
    router_weight = make_router_weight(shape, torch.float64, device)
    noise = inputs.normal(shape.T, shape.E, seed=7, dtype=torch.float64, device=device)
    mask = inputs.make_mask(shape.T, device=device) if masked else None
    for priority in PRIORITIES:
        options = {"noise": noise, "normalize": normalize, "priority": priority, "mask": mask, "backend": backend}
        gate, plan, logits = wk.route(x, router_weight, shape.K, shape.C, **options)
        assert_float64(logits.cpu(), oracle.logits(x.cpu(), router_weight.cpu()), "logits")

        weight, index, probs = oracle.topk_gate(logits.cpu(), shape.K, noise.cpu(), normalize)
        if masked:
            weight[~mask.cpu()], index[~mask.cpu()] = 0.0, -1
        assert_same_bits(gate.expert_index.cpu(), index)
        assert_float64(gate.weight.cpu(), weight, "weight")
        assert_float64(gate.probs.cpu(), probs, "probs")
        expected = oracle.plan_routing(index, shape.E, shape.C, priority, gate.weight.cpu())
        assert {name: getattr(plan, name).tolist() for name in plan._fields[:5]} == expected
        num_rows = shape.T * shape.K if shape.C is None else shape.E * shape.C
        assert plan[5:] == (num_rows, shape.E, shape.K, shape.C)


@pytest.mark.parametrize("shape", [*inputs.SHAPES, inputs.MANY_TOKENS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_and_plan_are_those_of_its_logits(shape, dtype, device, backend):
    """The very bits of topk_gate and plan_routing on the same backend."""
    x = inputs.make_x(shape, dtype=dtype, device=device)
    gate, plan, logits = wk.route(x, make_router_weight(shape, dtype, device), shape.K, shape.C, backend=backend)
    again = wk.topk_gate(logits, shape.K, backend=backend)
    for name in gate._fields:
        assert_same_bits(getattr(gate, name), getattr(again, name), name)
    same_plan = wk.plan_routing(gate.expert_index, shape.E, shape.C, backend=backend)
    for name in plan._fields[:5]:
        assert_same_bits(getattr(plan, name), getattr(same_plan, name), name)


def plain_logits(x, router_weight):
    wide = torch.float64 if torch.float64 in (x.dtype, router_weight.dtype) else torch.float32
    return x.to(wide) @ router_weight.to(wide).t()


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda d: f"router-{d}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [inputs.ORDINARY, inputs.ODD, inputs.WIDE], ids=str)
def test_logits_and_their_gradient(shape, dtype, weight_dtype, device, backend):
    """fp32 products, whatever the dtypes; gradients in the dtype of each input."""
    assert_op_as_good_as(
        lambda x, router_weight: wk.route(x, router_weight, shape.K, shape.C, backend=backend)[2],
        plain_logits,
        {
            "x": inputs.make_x(shape, dtype=dtype, device=device),
            "router_weight": make_router_weight(shape, weight_dtype, device),
        },
    )


def test_logits_of_half_inputs_are_not_rounded_to_half(device, backend):
    x = torch.tensor([[1.0, 2**-9]], dtype=torch.bfloat16, device=device)
    router_weight = torch.ones(2, 2, dtype=torch.bfloat16, device=device)
    assert wk.route(x, router_weight, backend=backend)[2].tolist() == [[1 + 2**-9] * 2]


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("frozen", [None, "x", "router_weight"], ids=lambda f: f"frozen-{f}")
def test_gradcheck(normalize, masked, frozen, device, backend):
    shape = inputs.Shape(6, 3, 2, 4, 2, 3, "even", "small")
    x = inputs.make_x(shape, dtype=torch.float64, device=device).requires_grad_(frozen != "x")
    router_weight = make_router_weight(shape, torch.float64, device).requires_grad_(frozen != "router_weight")
    noise = inputs.normal(6, 4, seed=7, dtype=torch.float64, device=device)
    mask = inputs.make_mask(6, device=device) if masked else None

    def outputs(x, router_weight):
        gate, _, logits = wk.route(x, router_weight, 2, 3, noise=noise, normalize=normalize, mask=mask, backend=backend)
        return gate.weight, gate.probs, logits

    assert_gradcheck(outputs, (x, router_weight))


@pytest.mark.parametrize("through", ["weight", "probs", "logits"])
def test_gradient_through_one_output_alone(through, device, backend):
    shape = inputs.ORDINARY
    leaves = [
        inputs.make_x(shape, dtype=torch.float64, device=device),
        make_router_weight(shape, torch.float64, device),
    ]
    index = wk.route(*leaves, backend=backend)[0].expert_index.long()

    def pick(logits):
        probs = logits.softmax(-1)
        return {"weight": probs.gather(1, index), "probs": probs, "logits": logits}[through]

    def op(x, router_weight):
        gate, _, logits = wk.route(x, router_weight, backend=backend)
        return {"weight": gate.weight, "probs": gate.probs, "logits": logits}[through]

    case = dict(zip(("x", "router_weight"), leaves, strict=True))
    assert_op_as_good_as(op, lambda x, router_weight: pick(plain_logits(x, router_weight)), case)


@pytest.mark.parametrize("masked", ["some", "every token"])
@pytest.mark.parametrize("capacity", [3, None], ids=["C3", "dropless"])
def test_masked_tokens_ask_for_nothing(masked, capacity, device, backend):
    shape = inputs.ORDINARY
    x, router_weight = inputs.make_x(shape, device=device), make_router_weight(shape, device=device)
    mask = (
        inputs.make_mask(shape.T, device=device)
        if masked == "some"
        else torch.zeros(16, dtype=torch.bool, device=device)
    )
    gate, plan, _ = wk.route(x, router_weight, 2, capacity, mask=mask, normalize=True, backend=backend)
    assert (gate.expert_index[~mask] == -1).all()
    assert (gate.weight[~mask] == 0).all()
    assert (plan.choice_row[~mask] == -1).all()
    assert int(plan.expert_demand.sum()) == 2 * int(mask.sum())
    free = wk.route(x, router_weight, 2, capacity, normalize=True, backend=backend)[0]
    assert_same_bits(gate.weight[mask], free.weight[mask])
    assert_same_bits(gate.expert_index[mask], free.expert_index[mask])


def test_masked_tokens_get_no_gradient_through_weight(device, backend):
    shape = inputs.ORDINARY
    mask = inputs.make_mask(shape.T, device=device)
    x = inputs.make_x(shape, device=device).requires_grad_()
    for normalize in (False, True):
        gate, _, _ = wk.route(
            x, make_router_weight(shape, device=device), mask=mask, normalize=normalize, backend=backend
        )
        grad = inputs.poisoned(inputs.normal(shape.T, 2, seed=3, device=device), ~mask)
        (grad_x,) = torch.autograd.grad(gate.weight, x, grad)
        assert not grad_x[~mask].any()
        assert grad_x[mask].any()
        assert grad_x.isfinite().all()


def test_score_priority_ranks_by_the_weights_found(device, backend):
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [4.0, 0.0]], device=device)
    router_weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    _, plan, _ = wk.route(x, router_weight, 1, 2, priority="score", backend=backend)
    assert plan.row_choice.tolist() == [3, 1, -1, -1]


def test_nan_token_routes_like_any_other(device, backend):
    x = torch.tensor([[math.nan, 0.0], [1.0, 0.0]], device=device)
    router_weight = torch.eye(3, 2, device=device)
    gate, plan, _ = wk.route(x, router_weight, 2, 2, backend=backend)
    assert gate.expert_index.tolist() == [[0, 1], [0, 1]]
    assert gate.weight[0].isnan().all()
    assert gate.weight[1].isfinite().all()
    assert int(plan.expert_count.sum()) == 4


def test_strided_x_router_weight_noise_mask_and_gradients(device, backend):
    shape = inputs.ORDINARY
    x = inputs.make_x(shape, dtype=torch.float64, device=device)
    router_weight = make_router_weight(shape, torch.float64, device)
    noise = inputs.normal(1, shape.E, seed=7, dtype=torch.float64, device=device).expand(shape.T, -1)
    mask = inputs.make_mask(shape.T, device=device)

    def run(x, router_weight, noise, mask, grad):
        leaves = [x.detach().requires_grad_(), router_weight.detach().requires_grad_()]
        gate, plan, logits = wk.route(*leaves, 2, 6, noise=noise, mask=mask, backend=backend)
        grads = torch.autograd.grad((gate.weight, gate.probs, logits), leaves, [g.to(x) for g in grad])
        return [*gate, logits, *grads], plan

    one = torch.ones((), dtype=torch.float64, device=device)
    sizes = [(shape.T, 2), (shape.T, shape.E), (shape.T, shape.E)]
    expected, plan = run(x, router_weight, noise.contiguous(), mask, [one.expand(s).contiguous() for s in sizes])
    ours, same_plan = run(
        torch.stack([x, -x], -1)[..., 0],
        router_weight.t().contiguous().t(),
        noise,
        torch.stack([mask, ~mask], -1)[..., 0],
        [one.expand(s) for s in sizes],
    )
    for result, exact in zip(ours, expected, strict=True):
        assert_float64(result.double(), exact.double())
    for result, exact in zip(same_plan[:5], plan[:5], strict=True):
        assert_same_bits(result, exact)
