"""The host's time in one forward pass of a layer so small that there is nothing else: beyond the same products."""

import functools
from collections.abc import Callable, Iterator

import torch

from . import limits
from .layer import Contest
from .results import Section
from .shapes import HOST, Inputs
from .timing import Call, Contender

CALLS = 100  # in one turn


def sections(inputs: Inputs) -> Iterator[Section]:
    """Of one shape, whatever shapes were asked for."""
    inputs = Inputs(HOST, inputs.device, inputs.dtype)
    layers = [contender for contender in Contest(inputs).contenders("forward") if contender.kind != "limit"]
    contenders = [Contender(limits.PRODUCTS, "limit", functools.partial(products, inputs)), *layers]
    repeated = [contender._replace(build=many(contender.build, CALLS), repeat=CALLS) for contender in contenders]
    yield Section("host", HOST, "forward", repeated, limits.PRODUCTS)


def products(inputs: Inputs) -> Call:
    """The router's product and the experts' on the rows they serve."""
    gemms, logits = limits.Gemms(inputs), torch.empty_like(inputs.logits, dtype=inputs.dtype)

    router = inputs.router.t()

    def call() -> None:
        torch.mm(inputs.x, router, out=logits)
        gemms.forward()

    return call


def many(build: Callable[[], Call], calls: int) -> Callable[[], Call]:
    def built() -> Call:
        call = build()

        def repeated() -> object:
            for _ in range(calls - 1):
                call()
            return call()

        return repeated

    return built
