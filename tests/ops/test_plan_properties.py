"""plan_routing: what must hold for any plan, on problems that hypothesis makes up."""

import math

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import widenet_kernels as wk

OP = "plan_routing"


@st.composite
def problems(draw):
    """An index with repeats and places outside [0, E), a capacity or none, a priority, coarse scores with ties."""
    num_experts = draw(st.integers(1, 7))
    k = draw(st.integers(1, 4))
    num_tokens = draw(st.integers(0, 40))
    capacity = draw(st.none() | st.integers(0, 20))
    experts = st.integers(-2, num_experts + 1)
    index = draw(st.lists(st.lists(experts, min_size=k, max_size=k), min_size=num_tokens, max_size=num_tokens))
    scores = st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, -1.0, math.nan])
    score = draw(st.lists(scores, min_size=num_tokens, max_size=num_tokens))
    return index, num_experts, k, capacity, score


@pytest.mark.parametrize("priority", ["choice", "token", "score"])
def test_invariants(priority, device, backend):
    @settings(derandomize=True, max_examples=120, deadline=None, database=None)
    @given(problems())
    def check(problem):
        index, num_experts, k, capacity, score = problem
        tensor = torch.tensor(index, dtype=torch.int32, device=device).view(-1, k)
        weight = torch.tensor(score, device=device)[:, None].expand(-1, k)
        plan = wk.plan_routing(tensor, num_experts, capacity, priority=priority, weight=weight, backend=backend)
        assert_invariants(plan, tensor.view(-1).tolist(), score, priority)

    check()


def assert_invariants(plan, experts, score, priority):
    """``experts`` is the flat index; nothing here knows how a plan is made, only what must hold for one."""
    values = {name: getattr(plan, name).tolist() for name in plan._fields[:5]}
    rows = [row for token in values["choice_row"] for row in token]
    row_choice, begin = values["row_choice"], values["expert_begin"]
    demand, count = values["expert_demand"], values["expert_count"]

    # the two maps are inverse
    assert all(row_choice[row] == choice for choice, row in enumerate(rows) if row >= 0)
    assert all(rows[choice] == row for row, choice in enumerate(row_choice) if choice >= 0)
    assert sum(row >= 0 for row in rows) == sum(choice >= 0 for choice in row_choice)

    # counts and demands agree, no expert is over capacity
    assert demand == [sum(e == expert for e in experts) for expert in range(plan.num_experts)]
    assert count == [d if plan.capacity is None else min(d, plan.capacity) for d in demand]

    # an expert's rows are begin ... begin + count - 1, packed without gaps or in buffers of C rows
    if plan.capacity is None:
        assert begin == [sum(count[:expert]) for expert in range(plan.num_experts)]
    else:
        assert begin == [expert * plan.capacity for expert in range(plan.num_experts)]
    used = {row for b, c in zip(begin, count, strict=True) for row in range(b, b + c)}
    assert used == {row for row, choice in enumerate(row_choice) if choice >= 0}

    def rank(choice):  # who comes first
        token, j = divmod(choice, plan.k)
        if priority == "token":
            return token, j
        if priority == "choice":
            return j, token
        return j, math.isnan(score[token]), 0.0 if math.isnan(score[token]) else -score[token], token

    for expert in range(plan.num_experts):
        served = row_choice[begin[expert] : begin[expert] + count[expert]]
        assert all(experts[choice] == expert for choice in served)
        assert served == sorted(served, key=rank)
        dropped = [choice for choice, e in enumerate(experts) if e == expert and rows[choice] < 0]
        if served and dropped:
            assert rank(served[-1]) < min(rank(choice) for choice in dropped)
