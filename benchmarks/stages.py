"""The stages of a layer by themselves: each backend, plain torch, and a copy of as many bytes or the products alone.

Plain torch is the backend "reference", whose result is also what the others are held against. Bytes are those that
must move: each input read once, each output written once.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import widenet_kernels as wk

from . import counts, limits, peers
from .agreement import relative_error, tensors
from .results import Section
from .shapes import Inputs
from .timing import Call, Contender

OURS = "widenet_kernels"
OPS = {
    "gate": "topk_gate", "plan": "plan_routing", "route": "route", "permute": "permute",
    "grouped_gemm": "grouped_gemm", "combine": "combine",
}  # fmt: skip


class Stage(NamedTuple):
    """What one op does at a shape."""

    call: Callable[[str], Any]  # backend -> its result
    nbytes: float
    differentiated: Callable[[Any], Sequence[Tensor]] = tensors  # of the result, what has gradients
    leaves: Sequence[Tensor] = ()  # none: there is nothing to differentiate
    grads: Sequence[Tensor] = ()
    backward_nbytes: float = 0.0
    flops: float | None = None  # forward
    peers: Mapping[str, tuple[Call, Tensor | None]] = {}  # forward; the rows of the result that it gives, if not all
    limit: Callable[[bool], Call] | None = None  # whether with the backward -> the limit, if not a copy

    def forward(self, backend: str) -> Call:
        return torch.no_grad()(lambda: self.call(backend))

    def backward(self, backend: str) -> Call:
        """The gradients alone: the forward runs once, before the first of them."""
        outputs = functools.cache(lambda: self.differentiated(self.call(backend)))
        return lambda: torch.autograd.grad(outputs(), self.leaves, self.grads, retain_graph=True)

    def forward_backward(self, backend: str) -> Call:
        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(self.differentiated(self.call(backend)), self.leaves, self.grads)

        return call


def stages(inputs: Inputs) -> dict[str, Callable[[], Stage]]:
    """By the name of their bench."""
    made = (gate, plan, route, permute, grouped_gemm, combine)
    return {stage.__name__: functools.partial(stage, inputs) for stage in made}


def gate(inputs: Inputs) -> Stage:
    case, nbytes = inputs.case, routing_bytes(inputs)
    logits = peers.leaf(inputs.logits)
    return Stage(
        lambda backend: wk.topk_gate(logits, case.K, normalize=case.normalize, backend=backend),
        nbytes["topk_gate"],
        lambda gate: (gate.weight, gate.probs),
        [logits],
        [torch.randn_like(inputs.gate.weight), torch.randn_like(inputs.gate.probs)],
        nbytes["topk_gate backward"],
    )


def plan(inputs: Inputs) -> Stage:
    case, index = inputs.case, inputs.gate.expert_index
    return Stage(
        lambda backend: wk.plan_routing(index, case.E, case.capacity, backend=backend),
        routing_bytes(inputs)["plan_routing"],
    )


def route(inputs: Inputs) -> Stage:
    case, nbytes = inputs.case, routing_bytes(inputs)
    x, router = peers.leaf(inputs.x), peers.leaf(inputs.router)
    return Stage(
        lambda backend: wk.route(x, router, case.K, case.capacity, normalize=case.normalize, backend=backend),
        nbytes["route"],
        lambda routed: (routed[0].weight, routed[0].probs),
        [x, router],
        [torch.randn_like(inputs.gate.weight), torch.randn_like(inputs.gate.probs)],
        nbytes["route backward"],
    )


def permute(inputs: Inputs) -> Stage:
    case, plan, nbytes = inputs.case, inputs.plan, movement_bytes(inputs)
    x = peers.leaf(inputs.x)
    tokens = torch.where(plan.row_choice < 0, case.T, plan.row_choice // case.K)
    with_zero = torch.nn.functional.pad(inputs.x, (0, 0, 0, 1))
    return Stage(
        lambda backend: wk.permute(x, plan, backend=backend),
        nbytes["permute"],
        leaves=[x],
        grads=[inputs.normal(plan.num_rows, case.D)],
        backward_nbytes=nbytes["permute backward"],
        peers={"torch.index_select": (lambda: with_zero.index_select(0, tokens), None)},
    )


def combine(inputs: Inputs) -> Stage:
    case, plan, nbytes = inputs.case, inputs.plan, movement_bytes(inputs)
    rows, weight = peers.leaf(inputs.normal(plan.num_rows, case.D)), peers.leaf(inputs.gate.weight)
    return Stage(
        lambda backend: wk.combine(rows, weight, plan, backend=backend),
        nbytes["combine"],
        leaves=[rows, weight],
        grads=[inputs.grad],
        backward_nbytes=nbytes["combine backward"],
    )


def grouped_gemm(inputs: Inputs) -> Stage:
    """The first layer, with bias and activation."""
    case, plan = inputs.case, inputs.plan
    rows = peers.leaf(wk.permute(inputs.x, plan, backend="reference"))
    parameters = peers.stacked(inputs)
    w1, b1 = parameters["w1"], parameters["b1"]
    leaves = [t for t in (rows, w1, b1) if t is not None]
    # served rows in and out, the weights; backward: the gradient, the rows and the weights in, two gradients out
    weights = case.E * case.width * (case.D + bool(case.bias))
    nbytes = inputs.x.element_size() * (inputs.served * (case.D + case.F) + weights)
    again = inputs.x.element_size() * (inputs.served * (2 * case.D + case.F + case.width) + 2 * weights)
    return Stage(
        lambda backend: wk.grouped_gemm(rows, w1, plan, b1, case.activation, backend=backend),
        float(nbytes),
        leaves=leaves,
        grads=[inputs.normal(plan.num_rows, case.F)],
        backward_nbytes=float(again),
        flops=2.0 * inputs.served * case.D * case.width,
        peers={"torch grouped_mm": (grouped_mm(inputs, rows, w1, b1), inputs.served_rows())},
        limit=lambda both: functools.partial(limits.Gemms(inputs).first_layer, both),
    )


def grouped_mm(inputs: Inputs, rows: Tensor, w1: Tensor, b1: Tensor | None) -> Call:
    """torch's own, on the served rows packed beforehand."""
    multiply = peers.torch_grouped_mm()
    counts = inputs.plan.expert_count
    packed, expert = rows.detach()[inputs.served_rows()], torch.arange(inputs.case.E, device=rows.device)
    expert, ends = expert.repeat_interleave(counts), counts.cumsum(0).to(torch.int32)

    def call() -> Tensor:
        z = multiply(packed, w1, offs=ends)
        return peers.activate(z if b1 is None else z + b1[expert], inputs.case.activation)

    return call


def routing_bytes(inputs: Inputs) -> dict[str, float]:
    return counts.routing_bytes(inputs.case, inputs.plan.num_rows, inputs.x.element_size())


def movement_bytes(inputs: Inputs) -> dict[str, float]:
    return counts.movement_bytes(inputs.case, inputs.plan.num_rows, inputs.served, inputs.x.element_size())


def sections(name: str, inputs: Inputs) -> Iterator[Section]:
    stage = stages(inputs)[name]()
    limit = limits.COPY if stage.limit is None else limits.GEMMS
    yield Section(name, inputs.case, "forward", contenders(name, stage, inputs, both=False), limit)
    if stage.leaves:
        yield Section(name, inputs.case, "forward+backward", contenders(name, stage, inputs, both=True), limit)


def contenders(name: str, stage: Stage, inputs: Inputs, both: bool) -> list[Contender]:
    nbytes = stage.nbytes + (stage.backward_nbytes if both else 0)
    flops = None if stage.flops is None else stage.flops * (3 if both else 1)
    of = stage.forward_backward if both else stage.forward
    truth = functools.cache(lambda: tensors(of("reference")()))

    found = [
        Contender(limits.LAUNCH, "limit", functools.partial(limits.empty_call, inputs.device)),
        limit(stage, inputs, flops, nbytes, both),
    ]
    counted: dict[str, Any] = {"flops": flops, "nbytes": nbytes}
    backends = wk.available_backends(OPS[name], inputs.device, inputs.dtype)
    for backend in backends:
        build = functools.partial(of, backend)
        if backend == "reference":
            found.append(Contender("plain torch", "peer", build, work=flops or 0.0, **counted))
        else:
            contender = OURS if backend == backends[0] else f"{OURS}, {backend}"
            found.append(Contender(contender, "ours", build, lambda result: relative_error(result, truth()), **counted))
    for peer, (call, rows) in {} if both else stage.peers.items():
        build = functools.partial(torch.no_grad(), call)
        error = functools.partial(error_in_rows, truth, rows)
        found.append(Contender(peer, "peer", build, error, work=flops or 0.0, **counted))
    return found


def limit(stage: Stage, inputs: Inputs, flops: float | None, nbytes: float, both: bool) -> Contender:
    if stage.limit is None:
        return Contender(limits.COPY, "limit", functools.partial(limits.copy, nbytes, inputs.device), nbytes=nbytes)
    build = functools.partial(stage.limit, both)
    return Contender(limits.GEMMS, "limit", build, flops=flops, nbytes=nbytes, work=flops or 0.0)


def error_in_rows(truth: Callable[[], list[Tensor]], rows: Tensor | None, result: Any) -> float:
    return relative_error(result, truth() if rows is None else [t[rows] for t in truth()])
