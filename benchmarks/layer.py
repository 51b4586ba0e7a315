"""The whole layer, router included, x to y: ours, the peers, and the products alone."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import widenet_kernels as wk

from . import adapters, counts, limits, peers
from .agreement import error_by_name
from .peers import Layer
from .results import Section
from .shapes import Inputs
from .timing import Call, Contender, Unavailable

OURS = "widenet_kernels"
DIRECTIONS = ("forward", "forward+backward")


def sections(inputs: Inputs) -> Iterator[Section]:
    contest = Contest(inputs)
    limit = limits.DENSE if inputs.device == "cuda" else limits.GEMMS
    for direction in DIRECTIONS:
        yield Section("layer", inputs.case, direction, contest.contenders(direction), limit)


class Contest:
    """All that compute the layer of these inputs."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.truth = functools.cache(functools.partial(peers.exact, inputs))  # by normalize and backward

    def contenders(self, direction: str) -> list[Contender]:
        inputs, case = self.inputs, self.inputs.case
        both = direction != "forward"
        flops = counts.layer_flops(case, inputs.served) * (3 if both else 1)
        passes = (inputs.serving, case.E) if both else (inputs.serving,)
        nbytes = sum(counts.layer_bytes(case, inputs.x.element_size(), experts) for experts in passes)
        counted: dict[str, Any] = {"flops": flops, "nbytes": nbytes}
        memory = peers.rows_bytes(inputs, inputs.served)
        held = 3 * nbytes  # what is counted, and the same twice as wide for the truth
        found = [
            Contender(name, "limit", self.products(dense, both), work=flops, memory=memory + held, **counted)
            for name, dense in ((limits.GEMMS, False), (limits.DENSE, True))
        ]
        every = {OURS: peers.Peer(ours, lambda inputs: memory)} | dict(peers.PEERS) | dict(adapters.PEERS)
        for name, peer in every.items():
            if not peer.installed:
                found.append(Contender(name, "peer", not_installed, **counted))
                continue
            kind, layer = "ours" if name == OURS else "peer", Built(self, peer.build, both)
            # ours need not be as slow as torch.mm is foreseen to be
            work = 0.0 if kind == "ours" else flops + peer.flops(inputs) * (3 if both else 1)
            needed: dict[str, Any] = {"work": work, "memory": peer.memory(inputs) + held, "graph": peer.graph}
            found.append(Contender(name, kind, layer.call, layer.error, **needed, **counted))
        return found

    def products(self, dense: bool, both: bool) -> Callable[[], Call]:
        def build() -> Call:
            gemms = limits.Gemms(self.inputs, dense)
            return gemms.forward_backward if both else gemms.forward

        return build


def not_installed() -> Call:
    raise Unavailable("not installed")


class Built:
    """A contender's layer: made when its turn comes."""

    def __init__(self, contest: Contest, build: peers.Build, both: bool) -> None:
        self.contest, self.build, self.both = contest, build, both
        self.layer: Layer

    def call(self) -> Call:
        inputs = self.contest.inputs
        self.layer = self.build(inputs)
        if self.both:
            return peers.gradients(self.layer, inputs.x, inputs.grad)
        return torch.no_grad()(lambda: self.layer.forward(inputs.x))

    def error(self, result: Any) -> float:
        named = peers.named(self.layer, result) if self.both else {"y": result}
        return error_by_name(named, self.contest.truth(self.layer.normalize, self.both))


def ours(inputs: Inputs) -> Layer:
    """Router and experts of an MoELayer; its losses, which no peer computes here, are left out."""
    case = inputs.case
    layer = wk.MoELayer(
        case.D, case.F, case.E, case.K, case.capacity_factor,
        activation=case.activation, bias=case.bias, normalize=case.normalize, noise_std=0.0,
    )  # fmt: skip
    layer.router.weight = nn.Parameter(inputs.router.detach())
    for name, tensor in inputs.experts.items():
        setattr(layer.experts, name, None if tensor is None else nn.Parameter(tensor.detach()))
    named = {"router": layer.router.weight, **dict(layer.experts.named_parameters())}

    def forward(x: Tensor) -> Tensor:
        gate, plan, _ = layer.router(x, case.capacity)
        return layer.experts(x, gate.weight, plan)

    return Layer(
        forward, list(named.values()), lambda grads: dict(zip(named, grads, strict=True)), case.normalize
    )  # fmt: skip
