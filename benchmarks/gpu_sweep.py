"""Tile sizes for every form of GEMM at real shapes: each candidate takes the place of what choose_tile would choose."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from widenet_kernels.triton import grouped_gemm, moe, tiles
from widenet_kernels.triton.tiles import Problem, Tile

from .agreement import tensors
from .gpu_timing import Bench, Work
from .shapes import FINE_GRAINED, MIXTRAL, WIDENET_B, Case, Inputs

CANDIDATES = {
    "rows": (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 4),
        Tile(128, 256, 64, 8, 3, 16),
        Tile(128, 256, 64, 8, 3, 4),
        Tile(256, 128, 64, 8, 3),
        Tile(256, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 4, 4),
        Tile(128, 128, 128, 8, 2),
        Tile(64, 256, 64, 4, 4),
    ),
    "glu": (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 3, 16),
        Tile(128, 128, 64, 8, 3, 4),
        Tile(256, 64, 64, 8, 3),
        Tile(128, 128, 128, 8, 2),
        Tile(128, 64, 64, 4, 4),
        Tile(128, 64, 64, 8, 4),
        Tile(64, 128, 64, 4, 4),
    ),
    "hidden": (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4),
        Tile(128, 128, 64, 8, 3, 16),
        Tile(128, 256, 64, 8, 3),
        Tile(256, 128, 64, 8, 3),
        Tile(128, 128, 128, 8, 2),
        Tile(128, 128, 64, 4, 3),
        Tile(128, 64, 64, 4, 4),
        Tile(64, 128, 64, 4, 4),
    ),
    "hidden_glu": (
        Tile(128, 64, 64, 8, 3),
        Tile(128, 64, 64, 8, 4),
        Tile(128, 64, 64, 4, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 8, 4),
        Tile(128, 64, 128, 8, 2),
    ),
    "weight_gathered": (
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 5),
        Tile(128, 256, 64, 8, 5, 16),
        Tile(128, 256, 64, 8, 5, 4),
        Tile(256, 128, 64, 8, 3),
        Tile(256, 128, 64, 8, 5),
        Tile(128, 256, 32, 8, 7),
        Tile(128, 128, 64, 8, 7),
        Tile(128, 128, 64, 4, 5),
        Tile(128, 128, 128, 8, 3),
    ),
}
DESCRIBED = (  # more of form "rows", where nothing is gathered
    Tile(128, 256, 64, 8, 3, described=True),
    Tile(128, 256, 64, 8, 4, described=True),
    Tile(128, 256, 64, 8, 4, 16, described=True),
    Tile(256, 128, 64, 8, 4, described=True),
    Tile(128, 128, 64, 4, 4, described=True),
    Tile(128, 128, 128, 8, 3, described=True),
)
TINY = (Tile(16, 16, 16, 4, 1), Tile(32, 16, 16, 4, 1, 2), Tile(32, 32, 16, 4, 1, described=True))

_override: dict[str, Tile] = {}  # form -> the tile to take
_chosen: dict[str, Tile] = {}  # form -> the tile taken last


def choose(problem: Problem, target: str) -> Tile:
    tile = _override.get(problem.form) or tiles.choose_tile(problem, target)
    _chosen[problem.form] = tile
    return tile


for module in (grouped_gemm, moe):
    assert hasattr(module, "choose_tile"), f"{module.__name__} chooses its tiles elsewhere"
    module.choose_tile = choose  # type: ignore[attr-defined]


def with_tile(form: str, tile: Tile, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        _override[form] = tile
        try:
            return call()
        finally:
            _override.clear()

    return run


class Products:
    """The products of one layer as the backend launches them, on random operands."""

    def __init__(self, case: Case, bench: Bench) -> None:
        self.case, self.inputs = case, Inputs(case, bench.device, torch.bfloat16)
        self.plan, self.experts = self.inputs.plan, self.inputs.experts
        self.places = (self.plan.expert_begin, self.plan.expert_count)
        self.served = self.inputs.served_rows()
        self.flops = 2.0 * self.inputs.served * case.D * case.F

    def random(self, columns: int) -> Tensor:
        return self.inputs.normal(self.plan.num_rows, columns)

    def first(self) -> Callable[[], Any]:
        case, (w1, b1) = self.case, (self.experts["w1"], self.experts["b1"])
        gather: dict[str, Any] = {"gather": self.plan.row_choice, "k": case.K, "save": True}
        places = (*self.places, self.plan.num_rows)
        return lambda: grouped_gemm.multiply(self.inputs.x, w1, b1, *places, case.activation, **gather)

    def second(self) -> Callable[[], Any]:
        hidden, (w2, b2) = self.random(self.case.F), (self.experts["w2"], self.experts["b2"])
        return lambda: grouped_gemm.multiply(hidden, w2, b2, *self.places, self.plan.num_rows)

    def grad_rows(self) -> Callable[[], Any]:
        dz, w1 = self.random(self.case.width), self.experts["w1"].transpose(1, 2)
        return lambda: grouped_gemm.multiply(dz, w1, None, *self.places, self.plan.num_rows)

    def hidden(self) -> Callable[[], Any]:
        case, z, grad = self.case, self.random(self.case.width), self.inputs.normal(self.case.T, self.case.D)
        weight, w2 = self.inputs.gate.weight, self.experts["w2"]
        wanted = (True, True, True, case.bias)
        return lambda: moe.hidden_backward(
            grad, weight, self.plan.row_choice, *self.places, z, w2, case.activation, *wanted
        )[:2]

    def weight_1(self) -> Callable[[], Any]:
        dz = self.random(self.case.width)
        return self._weight(self.inputs.x, dz, torch.empty_like(self.experts["w1"]), gather="a")

    def weight_2(self) -> Callable[[], Any]:
        hidden, grad = self.random(self.case.F), self.inputs.normal(self.case.T, self.case.D)
        return self._weight(hidden, grad, torch.empty_like(self.experts["w2"]), gather="b")

    def _weight(self, a: Tensor, b: Tensor, out: Tensor, **gather: Any) -> Callable[[], Tensor]:
        gather |= {"row_choice": self.plan.row_choice, "k": self.case.K}

        def call() -> Tensor:
            grouped_gemm.weight_gradient(a, b, out, *self.places, self.plan.num_rows, **gather)
            return out

        return call


def sweep(bench: Bench, name: str, case: Case, product: str, form: str, gated: bool, candidates: tuple) -> None:
    """The candidates by falling speed, each held against the result of the default tile."""
    products = Products(case, bench)
    call = getattr(products, product)()

    def compared(result: Any) -> list[Tensor]:  # rows that nobody uses stay unwritten
        return [t if form == "weight_gathered" else t[products.served] for t in tensors(result) if t.numel()]

    truth = [t.clone() for t in compared(call())]
    default = _chosen[form]
    flops = products.flops * (2 if gated else 1)
    works = {f"default {default}": Work(call, flops=flops, graph=False)}
    for tile in candidates:
        if tile != default:
            works[str(tile)] = Work(with_tile(form, tile, call), truth, compared, flops=flops, graph=False)
    rows = bench.timed(works)
    if bench.fill:
        return
    speed = rows[f"default {default}"].get("tflops", 0.0)
    for row in rows.values():
        if "tflops" in row and speed:
            row["speed_of_default"] = row["tflops"] / speed
    bench.put(name, sorted(rows.values(), key=lambda row: row.get("ms", float("inf"))))


def sections(shrink: Callable[[Case], Case], tiny: bool) -> dict[str, Callable[[Bench], None]]:
    """By importance: (layer, product, its form, whether its result is the two halves of a gated layer)."""
    wanted = (
        (WIDENET_B, "first", "rows", False),
        (WIDENET_B, "second", "rows", False),
        (WIDENET_B, "hidden", "hidden", False),
        (WIDENET_B, "weight_1", "weight_gathered", False),
        (WIDENET_B, "weight_2", "weight_gathered", False),
        (WIDENET_B, "grad_rows", "rows", False),
        (MIXTRAL, "first", "glu", True),
        (MIXTRAL, "second", "rows", False),
        (MIXTRAL, "hidden", "hidden_glu", False),
        (MIXTRAL, "weight_1", "weight_gathered", True),
        (FINE_GRAINED, "first", "glu", True),
    )
    made = {}
    for case, product, form, gated in wanted:
        name = f"{case.name} {product} ({form})"
        chosen = CANDIDATES[form] + (DESCRIBED if product in ("second", "grad_rows") else ())
        chosen = TINY if tiny else chosen
        made[name] = section(name, shrink(case), product, form, gated, chosen)
    return made


def section(*arguments: Any) -> Callable[[Bench], None]:
    return lambda bench: sweep(bench, *arguments)
