"""grouped_gemm by itself: the first layer as a stage has it, and each product of both layers alone."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import widenet_kernels as wk

from . import counts, limits, peers
from .layer import OURS
from .results import Section
from .shapes import Inputs
from .stage import PLAIN, Operands, Peer, Stage, Way, Work, forward_and_backward, section
from .timing import Call, Contender

EVERY = ("rows", "weight", "bias")


class Gemm(NamedTuple):
    """One of a layer's two, with bias and activation or without."""

    inputs: Inputs
    weight: str  # w1 or w2
    bias: str | None = None  # b1 or b2
    activation: str | None = None

    @property
    def depth(self) -> int:
        return self.inputs.case.D if self.weight == "w1" else self.inputs.case.F

    @property
    def width(self) -> int:
        return self.inputs.case.width if self.weight == "w1" else self.inputs.case.D

    @property
    def flops(self) -> float:
        return 2.0 * self.inputs.served * self.depth * self.width

    def nbytes(self, wanted: Sequence[str]) -> float:
        """Of one of its three products: the rows, the weights, the result, whichever of them is computed."""
        experts = self.inputs.case.E if "weight" in wanted else self.inputs.serving  # who serves nobody is not read
        rows = self.inputs.served * (self.depth + self.width)
        return float(self.inputs.x.element_size() * (rows + experts * self.depth * self.width))

    def operands(self, wanted: Sequence[str]) -> Operands:
        """``wanted``: by what is differentiated."""
        inputs, rows = self.inputs, self.inputs.plan.num_rows
        bias = None if self.bias is None else inputs.experts[self.bias]
        found = {"rows": inputs.normal(rows, self.depth), "weight": inputs.experts[self.weight], "bias": bias}
        leaves = [t.detach().requires_grad_(name in wanted) for name, t in found.items() if t is not None]
        return Operands(leaves, [inputs.normal(rows, inputs.case.F if self.activation else self.width)])

    def call(self, backend: str | None, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return wk.grouped_gemm(rows, weight, self.inputs.plan, bias, self.activation, backend=backend)

    def grouped_mm(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """torch's own, on the served rows."""
        expert, ends = self.inputs.served_experts
        z = peers.torch_grouped_mm()(rows, weight, offs=ends)
        z = z if bias is None else z + bias[expert]
        return peers.activate(z, self.activation) if self.activation else z

    def stage(self, passes: Mapping[str, Work], limit: Callable[[str], Contender], wanted: Sequence[str]) -> Stage:
        operands, served = functools.cache(functools.partial(self.operands, wanted)), self.inputs.served_rows

        @functools.cache
        def packed() -> Operands:
            (rows, *others), (grad,) = operands()
            return Operands([rows.detach()[served()].requires_grad_(rows.requires_grad), *others], [grad[served()]])

        # what comes first in the results has rows, unless it is the gradient of the weight
        peer = Peer(Way(self.grouped_mm, packed), list(passes), None if wanted == ("weight",) else served)
        return Stage("grouped_gemm", self.call, operands, passes, peers={"torch grouped_mm": peer}, limit=limit)


def first_layer(inputs: Inputs) -> Stage:
    """The first layer, with bias and activation."""
    case, size = inputs.case, inputs.x.element_size()
    gemm = Gemm(inputs, "w1", "b1", case.activation)
    # served rows in and out, the weights; backward: the gradient, the rows and the weights in, two gradients out
    weight = case.width * (case.D + bool(case.bias))  # of one expert; of those that serve nobody the gradient alone
    forward = Work(float(size * (inputs.served * (case.D + case.F) + inputs.serving * weight)), gemm.flops)
    again = size * (inputs.served * (2 * case.D + case.F + case.width) + (inputs.serving + case.E) * weight)
    memory = peers.rows_bytes(inputs, inputs.served) + 2 * counts.layer_bytes(case, size, case.E)

    def limit(one_pass: str) -> Contender:
        work = passes[one_pass]
        return Contender(
            limits.GEMMS, "limit", lambda: functools.partial(limits.Gemms(inputs).first_layer, one_pass),
            flops=work.flops, nbytes=work.nbytes, work=work.flops or 0.0, memory=memory,
        )  # fmt: skip

    passes = forward_and_backward(forward, Work(float(again), 2 * gemm.flops))
    return gemm.stage(passes, limit, EVERY)


def sections(inputs: Inputs) -> Iterator[Section]:
    """The three products of each layer one by one, against a dense one of as many rows."""
    for layer, weight, bias, activation in (
        ("first product", "w1", "b1", inputs.case.activation),
        ("second product", "w2", "b2", None),
    ):
        gemm = Gemm(inputs, weight)
        for wanted in ((), ("rows",), ("weight",)):
            one_pass = "backward" if wanted else "forward"
            limit = functools.partial(dense, gemm, wanted)
            stage = gemm.stage({one_pass: Work(gemm.nbytes(wanted), gemm.flops)}, limit, wanted)
            name = ", gradient of ".join((layer, *wanted))
            found = section(name, stage, inputs, one_pass)
            # plain torch multiplies all rows by every expert's weight
            found.contenders[:] = [contender for contender in found.contenders if contender.name != PLAIN]
            if one_pass == "forward":
                found.contenders.append(whole(gemm._replace(bias=bias, activation=activation)))
            yield found


def dense(gemm: Gemm, wanted: Sequence[str], one_pass: str) -> Contender:
    """All served rows through one expert."""

    def build() -> Call:
        inputs, weight = gemm.inputs, gemm.inputs.experts[gemm.weight][0]
        rows, grad = (inputs.normal(inputs.served, columns) for columns in (gemm.depth, gemm.width))
        a, b = {"rows": (grad, weight.t()), "weight": (rows.t(), grad)}.get("".join(wanted), (rows, weight))
        return functools.partial(torch.mm, a, b, out=a.new_empty(a.shape[0], b.shape[1]))

    nbytes = gemm.nbytes(wanted)
    return Contender(
        limits.DENSE, "limit", build, flops=gemm.flops, nbytes=nbytes, work=gemm.flops, memory=2 * nbytes
    )  # fmt: skip


def whole(gemm: Gemm) -> Contender:
    """Ours with bias and activation."""
    way = Way(functools.partial(gemm.call, None), functools.partial(gemm.operands, ()))
    nbytes = gemm.nbytes(())
    name = f"{OURS}, bias and activation"
    return Contender(name, "ours", way.forward, flops=gemm.flops, nbytes=nbytes, memory=2 * nbytes)
