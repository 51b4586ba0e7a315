"""The routing and the movement of rows at full size, forward and backward alone, by every backend."""

from collections.abc import Sequence

import torch

import widenet_kernels as wk

from . import limits, stages
from .agreement import tensors
from .gpu_timing import Bench, Work
from .shapes import Case, Inputs
from .stage import PASSES
from .timing import Call

MANY = 20
ROUTING, MOVEMENT = ("gate", "plan", "route"), ("permute", "combine")


def by_backend(bench: Bench, inputs: Inputs, names: Sequence[str]) -> dict[str, Work]:
    """Works of the stages, each held against the reference."""
    works = {}
    for name in names:
        stage = stages.STAGES[name](inputs)
        for title, one_pass in ((stage.op, "forward"), (f"{stage.op} backward", "backward")):
            if one_pass not in stage.passes:
                continue
            call, nbytes = PASSES[one_pass], stage.passes[one_pass].nbytes
            truth = () if bench.fill else tensors(call(stage.way("reference"))())
            for backend in wk.available_backends(stage.op, bench.device, inputs.dtype):
                works[f"{title}, {backend}"] = Work(call(stage.way(backend)), truth, nbytes=nbytes, host=True)
    return works


def routing(bench: Bench, case: Case) -> None:
    """Gate, plan and route: launches of a few microseconds, so gate and plan also many in one graph, cache warm."""
    inputs = Inputs(case, bench.device, torch.bfloat16)
    works = {}
    for backend in wk.available_backends("route", bench.device, inputs.dtype):
        call = gate_and_plan(inputs, backend)
        works[f"gate + plan, {backend}"] = Work(call, host=True)
        works[f"gate + plan, {MANY} in one graph, {backend}"] = Work(many(call), repeat=MANY)
    bench.measure(f"{case.name} routing", works | by_backend(bench, inputs, ROUTING))


def gate_and_plan(inputs: Inputs, backend: str) -> Call:
    gate, case = stages.gate(inputs), inputs.case

    def call() -> object:
        with torch.no_grad():
            gated = gate.call(backend, *gate.operands().leaves)
            return gated, wk.plan_routing(gated.expert_index, case.E, case.capacity, backend=backend)

    return call


def many(call: Call) -> Call:
    return lambda: [call() for _ in range(MANY)]


def movement(bench: Bench, case: Case) -> None:
    """permute and combine, beside an index_select of torch and a copy of the same rows."""
    inputs = Inputs(case, bench.device, torch.bfloat16)
    works = by_backend(bench, inputs, MOVEMENT)
    permute = stages.permute(inputs)
    for name, peer in permute.peers.items():
        works[f"{name} (permute)"] = Work(peer.way.forward(), nbytes=permute.passes["forward"].nbytes)
    of_rows = 2.0 * inputs.x.element_size() * inputs.plan.num_rows * case.D
    works["copy of the rows"] = Work(limits.copy(of_rows, bench.device), nbytes=of_rows)
    bench.measure(f"{case.name} movement", works)
