"""Who sits where: expert_index [T, K] to the maps between choices and rows, in two launches and without atomics.

The choices, in the order in which they are served, are cut into parts. The first launch counts what each part asks of
each expert; in the second every part adds up the parts before it, and so knows the ranks of its own choices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_EXPERTS = 65_536  # 16 choices beside as many experts are the largest tile that Triton has


@triton.jit
def _load_block(expert_index_ptr, order_ptr, block, num_tokens, K: tl.constexpr, E: tl.constexpr,
                BY_TOKEN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The flat choices that a block of BLOCK positions serves, and their experts, -1 if they ask for nothing.

    Blocks follow the order of service: token by token all choices, or the first choices of all tokens, then the
    second ones ... each beginning with a block of its own, so that only scalars are divided.
    """
    num_tokens = num_tokens.to(tl.int64)
    if BY_TOKEN:
        choice = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = choice < num_tokens * K
    else:
        blocks = tl.cdiv(num_tokens, BLOCK).to(tl.int32)
        token = tl.cast(block % blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = token < num_tokens
        if order_ptr is not None:
            token = tl.load(order_ptr + token, mask=inside, other=0)
        choice = token * K + block // blocks
    expert = tl.load(expert_index_ptr + choice, mask=inside, other=-1)
    asks = (expert >= 0) & (expert < E)  # before the index is narrowed
    return choice, inside, tl.where(asks, expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "part_size"])
def _count_kernel(
    expert_index_ptr, order_ptr, part_demand_ptr,  # [T, K], [T] or None, [parts, E]
    num_tokens, num_blocks, part_size,
    K: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, BY_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """part_demand[p, e] = how many choices of part p ask for expert e."""
    part = tl.program_id(0)
    experts = tl.arange(0, E_PADDED)
    demand = tl.zeros((E_PADDED,), tl.int32)
    for block in range(part * part_size, tl.minimum((part + 1) * part_size, num_blocks)):
        _, _, expert = _load_block(expert_index_ptr, order_ptr, block, num_tokens, K, E, BY_TOKEN, BLOCK)
        demand += tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), axis=0)
    tl.store(part_demand_ptr + part.to(tl.int64) * E + experts, demand, mask=experts < E)


@triton.jit
def _demand_before(part_demand_ptr, part, num_parts, experts, E: tl.constexpr, PARTS: tl.constexpr):
    """For each expert the demand of the parts before this one, and of all parts, PARTS of them at a time."""
    before = tl.zeros(experts.shape, tl.int32)
    demand = tl.zeros(experts.shape, tl.int32)
    for first in range(0, num_parts, PARTS):
        other = first + tl.arange(0, PARTS)
        mask = (other < num_parts)[:, None] & (experts < E)[None, :]
        counts = tl.load(part_demand_ptr + other[:, None] * E + experts[None, :], mask=mask, other=0)
        before += tl.sum(tl.where((other < part)[:, None], counts, 0), axis=0)
        demand += tl.sum(counts, axis=0)
    return before, demand


@triton.jit
def _mark_unused(row_choice_ptr, part, num_parts, room, experts, count, ROOMS: tl.constexpr, BLOCK: tl.constexpr):
    """row_choice = -1 in this part's share of the rows that no choice gets: the ends of ROOMS rooms of equal size."""
    blocks = tl.cdiv(room.to(tl.int64), BLOCK).to(tl.int32)
    for block in range(part, ROOMS * blocks, num_parts):
        place = tl.cast(block % blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        filled = tl.sum(tl.where((experts == block // blocks) | (ROOMS == 1), count, 0), axis=0)
        row = tl.cast(block // blocks, tl.int64) * room + place
        tl.store(row_choice_ptr + row, tl.full((BLOCK,), -1, tl.int32), mask=(place >= filled) & (place < room))


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "num_parts", "part_size", "room"])
def _place_kernel(
    expert_index_ptr, order_ptr, part_demand_ptr,
    choice_row_ptr, row_choice_ptr, begin_ptr, count_ptr, demand_ptr,  # the plan
    num_tokens, num_blocks, num_parts, part_size, room,  # of each expert; packed: of all together
    K: tl.constexpr, E: tl.constexpr, E_PADDED: tl.constexpr, BY_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Program p places the choices of part p, in their order, and marks its share of the unused rows."""
    part = tl.program_id(0)
    experts = tl.arange(0, E_PADDED)
    before, demand = _demand_before(part_demand_ptr, part, num_parts, experts, E, PARTS)
    if PACKED:
        begin, count = tl.cumsum(demand, axis=0) - demand, demand
    else:
        begin, count = experts * room, tl.minimum(demand, room)
    if part == 0:
        tl.store(begin_ptr + experts, begin, mask=experts < E)
        tl.store(count_ptr + experts, count, mask=experts < E)
        tl.store(demand_ptr + experts, demand, mask=experts < E)
    _mark_unused(row_choice_ptr, part, num_parts, room, experts, count, 1 if PACKED else E, 1024)

    index = tl.arange(0, BLOCK)
    for block in range(part * part_size, tl.minimum((part + 1) * part_size, num_blocks)):
        choice, inside, expert = _load_block(expert_index_ptr, order_ptr, block, num_tokens, K, E, BY_TOKEN, BLOCK)
        same_and_earlier = (expert[:, None] == expert[None, :]) & (index[:, None] > index[None, :])
        rank = tl.sum(same_and_earlier.to(tl.int32), axis=1)
        mine = expert[:, None] == experts[None, :]
        next_row = tl.sum(tl.where(mine, (begin + tl.minimum(before, count))[None, :], 0), axis=1)
        left = tl.sum(tl.where(mine, (count - before)[None, :], 0), axis=1)  # 0 for a choice that asks for nothing
        served = rank < left
        row = tl.where(served, next_row + rank, -1)
        tl.store(choice_row_ptr + choice, row, mask=inside)
        tl.store(row_choice_ptr + row, choice.to(tl.int32), mask=inside & served)
        before += tl.sum(mine.to(tl.int32), axis=0)


def plan_routing(
    expert_index: Tensor, num_experts: int, capacity: int | None, priority: str, score: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if num_experts > MOST_EXPERTS:
        raise ValueError(f"plan_routing: num_experts: Triton serves {MOST_EXPERTS} at most, got {num_experts}")
    num_tokens, k = expert_index.shape
    num_choices = num_tokens * k
    num_rows = num_choices if capacity is None else num_experts * capacity
    shapes = ((num_tokens, k), (num_rows,), (num_experts,), (num_experts,), (num_experts,))
    choice_row, row_choice, begin, count, demand = [expert_index.new_empty(s, dtype=torch.int32) for s in shapes]

    padded = triton.next_power_of_2(num_experts)
    block = max(16, min(64, 4096 // padded))  # positions at a time: of [block, block] and [block, E] comparisons
    by_token = priority == "token"
    num_blocks = triton.cdiv(num_choices, block) if by_token else k * triton.cdiv(num_tokens, block)
    most_parts = 256 if num_experts <= 16 else 128 if num_experts <= 128 else 64  # each part reads all others' counts
    parts = max(1, min(most_parts, max(num_blocks, triton.cdiv(num_rows, 1024))))
    part_size = triton.cdiv(num_blocks, parts)
    part_demand = expert_index.new_empty(parts, num_experts, dtype=torch.int32)
    order = (-score).argsort(stable=True) if priority == "score" and score is not None else None
    sizes = {"K": k, "E": num_experts, "E_PADDED": padded, "BY_TOKEN": by_token, "BLOCK": block, "num_warps": 4}
    _count_kernel[(parts,)](expert_index, order, part_demand, num_tokens, num_blocks, part_size, **sizes)
    _place_kernel[(parts,)](
        expert_index, order, part_demand, choice_row, row_choice, begin, count, demand,
        num_tokens, num_blocks, parts, part_size, num_rows if capacity is None else capacity,
        **sizes, PACKED=capacity is None, PARTS=max(1, min(128, 4096 // padded)),
    )  # fmt: skip
    return choice_row, row_choice, begin, count, demand
