"""plan_routing: who sits where, for every priority, bit for bit as the loop has it."""

import math

import oracle
import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.testing import inputs

OP = "plan_routing"
ALL_SHAPES = (*inputs.SHAPES, *inputs.LARGE_SHAPES)
PRIORITIES = ("choice", "token", "score")


def as_lists(plan):
    return {name: getattr(plan, name).tolist() for name in plan._fields[:5]}


def assert_is_oracles(plan, index, num_experts, capacity, priority, weight=None):
    weight = None if weight is None else weight.cpu()
    assert as_lists(plan) == oracle.plan_routing(index.cpu(), num_experts, capacity, priority, weight)
    num_tokens, k = index.shape
    num_rows = num_tokens * k if capacity is None else num_experts * capacity
    assert plan[5:] == (num_rows, num_experts, k, capacity)
    assert all(t.dtype == torch.int32 and t.device == index.device for t in plan[:5])
    assert plan.choice_row.shape == (num_tokens, k)


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
def test_oracle(shape, priority, device, backend, several_threads):
    index = inputs.make_expert_index(shape, device=device)
    weight = inputs.make_gate_weight(shape, device=device)
    plan = wk.plan_routing(index, shape.E, shape.C, priority=priority, weight=weight, backend=backend)
    assert_is_oracles(plan, index, shape.E, shape.C, priority, weight)


def test_shapes_drop_and_leave_room():
    """The shapes are worth their names: some drop choices, some have unused rows, some have neither."""
    plans = {str(shape): inputs.make_plan(shape) for shape in ALL_SHAPES}
    dropped = {name for name, plan in plans.items() if inputs.dropped_choices(plan).any()}
    unused = {name for name, plan in plans.items() if inputs.unused_rows(plan).any()}
    assert {str(inputs.ORDINARY), str(inputs.LARGE_CAPACITY), str(inputs.MANY_TOKENS)} <= dropped & unused
    assert str(inputs.DROPLESS) not in dropped | unused
    for shape in ALL_SHAPES:
        demand = plans[str(shape)].expert_demand
        if shape.routing == "one":
            assert demand[-1] == shape.T
        if shape.routing == "empty":
            assert demand[shape.E // 2] == 0
            assert (demand > 0).sum() == shape.E - 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("capacity", [3, None], ids=["C3", "dropless"])
def test_index_dtypes(dtype, capacity, device, backend):
    limits = torch.iinfo(dtype)
    index = torch.tensor([[0, 3], [4, 2], [limits.max, 1], [1, 1], [limits.min, 0]], dtype=dtype, device=device)
    plan = wk.plan_routing(index, 4, capacity, backend=backend)
    assert_is_oracles(plan, index, 4, capacity, "choice")


@pytest.mark.parametrize("bad", [2**32, 2**32 + 1, -(2**32) + 1, 2**31, 2**63 - 1, -(2**63), 2**40 + 2])
def test_no_narrowing_before_the_range_check(bad, device, backend):
    """2**32 + 1 is 1 in 32 bits, but asks for nothing."""
    index = torch.tensor([[bad, 1], [1, bad]], dtype=torch.int64, device=device)
    plan = wk.plan_routing(index, 3, 2, backend=backend)
    assert plan.choice_row.tolist() == [[-1, 3], [2, -1]]
    assert plan.expert_demand.tolist() == [0, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_score_ties_signed_zeros_and_nan(dtype, device, backend):
    score = torch.tensor([0.0, math.nan, -0.0, 2.0, -math.inf, math.inf, 2.0, -1.0, math.nan], dtype=dtype)
    weight = torch.stack([score, torch.rand(9).to(dtype)], dim=1).to(device)
    index = torch.tensor([[0, 1]] * 9, dtype=torch.int32, device=device)
    plan = wk.plan_routing(index, 2, 8, priority="score", weight=weight, backend=backend)
    assert [choice // 2 for choice in plan.row_choice.tolist()[:8]] == [5, 3, 6, 0, 2, 7, 4, 1]
    assert_is_oracles(plan, index, 2, 8, "score", weight)


def test_score_is_a_constant_for_autograd(device, backend):
    weight = torch.rand(4, 2, device=device, requires_grad=True)
    index = torch.tensor([[0, 1]] * 4, device=device)
    plan = wk.plan_routing(index, 2, 2, priority="score", weight=weight, backend=backend)
    assert not any(t.requires_grad for t in plan[:5])


@pytest.mark.parametrize("priority", PRIORITIES)
def test_strided_index_and_weight(priority, device, backend):
    shape = inputs.ORDINARY
    index = inputs.make_expert_index(shape, device=device)
    weight = inputs.make_gate_weight(shape, device=device)
    for strange in (
        index.t().contiguous().t(),
        torch.stack([index, -index], -1)[..., 0],
        index.long()[:, :1].expand(-1, 2),
    ):
        spread = torch.stack([weight, weight.neg()], 0)[0].t().contiguous().t()
        plan = wk.plan_routing(strange, shape.E, shape.C, priority=priority, weight=spread, backend=backend)
        assert_is_oracles(plan, strange, shape.E, shape.C, priority, weight)
