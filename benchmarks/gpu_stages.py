"""The stages of a layer by themselves, forward and backward, by every backend: their bytes against those of a copy.

Plain torch is the backend "reference". Bytes are those that must move: each input read once, each output written once.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import widenet_kernels as wk

from .gpu_layers import Case, Inputs
from .gpu_timing import Bench, Work, tensors

Call = Callable[[], Any]
ELEMENT, WIDE, INDEX = 2, 4, 4  # bytes: tokens, rows and the router in bf16; logits, probs and weights in fp32; int32
MANY = 20


class Stage(NamedTuple):
    of: Callable[[str], Call]  # backend -> what is timed
    nbytes: float = 0  # 0: it stays in the cache, where bytes say nothing
    compared: Callable[[Any], Any] = lambda result: result
    repeat: int = 1

    def works(self, bench: Bench) -> dict[str, Work]:
        """By backend, held against the reference."""
        truth = () if bench.fill else tensors(self.compared(self.of("reference")()))
        return {
            backend: Work(
                self.of(backend), truth, self.compared, nbytes=self.nbytes, repeat=self.repeat, host=self.repeat == 1
            )
            for backend in wk.available_backends("route", bench.device, torch.bfloat16)
        }


def contenders(bench: Bench, stages: Mapping[str, Stage]) -> dict[str, Work]:
    return {
        f"{name}, {backend}": work for name, stage in stages.items() for backend, work in stage.works(bench).items()
    }


def forward(function: Callable[[str], Any]) -> Callable[[str], Call]:
    return lambda backend: torch.no_grad()(lambda: function(backend))


def backward(
    function: Callable[[str], Sequence[Tensor]], leaves: Sequence[Tensor], grads: Sequence[Tensor]
) -> Callable[[str], Call]:
    """The gradients alone: the forward runs once, before the first of them."""

    def of(backend: str) -> Call:
        outputs = functools.cache(lambda: function(backend))
        return lambda: torch.autograd.grad(outputs(), leaves, grads, retain_graph=True)

    return of


def routing(bench: Bench, case: Case) -> None:
    """Gate, plan and route: launches of a few microseconds, so gate and plan also many in one graph, cache warm."""
    inputs = Inputs(case, bench.device)
    x, router, logits = (t.detach().clone().requires_grad_() for t in (inputs.x, inputs.router, inputs.logits))
    index, options = inputs.gate.expert_index, {"normalize": case.normalize}
    grads = [torch.randn_like(inputs.gate.weight), torch.randn_like(inputs.gate.probs)]

    def gate(backend: str) -> wk.Gate:
        return wk.topk_gate(logits, case.K, **options, backend=backend)

    def plan(backend: str, expert_index: Tensor = index) -> wk.RoutingPlan:
        return wk.plan_routing(expert_index, case.E, inputs.capacity, backend=backend)

    def gate_and_plan(backend: str) -> tuple:
        gated = gate(backend)
        return gated, plan(backend, gated.expert_index)

    def route(backend: str) -> tuple:
        return wk.route(x, router, case.K, inputs.capacity, **options, backend=backend)

    nbytes = routing_bytes(case, inputs.plan.num_rows)
    both = nbytes["topk_gate"] + nbytes["plan_routing"]
    gate_backward = backward(lambda backend: gate(backend)[::2], [logits], grads)  # from weight and probs
    route_backward = backward(lambda backend: route(backend)[0][::2], [x, router], grads)
    # Between nearly equal logits of its own a backend's route may choose otherwise than the reference: its logits are
    # compared, not its choices, and the router's gradient, a sum over the tokens, not that of x with a row for each.
    stages = {
        "gate + plan": Stage(forward(gate_and_plan), both),
        f"gate + plan, {MANY} in one graph": Stage(
            forward(lambda backend: [gate_and_plan(backend) for _ in range(MANY)]), repeat=MANY
        ),
        "topk_gate": Stage(forward(gate), nbytes["topk_gate"]),
        "topk_gate backward": Stage(gate_backward, nbytes["topk_gate backward"]),
        "plan_routing": Stage(forward(plan), nbytes["plan_routing"]),
        "route": Stage(forward(route), nbytes["route"], lambda result: result[2]),
        "route backward": Stage(route_backward, nbytes["route backward"], lambda result: result[1]),
    }
    bench.measure(f"{case.name} routing", contenders(bench, stages))


def routing_bytes(case: Case, num_rows: int) -> dict[str, float]:
    choices, of_experts = case.T * case.K, WIDE * case.T * case.E
    of_gate = (WIDE + INDEX) * choices  # weight and expert_index
    of_plan = INDEX * (choices + num_rows)  # choice_row and row_choice
    of_x, of_router = ELEMENT * case.T * case.D, ELEMENT * case.E * case.D
    gradient = of_experts + of_gate + (WIDE * choices if case.normalize else 0)  # grad_weight, index, probs; weight
    return {
        "topk_gate": 2 * of_experts + of_gate,
        "topk_gate backward": 2 * of_experts + gradient,
        "plan_routing": INDEX * choices + of_plan,
        "route": of_x + of_router + 2 * of_experts + of_gate + of_plan,
        "route backward": 2 * (of_x + of_router) + of_experts + gradient,
    }


def movement(bench: Bench, case: Case) -> None:
    """permute and combine, beside an index_select of torch and a copy of the same rows."""
    inputs = Inputs(case, bench.device)
    plan = inputs.plan
    x = inputs.x.detach().requires_grad_()
    rows = inputs.normal(plan.num_rows, case.D).requires_grad_()
    weight = inputs.gate.weight.detach().clone().requires_grad_()
    grad_rows, grad_y = inputs.normal(plan.num_rows, case.D), inputs.normal(case.T, case.D)

    def permute(backend: str) -> Tensor:
        return wk.permute(x, plan, backend=backend)

    def combine(backend: str) -> Tensor:
        return wk.combine(rows, weight, plan, backend=backend)

    nbytes = movement_bytes(case, plan.num_rows, inputs.served)
    stages = {
        "permute": Stage(forward(permute), nbytes["permute"]),
        "permute backward": Stage(
            backward(lambda backend: [permute(backend)], [x], [grad_rows]), nbytes["permute backward"]
        ),
        "combine": Stage(forward(combine), nbytes["combine"]),
        "combine backward": Stage(
            backward(lambda backend: [combine(backend)], [rows, weight], [grad_y]), nbytes["combine backward"]
        ),
    }
    works = contenders(bench, stages)
    tokens = plan.row_choice.clamp_min(0) // case.K
    target, source = torch.empty_like(grad_rows), inputs.normal(plan.num_rows, case.D)
    works["torch.index_select (permute)"] = Work(lambda: inputs.x.index_select(0, tokens), nbytes=nbytes["permute"])
    works["copy of the rows"] = Work(lambda: target.copy_(source), nbytes=2 * ELEMENT * plan.num_rows * case.D)
    bench.measure(f"{case.name} movement", works)


def movement_bytes(case: Case, num_rows: int, served: int) -> dict[str, float]:
    of_choices = (WIDE + INDEX) * case.T * case.K  # weight and choice_row
    of_rows, of_served, of_tokens = (ELEMENT * count * case.D for count in (num_rows, served, case.T))
    return {
        "permute": of_tokens + of_rows + INDEX * num_rows,
        "permute backward": of_served + of_tokens + INDEX * case.T * case.K,
        "combine": of_served + of_tokens + of_choices,
        "combine backward": of_tokens + of_served + of_rows + INDEX * num_rows + of_choices,
    }
