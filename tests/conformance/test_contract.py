"""The public contract of widenet_kernels, on every device and backend, by examples that can be followed by hand."""

import inspect

import pytest
import torch

import widenet_kernels as wk

OP = "plan_routing"  # the device and the backend of a test come from tests/conftest.py
UNNAMED = ("cuda",)  # the devices on which ops choose a mixture of backends by themselves: there None is tried too


def grouped_gemm(rows, weight, plan, backend, **options):
    """By the backend, or by the op's own choice where this one has no GEMM."""
    served = wk.available_backends("grouped_gemm", rows.device)
    return wk.grouped_gemm(rows, weight, plan, backend=backend if backend in served else None, **options)


def test_available_backends():
    for op in ("topk_gate", "plan_routing", "route", "permute", "grouped_gemm", "combine", "moe_ffn"):
        names = wk.available_backends(op, "cpu")
        assert "reference" in names
        if wk.build_info().get("native"):
            assert names[0] == "native"


SIGNATURES = {
    "topk_gate": ["logits", "k", "noise", "normalize", "backend"],
    "expert_capacity": ["num_tokens", "num_experts", "k", "capacity_factor", "minimum", "multiple"],
    "plan_routing": ["expert_index", "num_experts", "capacity", "priority", "weight", "backend"],
    "route": ["x", "router_weight", "k", "capacity", "noise", "normalize", "priority", "mask", "backend"],
    "permute": ["x", "plan", "backend"],
    "grouped_gemm": ["rows", "weight", "plan", "bias", "activation", "backend"],
    "combine": ["rows", "weight", "plan", "backend"],
    "moe_ffn": ["x", "weight", "plan", "w1", "b1", "w2", "b2", "activation", "grad_buffers", "backend"],
    "load_balance_loss": ["probs", "plan", "mask"],
    "router_z_loss": ["logits", "mask"],
    "available_backends": ["op", "device", "dtype"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    have = list(inspect.signature(getattr(wk, name)).parameters)
    want = SIGNATURES[name]
    assert have == want


def test_plan_fields():
    fields = wk.RoutingPlan._fields
    for field in (
        "choice_row",
        "row_choice",
        "expert_begin",
        "expert_count",
        "expert_demand",
        "num_rows",
        "num_experts",
        "k",
        "capacity",
    ):
        assert field in fields
    assert wk.Gate._fields[:3] == ("weight", "expert_index", "probs")


# Three tokens, two experts, both choices each; room for two rows an expert.
INDEX = [[0, 1], [0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("priority", "rows", "choices"),
    [
        # first choices: t0->e0, t1->e0, t2->e1; then second ones: t0->e1, t1->e1 (full), t2->e0 (full)
        ("choice", [[0, 3], [1, -1], [2, -1]], [0, 2, 4, 1]),
        # token by token: t0 takes e0 and e1, t1 takes e0 and e1, t2 finds both full
        ("token", [[0, 2], [1, 3], [-1, -1]], [0, 2, 1, 3]),
    ],
)
def test_plan_with_capacity(device, backend, priority, rows, choices):
    index = torch.tensor(INDEX, dtype=torch.int32, device=device)
    plan = wk.plan_routing(index, 2, 2, priority=priority, backend=backend)
    assert plan.choice_row.tolist() == rows
    assert plan.row_choice.tolist() == choices
    assert plan.expert_begin.tolist() == [0, 2]
    assert plan.expert_count.tolist() == [2, 2]
    assert plan.expert_demand.tolist() == [3, 3]
    assert (plan.num_rows, plan.num_experts, plan.k, plan.capacity) == (4, 2, 2, 2)
    assert all(t.dtype == torch.int32 for t in plan[:5])


def test_plan_dropless_and_out_of_range(device, backend):
    index = torch.tensor([[0, 1], [7, 1], [1, -1]], dtype=torch.int32, device=device)
    plan = wk.plan_routing(index, 3, backend=backend)
    assert plan.num_rows == 6
    assert plan.capacity is None
    assert plan.choice_row.tolist() == [[0, 2], [-1, 3], [1, -1]]
    assert plan.row_choice.tolist() == [0, 4, 1, 3, -1, -1]
    assert plan.expert_begin.tolist() == [0, 1, 4]
    assert plan.expert_count.tolist() == [1, 3, 0]
    assert plan.expert_demand.tolist() == [1, 3, 0]


def test_gate(device, backend):
    logits = torch.tensor([[0.0, 1.0, 1.0], [2.0, 0.0, 0.0]], device=device)
    gate = wk.topk_gate(logits, 2, backend=backend)
    assert gate.expert_index.tolist() == [[1, 2], [0, 1]]  # ties: the lower index first
    assert gate.expert_index.dtype == torch.int32
    torch.testing.assert_close(gate.probs, logits.softmax(-1))
    torch.testing.assert_close(gate.weight, gate.probs.gather(1, gate.expert_index.long()))
    torch.testing.assert_close(
        wk.topk_gate(logits, 2, normalize=True, backend=backend).weight.sum(-1), torch.ones(2, device=device)
    )
    bad = wk.topk_gate(torch.full((2, 3), float("nan"), device=device), 2, backend=backend)
    assert all(len(set(row)) == 2 and all(0 <= e < 3 for e in row) for row in bad.expert_index.tolist())
    assert bad.probs.isnan().any()


def test_unused_rows_are_zero_and_dropped_choices_add_nothing(device, backend):
    torch.manual_seed(0)
    index = torch.tensor([[0, 1], [0, 1], [0, 1]], dtype=torch.int32, device=device)
    plan = wk.plan_routing(index, 3, 2, backend=backend)
    x = torch.randn(3, 5, device=device)
    rows = wk.permute(x, plan, backend=backend)
    assert rows.shape == (6, 5)
    torch.testing.assert_close(rows.view(3, 2, 5)[0], x[:2], rtol=0, atol=0)
    assert not rows.view(3, 2, 5)[2].any()
    weight, bias = torch.randn(3, 5, 4, device=device), torch.ones(3, 4, device=device)
    out = grouped_gemm(rows, weight, plan, backend, bias=bias, activation="gelu")
    assert out.shape == (6, 4)
    assert not out[4:].any()
    weight = torch.ones(3, 2, device=device)
    y = wk.combine(rows, weight, plan, backend=backend)
    torch.testing.assert_close(y, torch.stack([2 * x[0], 2 * x[1], 0 * x[2]]))


def test_nan_in_places_that_nobody_uses_reaches_nothing(device, backend):
    index = torch.tensor([[0, 1], [0, 1], [0, 1]], dtype=torch.int32, device=device)
    plan = wk.plan_routing(index, 3, 2, backend=backend)  # the third token is dropped, expert 2 is empty
    nan = float("nan")
    rows = torch.ones(6, 5, device=device)
    rows[4:] = nan
    weight = torch.ones(3, 2, device=device)
    weight[2] = nan
    rows.requires_grad_(), weight.requires_grad_()
    y = wk.combine(rows, weight, plan, backend=backend)
    assert y.tolist() == [[2.0] * 5, [2.0] * 5, [0.0] * 5]
    y.sum().backward()
    assert not rows.grad[4:].any()
    assert not weight.grad[2].any()
    assert rows.grad.isfinite().all()
    assert weight.grad.isfinite().all()

    rows = rows.detach().requires_grad_()
    w = torch.ones(3, 5, 4, device=device, requires_grad=True)
    out = grouped_gemm(rows, w, plan, backend, activation="relu")
    grad = torch.ones_like(out)
    grad[4:] = nan
    out.backward(grad)
    assert not out[4:].any()
    assert not rows.grad[4:].any()
    assert not w.grad[2].any()
    assert w.grad.isfinite().all()

    x = torch.ones(3, 5, device=device, requires_grad=True)
    grad = torch.ones(6, 5, device=device)
    grad[4:] = nan
    wk.permute(x, plan, backend=backend).backward(grad)
    assert x.grad.tolist() == [[2.0] * 5, [2.0] * 5, [0.0] * 5]


def test_route_is_gate_and_plan(device, backend):
    torch.manual_seed(0)
    x, router = torch.randn(9, 6, device=device), torch.randn(4, 6, device=device)
    mask = torch.arange(9, device=device) % 3 != 0
    gate, plan, logits = wk.route(x, router, 2, 3, mask=mask, backend=backend)
    torch.testing.assert_close(logits, x @ router.t())
    again = wk.topk_gate(logits, 2, backend=backend)
    torch.testing.assert_close(gate.weight[mask], again.weight[mask])
    index = torch.where(mask[:, None], again.expert_index, -1)
    for a, b in zip(plan, wk.plan_routing(index, 4, 3, backend=backend), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    probs = gate.probs[mask]
    want = 4 * (plan.expert_demand / (2 * mask.sum()) * probs.mean(0)).sum()
    torch.testing.assert_close(wk.load_balance_loss(gate.probs, plan, mask), want)


def test_expert_capacity():
    assert wk.expert_capacity(6304, 4, 2, 1.2) == 3782
    assert wk.expert_capacity(10, 4, 2, 100.0) == 10
    assert wk.expert_capacity(1, 64, 2, 1.0, minimum=4) == 1
    assert wk.expert_capacity(0, 4, 2, 1.2) == 0
    assert wk.expert_capacity(35, 3, 2, 1.2) == 28
    assert wk.expert_capacity(100, 4, 2, 1.0, multiple=8) == 56


@pytest.mark.parametrize(
    "call",
    [
        lambda: wk.topk_gate(torch.zeros(3), 2),
        lambda: wk.topk_gate(torch.zeros(3, 4), 5),
        lambda: wk.plan_routing(torch.zeros(3, 2, dtype=torch.int32), 4, 2, priority="luck"),
        lambda: wk.plan_routing(torch.zeros(3, 2), 4, 2),
        lambda: wk.permute(torch.zeros(9, 4), wk.plan_routing(torch.zeros(3, 2, dtype=torch.int32), 4, 2)),
        lambda: wk.grouped_gemm(
            torch.zeros(8, 4), torch.zeros(4, 5, 6), wk.plan_routing(torch.zeros(3, 2, dtype=torch.int32), 4, 2)
        ),
        lambda: wk.grouped_gemm(
            torch.zeros(8, 4),
            torch.zeros(4, 4, 6),
            wk.plan_routing(torch.zeros(3, 2, dtype=torch.int32), 4, 2),
            activation="tanhish",
        ),
        lambda: wk.moe_ffn(
            torch.zeros(3, 4),
            torch.zeros(3, 3),
            wk.plan_routing(torch.zeros(3, 2, dtype=torch.int32), 4, 2),
            torch.zeros(4, 4, 8),
            None,
            torch.zeros(4, 8, 4),
            None,
        ),
        lambda: wk.topk_gate(torch.zeros(3, 4), 2, backend="abacus"),
    ],
)
def test_bad_input_is_a_clear_python_error(call):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert len(str(error.value)) > 20
