"""plan_routing: who sits where. Integers only, so there is no gradient."""

import torch
from torch import Tensor

from widenet_kernels.ops.checks import (
    MOST_ROWS,
    check_device,
    check_float,
    check_layout,
    check_tensor,
    invalid,
    wrong_type,
)
from widenet_kernels.ops.registry import call, define_op, ops_for
from widenet_kernels.reference import plan as reference
from widenet_kernels.routing import RoutingPlan

PlanTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def fake_plan(like: Tensor, num_tokens: int, k: int, num_experts: int, capacity: int | None) -> PlanTensors:
    """Empty tensors of the shapes of choice_row, row_choice, expert_begin, expert_count and expert_demand."""
    num_rows = num_tokens * k if capacity is None else num_experts * capacity
    shapes = ((num_tokens, k), (num_rows,), (num_experts,), (num_experts,), (num_experts,))
    first, *rest = [like.new_empty(shape, dtype=torch.int32) for shape in shapes]
    return first, *rest  # type: ignore[return-value]


def as_plan(tensors: PlanTensors, num_experts: int, capacity: int | None) -> RoutingPlan:
    choice_row, row_choice, begin, count, demand = tensors
    num_rows, k = row_choice.shape[0], choice_row.shape[1]
    return RoutingPlan(choice_row, row_choice, begin, count, demand, num_rows, num_experts, k, capacity)


def _fake(
    expert_index: Tensor, num_experts: int, capacity: int | None, priority: str, score: Tensor | None
) -> PlanTensors:
    return fake_plan(expert_index, expert_index.shape[0], expert_index.shape[1], num_experts, capacity)


define_op(
    "plan_routing(Tensor expert_index, int num_experts, SymInt? capacity, str priority, Tensor? score) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.plan_routing,
    _fake,
    differentiable=False,
)


def plan_routing(
    expert_index: Tensor,
    num_experts: int,
    capacity: int | None = None,
    *,
    priority: str = "choice",
    weight: Tensor | None = None,
    backend: str | None = None,
) -> RoutingPlan:
    """Give every choice a row of its expert's buffer, until the expert is full.

    Args:
        expert_index: [T, K] of any integer dtype; an index outside [0, num_experts) asks for nothing.
        num_experts: E.
        capacity: rows per expert (expert e has rows e * C to (e + 1) * C - 1, R = E * C), or None: dropless, the
            rows of all experts packed one behind the other, R = T * K.
        priority: "choice": all first choices in token order, then all second ones, and so on (GShard, Lepikhin et al.
            2020, arXiv 2006.16668); "token": token order, the choices of a token together (WideNet's authors);
            "score": as "choice", tokens by falling weight[:, 0], ties in token order, NaN last (Riquelme et al. 2021,
            arXiv 2106.05974).
        weight: [T, K], the gate weights; needed by "score".
        backend: None (the best there is), "native", "triton" or "reference".

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; also if T * K or R reach 2**31.
    """
    check_tensor("plan_routing", "expert_index", expert_index, (None, None), "[T, K]")
    if expert_index.is_floating_point() or expert_index.is_complex() or expert_index.dtype == torch.bool:
        raise wrong_type("plan_routing", "expert_index", "an integer dtype", expert_index.dtype)
    if isinstance(num_experts, bool) or not isinstance(num_experts, int):
        raise wrong_type("plan_routing", "num_experts", "an int", repr(num_experts))
    if not 1 <= num_experts <= MOST_ROWS:
        raise invalid("plan_routing", "num_experts", "at least 1 and below 2**31", num_experts)
    num_tokens, k = expert_index.shape
    if k < 1:
        raise invalid("plan_routing", "expert_index", "at least one choice per token", list(expert_index.shape))
    check_layout("plan_routing", capacity, "expert_index", num_tokens * k, num_experts, priority)
    score = None
    if priority == "score":
        if weight is None:
            raise invalid("plan_routing", "weight", "the gate weights [T, K], which priority 'score' ranks by", None)
        check_tensor("plan_routing", "weight", weight, (num_tokens, k), "[T, K]")
        check_float("plan_routing", "weight", weight)
        check_device("plan_routing", "weight", weight, "expert_index", expert_index)
        score = weight.detach()[:, 0]
    if expert_index.dtype != torch.int32:
        expert_index = expert_index.to(torch.int64)  # the kernels take int32 and int64 and check before narrowing
    ops = ops_for("plan_routing", backend, expert_index, torch.float32, num_experts)
    plan = call(ops.plan_routing, False, expert_index, num_experts, capacity, priority, score)
    return as_plan(plan, num_experts, capacity)
