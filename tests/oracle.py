"""Every stage as a literal loop over tokens and choices, in float64: the truth the tests hold everything against.

Written from the definitions alone. It is slow, and so plain that there is nothing to get wrong.
"""

import math

import torch
from torch import Tensor


def ranked(z: list[float]) -> list[int]:
    """Experts by falling z; ties to the lower index, NaN behind everything."""
    return sorted(range(len(z)), key=lambda e: (math.isnan(z[e]), 0.0 if math.isnan(z[e]) else -z[e], e))


def softmax(z: list[float]) -> list[float]:
    if any(math.isnan(v) for v in z) or math.isinf(max(z)):
        return [math.nan] * len(z)
    powers = [math.exp(v - max(z)) for v in z]
    return [p / sum(powers) for p in powers]


def topk_gate(
    logits: Tensor, k: int, noise: Tensor | None = None, normalize: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """weight, expert_index, probs. z is rounded to fp32 unless the logits are fp64: the ranking is defined so."""
    num_tokens, num_experts = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.to(dtype)
    if noise is not None:
        z = z + noise.to(dtype)
    weight = torch.zeros(num_tokens, k, dtype=torch.float64)
    index = torch.zeros(num_tokens, k, dtype=torch.int32)
    probs = torch.zeros(num_tokens, num_experts, dtype=torch.float64)
    for t, row in enumerate(z.tolist()):
        p = softmax(row)
        best = ranked(row)[:k]
        total = sum(p[e] for e in best) if normalize else 1.0
        probs[t] = torch.tensor(p, dtype=torch.float64)
        for j, e in enumerate(best):
            index[t, j] = e
            weight[t, j] = p[e] / total
    return weight, index, probs


def plan_routing(
    expert_index: Tensor, num_experts: int, capacity: int | None, priority: str = "choice", weight: Tensor | None = None
) -> dict[str, list]:
    """The five tensors of the plan, as lists under their names."""
    index = expert_index.tolist()
    num_tokens, k = expert_index.shape
    tokens = list(range(num_tokens))
    if priority == "score":
        tokens = [t for t in ranked(weight[:, 0].tolist())]
    if priority == "token":
        order = [(t, j) for t in tokens for j in range(k)]
    else:
        order = [(t, j) for j in range(k) for t in tokens]

    demand = [0] * num_experts
    for t, j in order:
        if 0 <= index[t][j] < num_experts:
            demand[index[t][j]] += 1
    if capacity is None:
        begin = [sum(demand[:e]) for e in range(num_experts)]
        room, num_rows = demand, num_tokens * k
    else:
        begin = [e * capacity for e in range(num_experts)]
        room, num_rows = [capacity] * num_experts, num_experts * capacity

    count = [0] * num_experts
    choice_row = [[-1] * k for _ in tokens]
    row_choice = [-1] * num_rows
    for t, j in order:
        e = index[t][j]
        if 0 <= e < num_experts and count[e] < room[e]:
            row = begin[e] + count[e]
            count[e] += 1
            choice_row[t][j] = row
            row_choice[row] = t * k + j
    return {
        "choice_row": choice_row,
        "row_choice": row_choice,
        "expert_begin": begin,
        "expert_count": count,
        "expert_demand": demand,
    }


def logits(x: Tensor, router_weight: Tensor) -> Tensor:
    x, router_weight = x.double(), router_weight.double()
    out = torch.zeros(x.shape[0], router_weight.shape[0], dtype=torch.float64)
    for t in range(x.shape[0]):
        for e in range(router_weight.shape[0]):
            out[t, e] = sum(a * b for a, b in zip(x[t].tolist(), router_weight[e].tolist(), strict=True))
    return out


def permute(x: Tensor, plan) -> Tensor:
    rows = torch.zeros(plan.num_rows, x.shape[1], dtype=x.dtype)
    for t in range(x.shape[0]):
        for j in range(plan.k):
            row = int(plan.choice_row[t, j])
            if row >= 0:
                rows[row] = x[t]
    return rows


def activate(z: list[float], name: str | None) -> list[float]:
    half = len(z) // 2
    if name == "swiglu":
        return [a * b for a, b in zip(activate(z[:half], "silu"), z[half:], strict=True)]
    if name == "geglu":
        return [a * b for a, b in zip(activate(z[:half], "gelu"), z[half:], strict=True)]
    return [activate_one(v, name) for v in z]


def activate_one(v: float, name: str | None) -> float:
    if name is None:
        return v
    if name == "gelu":
        return v * 0.5 * (1 + math.erf(v / math.sqrt(2)))
    if name == "gelu_tanh":
        return v * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    if name == "relu":
        return max(v, 0.0)
    if name == "silu":
        return v / (1 + math.exp(-v))
    raise ValueError(name)


def linear(row: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """act(row [M] @ weight [M, N] + bias [N]) of one row and one expert."""
    z = row.double() @ weight.double()
    if bias is not None:
        z = z + bias.double()
    return torch.tensor(activate(z.tolist(), activation), dtype=torch.float64)


def grouped_gemm(
    rows: Tensor, weight: Tensor, plan, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    width = weight.shape[2] // 2 if activation in ("swiglu", "geglu") else weight.shape[2]
    out = torch.zeros(rows.shape[0], width, dtype=torch.float64)
    for e in range(plan.num_experts):
        begin = int(plan.expert_begin[e])
        for row in range(begin, begin + int(plan.expert_count[e])):
            out[row] = linear(rows[row], weight[e], None if bias is None else bias[e], activation)
    return out


def combine(rows: Tensor, weight: Tensor, plan) -> Tensor:
    y = torch.zeros(weight.shape[0], rows.shape[1], dtype=torch.float64)
    for t in range(weight.shape[0]):
        for j in range(plan.k):
            row = int(plan.choice_row[t, j])
            if row >= 0:
                y[t] += weight[t, j].double() * rows[row].double()
    return y


def moe_ffn(x, weight, plan, w1, b1, w2, b2, activation: str = "gelu") -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float64)
    begin, count = plan.expert_begin.tolist(), plan.expert_count.tolist()
    for t in range(x.shape[0]):
        for j in range(plan.k):
            row = int(plan.choice_row[t, j])
            if row < 0:
                continue
            e = next(e for e in range(plan.num_experts) if begin[e] <= row < begin[e] + count[e])
            hidden = linear(x[t], w1[e], None if b1 is None else b1[e], activation)
            y[t] += weight[t, j].double() * linear(hidden, w2[e], None if b2 is None else b2[e], None)
    return y


def load_balance_loss(probs: Tensor, expert_index: Tensor, mask: Tensor | None = None) -> float:
    """E * sum of m_e * P_e, with m_e the share of the valid tokens' choices that ask for e."""
    num_tokens, num_experts = probs.shape
    valid = [t for t in range(num_tokens) if mask is None or mask[t]]
    if not valid:
        return 0.0
    total = 0.0
    for e in range(num_experts):
        asked = sum(1 for t in valid for choice in expert_index[t].tolist() if choice == e)
        mean = sum(float(probs[t, e]) for t in valid) / len(valid)
        total += asked / (len(valid) * expert_index.shape[1]) * mean
    return num_experts * total


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> float:
    squares = [
        math.log(sum(math.exp(v) for v in row)) ** 2 for t, row in enumerate(logits.tolist()) if mask is None or mask[t]
    ]
    return sum(squares) / len(squares) if squares else 0.0
