"""Tile sizes for every form of GEMM: each candidate takes the place of what choose_tile would choose.

Imported when it is asked for, as Triton is.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from widenet_kernels.triton import grouped_gemm, tiles
from widenet_kernels.triton.tiles import Problem, Tile

from .agreement import relative_error, tensors
from .results import Section
from .shapes import FINE_GRAINED, MIXTRAL, Inputs
from .timing import Call, Contender

CANDIDATES = {
    "rows": (
        Tile(128, 256, 64, 8, 3, described=True),
        Tile(128, 256, 64, 8, 4, described=True),
        Tile(128, 256, 64, 8, 4, 4, described=True),
        Tile(128, 256, 64, 8, 4, 16, described=True),
        Tile(256, 128, 64, 8, 4, described=True),
        Tile(128, 128, 64, 8, 3, described=True, registers=128),
        Tile(128, 128, 64, 8, 2, described=True, registers=128),
        Tile(128, 128, 64, 4, 3, described=True),
        Tile(64, 256, 64, 4, 2, described=True),
        Tile(128, 256, 64, 8, 4),
    ),
    "activated": (
        Tile(128, 128, 64, 8, 3, described=True),
        Tile(128, 128, 64, 8, 3, described=True, registers=128),
        Tile(128, 128, 64, 8, 3, 16, described=True, registers=128),
        Tile(128, 128, 64, 8, 2, described=True, registers=128),
        Tile(128, 128, 32, 8, 4, described=True, registers=128),
        Tile(128, 64, 64, 4, 3, described=True),
        Tile(128, 256, 64, 8, 3, described=True),
        Tile(128, 256, 64, 8, 4, described=True),
        Tile(256, 128, 64, 8, 3, described=True),
        Tile(256, 128, 64, 8, 4, described=True),
        Tile(128, 128, 64, 8, 3),
    ),
    "glu": (
        Tile(128, 128, 64, 8, 3, described=True),
        Tile(128, 128, 64, 8, 4, described=True),
        Tile(128, 128, 64, 8, 4, 4, described=True),
        Tile(128, 128, 64, 8, 4, 16, described=True),
        Tile(256, 64, 64, 8, 4, described=True),
        Tile(128, 64, 64, 4, 3, described=True),
        Tile(128, 64, 64, 8, 3, described=True, registers=128),
        Tile(64, 128, 64, 4, 3, described=True),
        Tile(128, 128, 64, 8, 4),
    ),
    "weight": (
        Tile(128, 256, 64, 8, 3, described=True),
        Tile(128, 256, 64, 8, 4, described=True),
        Tile(128, 256, 64, 8, 4, 4, described=True),
        Tile(128, 256, 64, 8, 4, 16, described=True),
        Tile(256, 128, 64, 8, 3, described=True),
        Tile(256, 128, 64, 8, 4, described=True),
        Tile(128, 128, 64, 8, 3, described=True, registers=128),
        Tile(128, 128, 64, 8, 4, described=True),
        Tile(128, 128, 64, 4, 3, described=True),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 128, 64, 8, 3),
    ),
}
FEWER = {  # by importance, where there is no time for every product
    MIXTRAL.name: ("first", "second", "weight_1"),
    FINE_GRAINED.name: ("first", "second", "grad_hidden", "weight_1"),
}


class Choice:
    """Stands in the place of choose_tile, for calls that launch one product."""

    def __init__(self) -> None:
        self.override: Tile | None = None
        self.last: tuple[str, Tile]  # the form of the product launched last, and its tile

    def __call__(self, problem: Problem, target: str) -> Tile:
        tile = self.override or tiles.choose_tile(problem, target)
        self.last = (problem.form, tile)
        return tile

    def with_tile(self, tile: Tile, call: Call) -> Call:
        def run() -> Any:
            self.override = tile
            try:
                return call()
            finally:
                self.override = None

        return run


class Products:
    """The products of one layer as the backend launches them, on random operands."""

    def __init__(self, inputs: Inputs) -> None:
        self.case, self.inputs = inputs.case, inputs
        self.plan, self.experts = inputs.plan, inputs.experts
        self.places = (self.plan.expert_begin, self.plan.expert_count)

    def flops(self, product: str) -> float:
        width = self.case.width if product in ("first", "grad_rows", "weight_1") else self.case.F
        return 2.0 * self.inputs.served * self.case.D * width

    def random(self, columns: int) -> Tensor:
        return self.inputs.normal(self.plan.num_rows, columns)

    def first(self) -> Call:
        rows, (w1, b1) = self.random(self.case.D), (self.experts["w1"], self.experts["b1"])
        places = (*self.places, self.plan.num_rows)
        return lambda: grouped_gemm.multiply(rows, w1, b1, *places, self.case.activation, save=True)

    def second(self) -> Call:
        hidden, (w2, b2) = self.random(self.case.F), (self.experts["w2"], self.experts["b2"])
        return lambda: grouped_gemm.multiply(hidden, w2, b2, *self.places, self.plan.num_rows)

    def grad_rows(self) -> Call:
        dz, w1 = self.random(self.case.width), self.experts["w1"].transpose(1, 2)
        return lambda: grouped_gemm.multiply(dz, w1, None, *self.places, self.plan.num_rows)

    def grad_hidden(self) -> Call:
        dy, w2 = self.random(self.case.D), self.experts["w2"].transpose(1, 2)
        return lambda: grouped_gemm.multiply(dy, w2, None, *self.places, self.plan.num_rows)

    def weight_1(self) -> Call:
        return self._weight(self.random(self.case.D), self.random(self.case.width), "w1")

    def weight_2(self) -> Call:
        return self._weight(self.random(self.case.F), self.random(self.case.D), "w2")

    def _weight(self, a: Tensor, b: Tensor, name: str) -> Callable[[], Tensor]:
        out = torch.empty_like(self.experts[name])

        def call() -> Tensor:
            grouped_gemm.weight_gradient(a, b, out, *self.places, self.plan.num_rows)
            return out

        return call


def sections(product: str, inputs: Inputs) -> Iterator[Section]:
    """One, during which the candidates are in force."""
    if product not in FEWER.get(inputs.case.name, (product,)):
        return
    one_pass, choice = "forward" if product in ("first", "second") else "backward", Choice()
    with patch.object(grouped_gemm, "choose_tile", choice):
        found = contenders(Products(inputs), product, choice)
        yield Section(f"tiles-{product}", inputs.case, one_pass, found, found[0].name)


def contenders(products: Products, product: str, choice: Choice) -> list[Contender]:
    """The default tile, and the candidates, each held against its result."""
    call, served = getattr(products, product)(), products.inputs.served_rows()

    def compared(result: Any) -> list[Tensor]:  # rows that nobody uses stay unwritten
        return [t if product.startswith("weight") else t[served] for t in tensors(result) if t.numel()]

    def error(result: Any) -> float:
        return relative_error(compared(result), truth)

    truth = [t.clone() for t in compared(call())]
    form, default = choice.last
    options: dict[str, Any] = {"flops": products.flops(product), "graph": False}
    return [
        Contender(f"default {default}", "ours", lambda: call, **options),
        *(
            Contender(str(tile), "ours", functools.partial(choice.with_tile, tile, call), error, **options)
            for tile in CANDIDATES[form]
            if tile != default
        ),
    ]
