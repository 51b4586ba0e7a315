"""A stage of a layer by itself: each backend, plain torch, others, and a copy of as many bytes or the products alone.

Plain torch is the backend "reference", whose result is also what the others are held against. Bytes are those that
must move: each input read once, each output written once.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import widenet_kernels as wk

from . import limits
from .agreement import relative_error, tensors
from .layer import OURS
from .results import Section
from .shapes import Inputs
from .timing import Call, Contender

PLAIN = "plain torch"


class Operands(NamedTuple):
    leaves: Sequence[Tensor]  # what the call takes; those that require gradients are differentiated by
    grads: Sequence[Tensor] = ()  # of what the call gives


class Way(NamedTuple):
    """One way to compute a stage. Its tensors are made when it is built: then there is room for them."""

    call: Callable[..., Any]  # of the leaves
    operands: Callable[[], Operands]
    differentiated: Callable[[Any], Sequence[Tensor]] = tensors  # of the result, what has gradients

    def forward(self) -> Call:
        leaves = self.operands().leaves
        return torch.no_grad()(lambda: self.call(*leaves))

    def backward(self) -> Call:
        """The gradients alone: the forward runs once, before the first of them."""
        leaves, grads = self.operands()
        outputs = functools.cache(lambda: self.differentiated(self.call(*leaves)))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return lambda: torch.autograd.grad(outputs(), wanted, grads, retain_graph=True)

    def forward_backward(self) -> Call:
        leaves, grads = self.operands()
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return lambda: torch.autograd.grad(self.differentiated(self.call(*leaves)), wanted, grads)


PASSES: Mapping[str, Callable[[Way], Call]] = {
    "forward": Way.forward,
    "backward": Way.backward,
    "forward+backward": Way.forward_backward,
}


class Work(NamedTuple):
    nbytes: float
    flops: float | None = None


class Peer(NamedTuple):
    way: Way
    passes: Sequence[str]
    rows: Callable[[], Tensor] | None = None  # of the first tensor of the result, those that it gives; None: all


class Stage(NamedTuple):
    """What one op does at a shape."""

    op: str
    call: Callable[..., Any]  # backend, then the leaves
    operands: Callable[[], Operands]
    passes: Mapping[str, Work]
    differentiated: Callable[[Any], Sequence[Tensor]] = tensors
    peers: Mapping[str, Peer] = {}
    limit: Callable[[str], Contender] | None = None  # pass -> the contender, if it is not a copy

    def way(self, backend: str | None) -> Way:
        return Way(functools.partial(self.call, backend), self.operands, self.differentiated)


def forward_and_backward(forward: Work, backward: Work) -> dict[str, Work]:
    flops = None if forward.flops is None or backward.flops is None else forward.flops + backward.flops
    both = Work(forward.nbytes + backward.nbytes, flops)
    return {"forward": forward, "backward": backward, "forward+backward": both}


def section(bench: str, stage: Stage, inputs: Inputs, one_pass: str) -> Section:
    """The limit is what comes first."""
    found = contenders(stage, inputs, one_pass)
    return Section(bench, inputs.case, one_pass, found, found[0].name)


def contenders(stage: Stage, inputs: Inputs, one_pass: str) -> list[Contender]:
    work, of = stage.passes[one_pass], PASSES[one_pass]
    # what is read and written, and as much for the truth
    counted: dict[str, Any] = {"flops": work.flops, "nbytes": work.nbytes, "memory": 2 * work.nbytes}
    truth = functools.cache(lambda: tensors(of(stage.way("reference"))()))
    found = [
        stage.limit(one_pass) if stage.limit else copy(work.nbytes, inputs.device),
        Contender(limits.LAUNCH, "limit", functools.partial(limits.empty_call, inputs.device)),
    ]
    backends = wk.available_backends(stage.op, inputs.device, inputs.dtype)
    for backend in backends:
        build = functools.partial(of, stage.way(backend))
        if backend == "reference":
            found.append(Contender(PLAIN, "peer", build, work=work.flops or 0.0, **counted))
        else:
            name = OURS if backend == backends[0] else f"{OURS}, {backend}"
            found.append(Contender(name, "ours", build, lambda result: relative_error(result, truth()), **counted))
    for name, peer in stage.peers.items():
        if one_pass in peer.passes:
            build, error = functools.partial(of, peer.way), functools.partial(error_in_rows, truth, peer.rows)
            found.append(Contender(name, "peer", build, error, work=work.flops or 0.0, **counted))
    return found


def copy(nbytes: float, device: str) -> Contender:
    build = functools.partial(limits.copy, nbytes, device)
    return Contender(limits.COPY, "limit", build, nbytes=nbytes, memory=nbytes)


def error_in_rows(truth: Callable[[], list[Tensor]], rows: Callable[[], Tensor] | None, result: Any) -> float:
    first, *others = truth()
    return relative_error(result, [first if rows is None else first[rows()], *others])
