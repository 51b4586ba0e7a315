"""The stages as one would write them in plain torch, in whatever dtype the inputs have, differentiated by autograd.

In the dtype under test they say how far off plain torch is, in float64 they say what is right, gradients included.
"""

import torch
from torch import Tensor
from torch.nn import functional


def topk_gate(logits: Tensor, expert_index: Tensor, noise: Tensor | None = None, normalize: bool = False):
    """weight and probs, for experts that have been chosen already; in fp32 or float64."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if noise is not None:
        z = z + noise.to(z.dtype)
    probs = z.softmax(-1)
    weight = probs.gather(1, expert_index.long())
    return weight / weight.sum(-1, keepdim=True) if normalize else weight, probs


def permute(x: Tensor, plan) -> Tensor:
    used = plan.row_choice >= 0
    rows = x.new_zeros(plan.num_rows, x.shape[1])
    return rows.index_put((used,), x[plan.row_choice[used].long() // plan.k])


def activate(z: Tensor, name: str | None) -> Tensor:
    if name in ("swiglu", "geglu"):
        gate, value = z.chunk(2, dim=-1)
        return (functional.silu(gate) if name == "swiglu" else functional.gelu(gate)) * value
    if name == "gelu_tanh":
        return functional.gelu(z, approximate="tanh")
    return z if name is None else getattr(functional, name)(z)


def grouped_gemm(rows, weight, plan, bias=None, activation=None) -> Tensor:
    width = weight.shape[2] // 2 if activation in ("swiglu", "geglu") else weight.shape[2]
    out = rows.new_zeros(rows.shape[0], width)
    for e, (begin, count) in enumerate(zip(plan.expert_begin.tolist(), plan.expert_count.tolist(), strict=True)):
        mine = slice(begin, begin + count)
        z = rows[mine] @ weight[e]
        z = z if bias is None else z + bias[e]
        out[mine] = activate(z, activation)
    return out


def combine(rows: Tensor, weight: Tensor, plan) -> Tensor:
    y = rows.new_zeros(weight.shape[0], rows.shape[1])
    for j in range(plan.k):
        served = plan.choice_row[:, j] >= 0
        term = weight[served, j, None].to(rows.dtype) * rows[plan.choice_row[served, j].long()]
        y = y.index_put((served,), y[served] + term)
    return y


def moe_ffn(x, weight, plan, w1, b1, w2, b2, activation="gelu") -> Tensor:
    hidden = grouped_gemm(permute(x, plan), w1, plan, b1, activation)
    return combine(grouped_gemm(hidden, w2, plan, b2), weight, plan)
