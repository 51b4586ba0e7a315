"""The routing plan in plain torch: expert_index [T, K] -> the maps between choices and rows."""

import torch
from torch import Tensor


def priority_order(num_tokens: int, k: int, priority: str, score: Tensor | None, device: torch.device) -> Tensor:
    """The flat choices [T*K] in the order in which they are served."""
    choice = torch.arange(num_tokens * k, device=device).view(num_tokens, k)
    if priority == "token":
        return choice.reshape(-1)
    if priority == "score":
        assert score is not None  # the op layer has checked it
        choice = choice[(-score).argsort(stable=True)]  # ascending order puts NaN last
    return choice.t().reshape(-1)


def plan_routing(
    expert_index: Tensor, num_experts: int, capacity: int | None, priority: str, score: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_tokens, k = expert_index.shape
    device = expert_index.device
    in_range = (expert_index >= 0) & (expert_index < num_experts)
    expert = torch.where(in_range, expert_index, num_experts).to(torch.int64).reshape(-1)  # E: asks for nothing

    demand = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    demand = demand.scatter_add(0, expert, torch.ones_like(expert))
    first = demand.cumsum(0) - demand
    if capacity is None:
        begin, room, num_rows = first, demand, num_tokens * k
    else:
        begin = torch.arange(num_experts + 1, device=device) * capacity
        room, num_rows = torch.full_like(demand, capacity), num_experts * capacity

    order = priority_order(num_tokens, k, priority, score, device)
    expert, by_expert = expert[order].sort(stable=True)
    choice = order[by_expert]
    rank = torch.arange(num_tokens * k, device=device) - first[expert]
    row = torch.where((expert < num_experts) & (rank < room[expert]), begin[expert] + rank, -1)

    choice_row = torch.empty_like(row).scatter(0, choice, row).view(num_tokens, k)
    row_choice = torch.full((num_rows + 1,), -1, device=device)  # the last place takes what is dropped
    row_choice = row_choice.scatter(0, torch.where(row >= 0, row, num_rows), choice)[:num_rows]
    count = torch.minimum(demand, room)
    return (
        choice_row.to(torch.int32),
        row_choice.to(torch.int32),
        begin[:num_experts].to(torch.int32),
        count[:num_experts].to(torch.int32),
        demand[:num_experts].to(torch.int32),
    )
