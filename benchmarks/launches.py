"""Gate and plan, launches of a few microseconds: once from a cold cache, and many in one graph, where it is warm."""

import functools
from collections.abc import Iterator

import torch

import widenet_kernels as wk

from . import limits
from .host import many
from .results import Section
from .shapes import Inputs
from .timing import Call, Contender

MANY = 20


def sections(inputs: Inputs) -> Iterator[Section]:
    empty = functools.partial(limits.empty_call, inputs.device)
    found = [Contender(limits.LAUNCH, "limit", empty)]
    for backend in wk.available_backends("route", inputs.device, inputs.dtype):
        kind, build = "peer" if backend == "reference" else "ours", functools.partial(gate_and_plan, inputs, backend)
        found.append(Contender(f"gate + plan, {backend}", kind, build))
        found.append(Contender(f"gate + plan, {MANY} times, {backend}", kind, many(build, MANY), repeat=MANY))
    yield Section("launches", inputs.case, "forward", found, limits.LAUNCH)


def gate_and_plan(inputs: Inputs, backend: str) -> Call:
    case = inputs.case

    def call() -> object:
        gate = wk.topk_gate(inputs.logits, case.K, normalize=case.normalize, backend=backend)
        return gate, wk.plan_routing(gate.expert_index, case.E, case.capacity, backend=backend)

    return torch.no_grad()(call)
