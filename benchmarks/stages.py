"""The stages of a layer by themselves, as one table: what each calls, on what, and the bytes it moves."""

import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

import widenet_kernels as wk

from . import counts, gemms
from .layer import DIRECTIONS
from .peers import leaf
from .results import Section
from .shapes import Inputs
from .stage import Operands, Peer, Stage, Way, Work, forward_and_backward, section


def gate(inputs: Inputs) -> Stage:
    case, nbytes = inputs.case, routing_bytes(inputs)
    return Stage(
        "topk_gate",
        lambda backend, logits: wk.topk_gate(logits, case.K, normalize=case.normalize, backend=backend),
        functools.cache(lambda: Operands([leaf(inputs.logits)], gate_grads(inputs))),
        forward_and_backward(Work(nbytes["topk_gate"]), Work(nbytes["topk_gate backward"])),
        lambda gate: (gate.weight, gate.probs),
    )


def plan(inputs: Inputs) -> Stage:
    case = inputs.case
    return Stage(
        "plan_routing",
        lambda backend, index: wk.plan_routing(index, case.E, case.capacity, backend=backend),
        lambda: Operands([inputs.gate.expert_index]),
        {"forward": Work(routing_bytes(inputs)["plan_routing"])},
    )


def route(inputs: Inputs) -> Stage:
    case, nbytes = inputs.case, routing_bytes(inputs)
    return Stage(
        "route",
        lambda backend, x, router: wk.route(
            x, router, case.K, case.capacity, normalize=case.normalize, backend=backend
        ),
        functools.cache(lambda: Operands([leaf(inputs.x), leaf(inputs.router)], gate_grads(inputs))),
        forward_and_backward(Work(nbytes["route"]), Work(nbytes["route backward"])),
        lambda routed: (routed[0].weight, routed[0].probs),
    )


def permute(inputs: Inputs) -> Stage:
    case, plan, nbytes = inputs.case, inputs.plan, movement_bytes(inputs)

    def selected() -> Tensor:
        """The token of every row; of an unused one the zeros behind them."""
        return torch.where(plan.row_choice < 0, case.T, plan.row_choice // case.K)

    index_select = Way(
        lambda x, tokens: x.index_select(0, tokens),
        lambda: Operands([torch.nn.functional.pad(inputs.x, (0, 0, 0, 1)), selected()]),
    )
    return Stage(
        "permute",
        lambda backend, x: wk.permute(x, plan, backend=backend),
        functools.cache(lambda: Operands([leaf(inputs.x)], [inputs.normal(plan.num_rows, case.D)])),
        forward_and_backward(Work(nbytes["permute"]), Work(nbytes["permute backward"])),
        peers={"torch.index_select": Peer(index_select, ["forward"])},
    )


def combine(inputs: Inputs) -> Stage:
    case, plan, nbytes = inputs.case, inputs.plan, movement_bytes(inputs)

    @functools.cache
    def operands() -> Operands:
        return Operands([leaf(inputs.normal(plan.num_rows, case.D)), leaf(inputs.gate.weight)], [inputs.grad])

    return Stage(
        "combine",
        lambda backend, rows, weight: wk.combine(rows, weight, plan, backend=backend),
        operands,
        forward_and_backward(Work(nbytes["combine"]), Work(nbytes["combine backward"])),
    )


def gate_grads(inputs: Inputs) -> list[Tensor]:
    return [torch.randn_like(inputs.gate.weight), torch.randn_like(inputs.gate.probs)]


def routing_bytes(inputs: Inputs) -> dict[str, float]:
    return counts.routing_bytes(inputs.case, inputs.plan.num_rows, inputs.x.element_size())


def movement_bytes(inputs: Inputs) -> dict[str, float]:
    return counts.movement_bytes(inputs.case, inputs.plan.num_rows, inputs.served, inputs.x.element_size())


STAGES: Mapping[str, Callable[[Inputs], Stage]] = {  # by the name of their bench
    "gate": gate,
    "plan": plan,
    "route": route,
    "permute": permute,
    "grouped_gemm": gemms.first_layer,
    "combine": combine,
}


def sections(name: str, inputs: Inputs) -> Iterator[Section]:
    stage = STAGES[name](inputs)
    for one_pass in DIRECTIONS:
        if one_pass in stage.passes:
            yield section(name, stage, inputs, one_pass)


def backward(inputs: Inputs) -> Iterator[Section]:
    """The gradients alone of what routes and moves; those of grouped_gemm are products, one by one in ``gemms``."""
    for name in ("gate", "route", "permute", "combine"):
        yield section(name, STAGES[name](inputs), inputs, "backward")
