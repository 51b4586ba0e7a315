"""The shapes worth trying, each with its reason, and inputs made from a seed: the same values on every device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from widenet_kernels.ops.plan import plan_routing
from widenet_kernels.routing import GATED, RoutingPlan

# How the tokens choose: evenly; some experts much more than others; everybody the last expert first; nobody the
# middle one; some choices outside [0, E); all choices outside.
ROUTINGS = ("even", "skewed", "one", "empty", "holes", "nobody")


class Shape(NamedTuple):
    """The sizes of one case, in the alphabet of :mod:`widenet_kernels.routing`; C None is dropless."""

    T: int
    D: int
    F: int
    E: int
    K: int
    C: int | None
    routing: str
    reason: str

    def __str__(self) -> str:
        capacity = "dropless" if self.C is None else f"C{self.C}"
        return f"T{self.T}-D{self.D}-F{self.F}-E{self.E}-K{self.K}-{capacity}-{self.routing}"


ORDINARY = Shape(16, 8, 12, 4, 2, 6, "skewed", "ordinary: some experts are over capacity, some have room")
DROPLESS = Shape(16, 8, 12, 4, 2, None, "skewed", "ordinary, packed rows")
LARGE_CAPACITY = Shape(
    65_600, 1, 1, 2, 1, 65_580, "one", "C and T above 65,535, the largest grid of a CUDA y dimension"
)

NO_TOKENS = Shape(0, 8, 12, 4, 2, 3, "even", "no tokens, but capacity buffers")
NO_TOKENS_PACKED = Shape(0, 8, 12, 4, 2, None, "even", "no tokens and no rows")
ONE_PACKED = Shape(33, 8, 12, 4, 1, None, "one", "all tokens on one expert, none dropped; the others before it empty")
ALL_EXPERTS = Shape(9, 8, 12, 3, 3, 5, "even", "K = E: every token asks every expert")
SINGLE = Shape(7, 8, 12, 1, 1, 4, "even", "E = 1")
ODD = Shape(29, 7, 13, 5, 3, 11, "holes", "odd D and F, E prime, choices that ask for nothing")
ODD_PACKED = Shape(29, 7, 13, 5, 3, None, "holes", "the same, packed: the last rows stay unused")
NO_ROWS = Shape(11, 8, 12, 4, 2, 0, "even", "capacity 0: everything is dropped, no rows")
WIDE = Shape(300, 64, 48, 8, 2, 70, "skewed", "several vectors wide, several tiles long")
IDENTITY = Shape(7, 8, 12, 1, 1, None, "even", "row r serves token r: nothing to move")

SHAPES = (
    ORDINARY,
    DROPLESS,
    NO_TOKENS,
    NO_TOKENS_PACKED,
    Shape(1, 8, 12, 4, 2, 1, "even", "one token"),
    Shape(3, 8, 12, 16, 2, 1, "even", "fewer tokens than experts"),
    Shape(17, 8, 12, 5, 2, 5, "empty", "an expert that nobody asks for, inside the buffers"),
    Shape(17, 8, 12, 5, 2, None, "empty", "an expert that nobody asks for, between packed ones"),
    Shape(33, 8, 12, 4, 1, 7, "one", "all tokens on one expert, most of them dropped"),
    ONE_PACKED,
    ALL_EXPERTS,
    SINGLE,
    Shape(21, 8, 12, 4, 1, 5, "skewed", "K = 1"),
    ODD,
    ODD_PACKED,
    NO_ROWS,
    Shape(5, 8, 12, 3, 2, 9, "even", "more capacity than tokens"),
    Shape(6, 8, 12, 3, 2, 4, "nobody", "no choice asks for anything"),
    Shape(6, 8, 12, 3, 2, None, "nobody", "no choice asks for anything: all packed rows unused"),
    Shape(12, 1, 1, 3, 2, 6, "even", "D = F = 1"),
    Shape(5, 4, 3, 1024, 16, None, "even", "many experts and choices, few tokens"),
    WIDE,
    IDENTITY,
)
MANY_TOKENS = Shape(5000, 33, 17, 6, 2, 1500, "skewed", "long enough to be shared out among threads")
SMALL_EXPERTS = Shape(156, 64, 256, 13, 2, None, "empty", "experts with so few rows that threads share them out")
LARGE_SHAPES = (LARGE_CAPACITY, MANY_TOKENS)


def normal(*size: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Standard normal values, drawn in float64 on the CPU, so that every dtype and device gets the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, dtype=torch.float64, generator=generator).to(dtype).to(device)


def make_logits(shape: Shape, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """[T, E], whose largest values follow ``shape.routing`` (which for holes and nobody is as even)."""
    preference = torch.zeros(shape.E, dtype=torch.float64)
    if shape.routing == "skewed":
        preference = torch.linspace(2, -2, shape.E, dtype=torch.float64)
    elif shape.routing == "one":
        preference[-1] = 50
    elif shape.routing == "empty":
        preference[shape.E // 2] = -50
    logits = normal(shape.T, shape.E, seed=seed, dtype=torch.float64) + preference
    return logits.to(dtype).to(device)


def make_expert_index(shape: Shape, *, seed: int = 0, device: str = "cpu") -> Tensor:
    """[T, K] int32: distinct experts of each token, best first, by ``shape.routing``."""
    index = make_logits(shape, seed=seed, dtype=torch.float64).topk(shape.K, dim=-1).indices
    if shape.routing == "holes":
        hole = normal(shape.T, shape.K, seed=seed + 1)
        index = torch.where(hole > 1, -1, torch.where(hole < -1, shape.E, index))
    elif shape.routing == "nobody":
        index = torch.full_like(index, -1)
    return index.to(torch.int32).to(device)


def make_plan(shape: Shape, *, seed: int = 0, device: str = "cpu") -> RoutingPlan:
    return plan_routing(make_expert_index(shape, seed=seed, device=device), shape.E, shape.C, backend="reference")


def make_gate_weight(shape: Shape, *, seed: int = 2, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """[T, K]: positive and falling, as a gate gives them."""
    return (
        normal(shape.T, shape.E, seed=seed, dtype=torch.float64).softmax(-1).topk(shape.K).values.to(dtype).to(device)
    )


def make_x(shape: Shape, *, seed: int = 3, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return normal(shape.T, shape.D, seed=seed, dtype=dtype, device=device)


def make_experts(
    shape: Shape,
    activation: str = "gelu",
    *,
    bias: bool = True,
    seed: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """w1 [E, D, F], b1 [E, F], w2 [E, F, D], b2 [E, D], F doubled in w1 and b1 for a gated activation."""
    width = 2 * shape.F if activation in GATED else shape.F
    w1 = normal(shape.E, shape.D, width, seed=seed, dtype=torch.float64) / math.sqrt(shape.D)
    w2 = normal(shape.E, shape.F, shape.D, seed=seed + 1, dtype=torch.float64) / math.sqrt(shape.F)
    b1 = normal(shape.E, width, seed=seed + 2, dtype=dtype, device=device) if bias else None
    b2 = normal(shape.E, shape.D, seed=seed + 3, dtype=dtype, device=device) if bias else None
    return w1.to(dtype).to(device), b1, w2.to(dtype).to(device), b2


def make_mask(num_tokens: int, *, device: str = "cpu") -> Tensor:
    """[T] bool: every third token takes no part."""
    return (torch.arange(num_tokens) % 3 != 0).to(device)


def unused_rows(plan: RoutingPlan) -> Tensor:
    """[R] bool"""
    return plan.row_choice < 0


def dropped_choices(plan: RoutingPlan) -> Tensor:
    """[T, K] bool: dropped, or never asked for a row."""
    return plan.choice_row < 0


def poisoned(tensor: Tensor, places: Tensor) -> Tensor:
    """A copy with NaN in the places (over the first dimensions) that nobody may read."""
    out = tensor.detach().clone()
    out[places] = math.nan
    return out
