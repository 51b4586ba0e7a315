"""The shared vocabulary of routing: what the gate returns, where each choice sits, and how much room there is.

One alphabet everywhere: T tokens, D model dim, F expert hidden dim, E experts, K choices per token, C capacity
(rows an expert may serve), R rows of the expert buffers. A *choice* is the pair (token t, k), flat index
``t * K + k``. A *row* is a place in the expert buffers. *Demand* is the number of choices that ask for an expert,
*count* the number it serves.
"""

import math
from typing import NamedTuple

from torch import Tensor

GATED = {"swiglu": "silu", "geglu": "gelu"}  # act(gate half) * value half, and the activation of the gate half
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", *GATED)


class Gate(NamedTuple):
    """What :func:`topk_gate` decides for each token."""

    weight: Tensor  # [T, K] fp32 (fp64 for fp64 logits): how much each choice counts
    expert_index: Tensor  # [T, K] int32: the chosen experts, best first
    probs: Tensor  # [T, E] fp32 or fp64: softmax over all experts


class RoutingPlan(NamedTuple):
    """Who sits where: the maps between choices and rows of the expert buffers.

    Three tokens, two experts, two choices each, room for two rows an expert; first choices come first::

        expert_index  [[0, 1], [0, 1], [1, 0]]
        choice_row    [[0, 3], [1, -1], [2, -1]]   token 1 found expert 1 full, token 2 found expert 0 full
        row_choice    [0, 2, 4, 1]                 rows 0 and 1 belong to expert 0, rows 2 and 3 to expert 1
        expert_begin  [0, 2]
        expert_count  [2, 2]
        expert_demand [3, 3]
    """

    choice_row: Tensor  # [T, K] int32: the row that serves the choice, -1 if dropped
    row_choice: Tensor  # [R] int32: the flat choice that the row serves, -1 if unused
    expert_begin: Tensor  # [E] int32: first row of each expert
    expert_count: Tensor  # [E] int32: rows served; rows begin ... begin + count - 1, in priority order
    expert_demand: Tensor  # [E] int32: choices that asked, before dropping
    num_rows: int
    num_experts: int
    k: int
    capacity: int | None  # None: dropless, the rows of all experts packed one behind the other


def expert_capacity(
    num_tokens: int,
    num_experts: int,
    k: int,
    capacity_factor: float,
    *,
    minimum: int = 1,
    multiple: int = 1,
) -> int:
    """Rows an expert may serve: ``floor(capacity_factor * k * T / E)`` (Xue et al. 2021, arXiv 2107.11817, section 3).

    At least ``minimum``, rounded up to ``multiple``, and never more than T rounded up to ``multiple``: an expert
    serves a token at most once. No tokens need no room.
    """
    if num_experts < 1 or k < 1 or minimum < 0 or multiple < 1:
        raise ValueError(
            "expert_capacity: expected num_experts >= 1, k >= 1, minimum >= 0 and multiple >= 1, "
            f"got num_experts={num_experts}, k={k}, minimum={minimum}, multiple={multiple}"
        )
    if not 0 <= capacity_factor < math.inf:
        raise ValueError(f"expert_capacity: capacity_factor: expected a finite number >= 0, got {capacity_factor}")
    if num_tokens < 0:
        raise ValueError(f"expert_capacity: num_tokens: expected at least 0, got {num_tokens}")
    if num_tokens == 0:
        return 0
    capacity = max(math.floor(capacity_factor * k * num_tokens / num_experts), minimum)
    return min(-(-capacity // multiple), -(-num_tokens // multiple)) * multiple
