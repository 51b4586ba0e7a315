"""The expert FFN as others would write it, on the same tokens, plan and weights: ours, a loop, bmm, grouped_mm.

Each is a function of (x, weight, w1, b1, w2, b2). The loop in fp32 is also the truth the others are held against.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import widenet_kernels as wk
from widenet_kernels.routing import GATED

Ffn = Callable[..., Tensor]


class Case(NamedTuple):
    """One layer, in the alphabet of :mod:`widenet_kernels.routing`."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int
    capacity_factor: float | None  # None: dropless
    activation: str
    bias: bool
    normalize: bool

    @property
    def width(self) -> int:
        return 2 * self.F if self.activation in GATED else self.F

    def flops(self, served: int) -> float:
        """Of one forward pass."""
        return 2.0 * served * self.D * (self.width + self.F)

    def tiny(self) -> "Case":
        """For --cpu-smoke; with a capacity, some choices are dropped."""
        factor = None if self.capacity_factor is None else 0.9
        return self._replace(T=40, D=16, F=24, E=min(self.E, 4), K=min(self.K, 2), capacity_factor=factor)


WIDENET_B = Case("WideNet-B", 256 * 197, 768, 4096, 4, 2, 1.2, "gelu", True, False)
MIXTRAL = Case("Mixtral", 8192, 4096, 14336, 8, 2, None, "swiglu", False, True)
FINE_GRAINED = Case("fine-grained", 8192, 2048, 768, 128, 8, None, "swiglu", False, True)


class Inputs:
    """Random tokens and weights, and where the router sends the tokens: found by the reference, to stand on nothing
    that is measured."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        torch.manual_seed(0)
        self.x = self.normal(case.T, case.D)
        self.router = self.normal(case.E, case.D, scale=case.D**-0.5)
        self.capacity = None
        if case.capacity_factor is not None:
            self.capacity = wk.expert_capacity(case.T, case.E, case.K, case.capacity_factor)
        options = {"normalize": case.normalize, "backend": "reference"}
        gate, self.plan, self.logits = wk.route(self.x, self.router, case.K, self.capacity, **options)
        self.gate = gate
        self.counts = self.plan.expert_count.tolist()
        self.served = sum(self.counts)

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype).mul_(scale)

    def experts(self) -> dict[str, Tensor | None]:
        """w1, b1, w2, b2, which only whole layers need."""
        case = self.case
        return {
            "w1": self.normal(case.E, case.D, case.width, scale=case.D**-0.5),
            "b1": self.normal(case.E, case.width) if case.bias else None,
            "w2": self.normal(case.E, case.F, case.D, scale=case.F**-0.5),
            "b2": self.normal(case.E, case.D) if case.bias else None,
        }

    def rows_of(self) -> list[slice]:
        """Each expert's served rows."""
        begins = self.plan.expert_begin.tolist()
        return [slice(begin, begin + count) for begin, count in zip(begins, self.counts, strict=True)]

    def packed(self) -> Tensor:
        """[served]: the choices that are served, expert by expert, without gaps."""
        return self.plan.row_choice[self.plan.row_choice >= 0].long()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)


def activate(z: Tensor, name: str) -> Tensor:
    if name in GATED:
        gate, value = z.chunk(2, dim=-1)
        return activate(gate, GATED[name]) * value
    return functional.gelu(z) if name == "gelu" else functional.silu(z)


def ours(inputs: Inputs, backend: str | None) -> Ffn:
    case = inputs.case
    return lambda x, weight, w1, b1, w2, b2: wk.moe_ffn(
        x, weight, inputs.plan, w1, b1, w2, b2, case.activation, backend=backend
    )


def ours_routed(inputs: Inputs, backend: str | None) -> Ffn:
    """The whole layer: the router as well."""
    case = inputs.case

    def layer(x: Tensor, router: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        gate, plan, _ = wk.route(x, router, case.K, inputs.capacity, normalize=case.normalize, backend=backend)
        return wk.moe_ffn(x, gate.weight, plan, w1, b1, w2, b2, case.activation, backend=backend)

    return layer


def loop(inputs: Inputs, backend: str | None = None) -> Ffn:
    """One expert after the other on exactly its rows; how many those are the host knows beforehand."""
    case = inputs.case
    choices_of = inputs.packed().split(inputs.counts)

    def layer(x: Tensor, weight: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        y, shares = torch.zeros_like(x), weight.view(-1)
        parameters = [[None] * case.E if t is None else t.unbind() for t in (w1, b1, w2, b2)]
        for choices, w1_e, b1_e, w2_e, b2_e in zip(choices_of, *parameters, strict=True):
            tokens = choices // case.K
            hidden = activate(linear(x[tokens], w1_e, b1_e), case.activation)
            out = linear(hidden, w2_e, b2_e)
            y = y.index_add(0, tokens, (out * shares[choices, None]).to(x.dtype))
        return y

    return layer


def bmm(inputs: Inputs, backend: str | None = None) -> Ffn:
    """torch.bmm over the capacity buffers [E, C, D]; dropless: buffers as large as the fullest expert needs."""
    case, capacity = inputs.case, inputs.capacity
    if capacity is None:
        capacity = max(inputs.counts)
    plan = wk.plan_routing(inputs.gate.expert_index, case.E, capacity, backend="reference")
    tokens = (plan.row_choice.clamp_min(0) // case.K).long()
    used = (plan.row_choice >= 0)[:, None]
    choice_row = plan.choice_row.clamp_min(0).long().view(-1)
    served = (plan.choice_row >= 0)[..., None]

    def layer(x: Tensor, weight: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        buffers = (x.index_select(0, tokens) * used).view(case.E, capacity, case.D)
        z = torch.bmm(buffers, w1) if b1 is None else torch.baddbmm(b1[:, None], buffers, w1)
        hidden = activate(z, case.activation)
        out = torch.bmm(hidden, w2) if b2 is None else torch.baddbmm(b2[:, None], hidden, w2)
        return combined(out.view(-1, case.D), weight, choice_row, served)

    return layer


def torch_grouped_mm() -> Callable[..., Tensor]:
    return getattr(functional, "grouped_mm", None) or torch._grouped_mm


def grouped_mm(inputs: Inputs, backend: str | None = None) -> Ffn:
    """torch's own grouped GEMM over packed rows, as transformers calls it."""
    multiply = torch_grouped_mm()
    case = inputs.case
    choices = inputs.packed()
    tokens = choices // case.K
    counts = torch.tensor(inputs.counts, device=inputs.device)
    ends = counts.cumsum(0).to(torch.int32)
    expert = torch.repeat_interleave(torch.arange(case.E, device=inputs.device), counts)
    choice_row = torch.zeros(case.T * case.K, dtype=torch.long, device=inputs.device)
    choice_row[choices] = torch.arange(choices.numel(), device=inputs.device)
    served = (inputs.plan.choice_row >= 0)[..., None]

    def layer(x: Tensor, weight: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        z = multiply(x.index_select(0, tokens), w1, offs=ends)
        z = z if b1 is None else z + b1[expert]
        out = multiply(activate(z, case.activation), w2, offs=ends)
        out = out if b2 is None else out + b2[expert]
        return combined(out, weight, choice_row, served)

    return layer


def combined(rows: Tensor, weight: Tensor, choice_row: Tensor, served: Tensor) -> Tensor:
    """[T, D] in plain torch: gather every choice's row, weigh, mask what was dropped, sum."""
    taken = rows.index_select(0, choice_row).view(*weight.shape, -1)
    return (taken * weight[..., None].to(rows.dtype) * served).sum(1)


PEERS: Mapping[str, Callable[..., Ffn]] = {
    "torch.bmm over capacity buffers": bmm,
    "torch grouped_mm": grouped_mm,
    "torch.mm, one expert at a time": loop,
}


class Dense:
    """The floor: plain products of the same FLOPs, all served rows through one expert, into buffers made before."""

    def __init__(self, inputs: Inputs) -> None:
        case, n = inputs.case, inputs.served
        self.x, self.grad_out, self.out, self.grad_x = (inputs.normal(n, case.D) for _ in range(4))
        self.z, self.grad_z = (inputs.normal(n, case.width) for _ in range(2))
        self.hidden, self.grad_hidden = (inputs.normal(n, case.F) for _ in range(2))
        self.w1 = inputs.normal(case.D, case.width, scale=case.D**-0.5)
        self.w2 = inputs.normal(case.F, case.D, scale=case.F**-0.5)
        self.grad_w1, self.grad_w2 = torch.empty_like(self.w1), torch.empty_like(self.w2)

    def forward(self) -> None:
        torch.mm(self.x, self.w1, out=self.z)
        torch.mm(self.hidden, self.w2, out=self.out)

    def forward_backward(self) -> None:
        self.forward()
        torch.mm(self.grad_out, self.w2.t(), out=self.grad_hidden)
        torch.mm(self.hidden.t(), self.grad_out, out=self.grad_w2)
        torch.mm(self.x.t(), self.grad_z, out=self.grad_w1)
        torch.mm(self.grad_z, self.w1.t(), out=self.grad_x)


def leaves(values: Mapping[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Copies that want a gradient, in ``dtype`` if one is given."""
    return {
        name: None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
        for name, t in values.items()
    }


def with_gradients(ffn: Ffn, values: Mapping[str, Tensor | None], grad: Tensor) -> Callable[[], Any]:
    """A call that gives the result and the gradient of every leaf."""
    wanted = [t for t in values.values() if t is not None]

    def call() -> tuple[Tensor, ...]:
        y = ffn(*values.values())
        return y, *torch.autograd.grad(y, wanted, grad.to(y.dtype))

    return call
