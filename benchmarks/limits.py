"""The physical limits, as contenders: the products and nothing else, a copy of as many bytes, a call that does nothing.

The products are torch.mm(out=) on exactly the served rows, 2 forward (3 matrices' worth if gated) and 4 backward, on
buffers made beforehand: expert by expert ("GEMMs alone"), or all rows through one expert ("dense GEMMs").
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .shapes import Inputs

GEMMS, DENSE, COPY, LAUNCH = "GEMMs alone", "dense GEMMs", "copy of as many bytes", "empty call"
PRODUCTS = "the same mm calls"  # with the router's


class Gemms:
    """The layer's products on rows that lie expert by expert."""

    def __init__(self, inputs: Inputs, dense: bool = False) -> None:
        case, rows = inputs.case, inputs.served
        counts = [inputs.served] if dense else inputs.counts
        self.w1, self.w2 = (weight.detach()[: len(counts)] for weight in (inputs.experts["w1"], inputs.experts["w2"]))
        self.grad_w1, self.grad_w2 = torch.empty_like(self.w1), torch.empty_like(self.w2)
        ends = torch.tensor(counts).cumsum(0).tolist()
        places = enumerate(zip(ends, counts, strict=True))
        self.groups = [(e, slice(end - count, end)) for e, (end, count) in places if count]
        self.x, self.grad_out = inputs.normal(rows, case.D), inputs.normal(rows, case.D)
        self.hidden, self.grad_z = inputs.normal(rows, case.F), inputs.normal(rows, case.width)
        self.out, self.grad_x = torch.empty_like(self.x), torch.empty_like(self.x)
        self.z, self.grad_hidden = torch.empty_like(self.grad_z), torch.empty_like(self.hidden)

        # (out, a, b) as views made beforehand, by layer and direction
        self.first = [(self.z[r], self.x[r], self.w1[e]) for e, r in self.groups]
        self.second = [(self.out[r], self.hidden[r], self.w2[e]) for e, r in self.groups]
        self.second_backward = [
            *((self.grad_hidden[r], self.grad_out[r], self.w2[e].t()) for e, r in self.groups),
            *((self.grad_w2[e], self.hidden[r].t(), self.grad_out[r]) for e, r in self.groups),
        ]
        self.first_backward = [
            *((self.grad_w1[e], self.x[r].t(), self.grad_z[r]) for e, r in self.groups),
            *((self.grad_x[r], self.grad_z[r], self.w1[e].t()) for e, r in self.groups),
        ]

    def forward(self) -> None:
        multiply(self.first)
        multiply(self.second)

    def forward_backward(self) -> None:
        self.forward()
        multiply(self.second_backward)
        multiply(self.first_backward)

    def first_layer(self, one_pass: str) -> None:
        if one_pass != "backward":
            multiply(self.first)
        if one_pass != "forward":
            multiply(self.first_backward)


def multiply(products: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for out, a, b in products:
        torch.mm(a, b, out=out)


def copy(nbytes: float, device: str) -> Callable[[], Tensor]:
    """Moves ``nbytes`` in all: half of them are read, half are written."""
    size = max(int(nbytes) // 8, 1)
    source, target = (make(size, dtype=torch.int32, device=device) for make in (torch.ones, torch.empty))
    if device == "cpu":
        return functools.partial(target.copy_, source)
    # by a kernel, as what it is held against; in a CUDA graph copy_ is a node of its own kind
    return functools.partial(torch.bitwise_not, source, out=target)


def empty_call(device: str) -> Callable[[], Tensor]:
    """An op of torch that fills one element: what no call can fall below."""
    return torch.empty(1, device=device).zero_
