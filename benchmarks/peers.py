"""The layer as others write it: plain torch, and st-moe-pytorch. None of it calls this package.

A peer is a function of the inputs that gives a :class:`Layer`: x to y with its own router, weights of the same values.
What a peer cannot do it says by raising Unavailable. Where a shape's capacity drops choices, the peers with
capacity buffers find out by themselves which; those that know no capacity are told beforehand, for free.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from widenet_kernels.routing import GATED

from .shapes import Case, Inputs, Parameters
from .timing import Unavailable

WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
WIDER |= {torch.float32: torch.float64, torch.float64: torch.float64}


class Layer(NamedTuple):
    """x [T, D] -> y [T, D], its parameters, and how their gradients are those of the shape's own parameters."""

    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    canonical: Callable[[list[Tensor]], Mapping[str, Tensor]]  # router [E, D], w1 [E, D, width], b1, w2 [E, F, D], b2
    normalize: bool  # the semantics it is held to: those of the shape, unless it knows no other


Build = Callable[[Inputs], Layer]

# ------------------------------------------------------------------------------------------------------- the pieces


def leaf(tensor: Tensor) -> Tensor:
    """On the same memory, wanting a gradient of its own."""
    return tensor.detach().requires_grad_()


def stacked(inputs: Inputs) -> Parameters:
    """router, w1, b1, w2, b2 as they are."""
    parameters = {"router": inputs.router, **inputs.experts}
    return {name: None if tensor is None else leaf(tensor) for name, tensor in parameters.items()}


def of_stacked(inputs: Inputs, forward: Callable[..., Tensor], parameters: Parameters) -> Layer:
    there = {name: tensor for name, tensor in parameters.items() if tensor is not None}
    return Layer(
        lambda x: forward(x, **parameters),
        list(there.values()),
        lambda grads: dict(zip(there, grads, strict=True)),
        inputs.case.normalize,
    )


def expert_by_expert(inputs: Inputs) -> tuple[Tensor, list[Parameters], list[Tensor]]:
    """The router, and the parameters of each expert as tensors of their own, as in a list of modules."""
    router = leaf(inputs.router)
    experts = [
        {name: None if tensor is None else leaf(tensor[e]) for name, tensor in inputs.experts.items()}
        for e in range(inputs.case.E)
    ]
    return router, experts, [router, *(t for expert in experts for t in expert.values() if t is not None)]


def of_experts(inputs: Inputs, grads: list[Tensor]) -> dict[str, Tensor]:
    """The gradients of :func:`expert_by_expert`, stacked."""
    names = [name for name, tensor in inputs.experts.items() if tensor is not None]
    return {"router": grads[0]} | {
        name: torch.stack(grads[1 + place :: len(names)]) for place, name in enumerate(names)
    }


def linear(rows: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)


def activate(z: Tensor, name: str) -> Tensor:
    if name in GATED:
        gate, value = z.chunk(2, dim=-1)
        return activate(gate, GATED[name]) * value
    return functional.gelu(z) if name == "gelu" else functional.silu(z)


def gate(x: Tensor, router: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """weight [T, K] and expert_index [T, K], the softmax in fp32 as everybody has it."""
    logits = x @ router.t()
    probs = logits.softmax(-1, dtype=None if logits.dtype == torch.float64 else torch.float32)
    weight, index = probs.topk(case.K, dim=-1)
    return (weight / weight.sum(-1, keepdim=True) if case.normalize else weight), index


def buffer_rows(inputs: Inputs) -> int:
    """C; dropless: what the fullest expert needs, known beforehand."""
    capacity = inputs.case.capacity
    return max(inputs.demand) if capacity is None else capacity


def places(index: Tensor, num_experts: int) -> Tensor:
    """[T, K]: how many choices ask the same expert before this one, first choices first (Lepikhin et al. 2020)."""
    chosen = functional.one_hot(index.t().reshape(-1), num_experts).to(torch.int32)
    before = (chosen.cumsum(0) - chosen).gather(1, index.t().reshape(-1, 1))
    return before.view(index.t().shape).t()


# ------------------------------------------------------------------------------------------------------- the peers


def loop(inputs: Inputs) -> Layer:
    """One expert after the other, as Hugging Face's eager Mixtral; without capacity."""
    case = inputs.case
    router, experts, parameters = expert_by_expert(inputs)
    served = inputs.choice_served()

    def forward(x: Tensor) -> Tensor:
        weight, index = gate(x, router, case)
        y = torch.zeros_like(x)
        chosen = functional.one_hot(index.masked_fill(~served, case.E), case.E + 1).permute(2, 1, 0)  # [E + 1, K, T]
        for e, expert in enumerate(experts):
            choice, token = chosen[e].nonzero(as_tuple=True)
            if not len(token):
                continue
            hidden = activate(linear(x[token], expert["w1"], expert["b1"]), case.activation)
            out = linear(hidden, expert["w2"], expert["b2"]) * weight[token, choice, None]
            y.index_add_(0, token, out.to(x.dtype))
        return y

    return Layer(forward, parameters, lambda grads: of_experts(inputs, grads), case.normalize)


def one_hot_einsum(inputs: Inputs) -> Layer:
    """Dispatch and combine as products with one-hot tensors [T, E, C], as GShard."""
    case, capacity = inputs.case, buffer_rows(inputs)

    def forward(x: Tensor, router: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        weight, index = gate(x, router, case)
        place = places(index, case.E)
        combine = x.new_zeros(case.T, case.E, capacity)
        for k in range(case.K):
            slot = functional.one_hot(place[:, k].clamp_max(capacity).long(), capacity + 1)[:, :capacity]
            expert = functional.one_hot(index[:, k], case.E) * weight[:, k, None]
            combine = combine + torch.einsum("te,tc->tec", expert.to(x.dtype), slot.to(x.dtype))
        dispatch = (combine.detach() != 0).to(x.dtype)
        buffers = torch.einsum("tec,td->ecd", dispatch, x)
        return torch.einsum("tec,ecd->td", combine, batched(buffers, w1, b1, w2, b2, case.activation))

    return of_stacked(inputs, forward, stacked(inputs))


def bmm(inputs: Inputs) -> Layer:
    """torch.bmm over the capacity buffers [E, C, D], filled and read by index."""
    case, capacity = inputs.case, buffer_rows(inputs)
    num_rows = case.E * capacity
    token = torch.arange(case.T, device=inputs.device)[:, None].expand(case.T, case.K)

    def forward(x: Tensor, router: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        weight, index = gate(x, router, case)
        place = places(index, case.E)
        row = torch.where(place < capacity, index * capacity + place, num_rows)  # the last is for what is dropped
        source = torch.full((num_rows + 1,), case.T, device=x.device).scatter_(0, row.reshape(-1), token.reshape(-1))
        buffers = functional.pad(x, (0, 0, 0, 1))[source[:-1]].view(case.E, capacity, case.D)
        out = batched(buffers, w1, b1, w2, b2, case.activation).view(num_rows, case.D)
        return combined(functional.pad(out, (0, 0, 0, 1)), row, weight)

    return of_stacked(inputs, forward, stacked(inputs))


def batched(buffers: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str) -> Tensor:
    """[E, C, D]: every row through its expert, the unused ones too."""
    z = torch.bmm(buffers, w1) if b1 is None else torch.baddbmm(b1[:, None], buffers, w1)
    hidden = activate(z, activation)
    return torch.bmm(hidden, w2) if b2 is None else torch.baddbmm(b2[:, None], hidden, w2)


def combined(rows: Tensor, row: Tensor, weight: Tensor) -> Tensor:
    """[T, D]: each choice's row, weighed, summed over the choices."""
    return (rows[row.reshape(-1)].view(*weight.shape, -1) * weight[..., None].to(rows.dtype)).sum(1)


def torch_grouped_mm() -> Callable[..., Tensor]:
    multiply = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if multiply is None:
        raise Unavailable(f"torch {torch.__version__} has no grouped_mm")
    return multiply


def grouped_mm(inputs: Inputs) -> Layer:
    """torch's grouped GEMM on rows sorted by expert, as transformers calls it; without capacity."""
    multiply = torch_grouped_mm()
    case, served = inputs.case, inputs.served
    dropped = ~inputs.choice_served()

    def forward(x: Tensor, router: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
        weight, index = gate(x, router, case)
        if served < case.T * case.K:
            index = index.masked_fill(dropped, case.E)  # behind all others
        expert, order = index.view(-1).sort(stable=True)
        expert, order = expert[:served], order[:served]
        row = torch.full((case.T * case.K,), served, device=x.device)
        row[order] = torch.arange(served, device=x.device)
        ends = torch.histc(expert.float(), case.E, 0, case.E - 1).cumsum(0).to(torch.int32)
        z = multiply(x[order // case.K], w1, offs=ends)
        z = z if b1 is None else z + bias_of_rows(b1, expert)
        out = multiply(activate(z, case.activation), w2, offs=ends)
        out = out if b2 is None else out + bias_of_rows(b2, expert)
        return combined(out if served == case.T * case.K else functional.pad(out, (0, 0, 0, 1)), row, weight)

    return of_stacked(inputs, forward, stacked(inputs))


def bias_of_rows(bias: Tensor, expert: Tensor) -> Tensor:
    """[rows, N]. In floats, as is their gradient: the sum of thousands of rows in bf16, as autograd would make it of
    ``bias[expert]``, was off by 0.1 to 0.2."""
    return bias.to(torch.promote_types(bias.dtype, torch.float32))[expert].to(bias.dtype)


class StMoeExpert(nn.Module):
    """An expert for st-moe-pytorch, which takes any module."""

    def __init__(self, parameters: Parameters, activation: str) -> None:
        super().__init__()
        self.activation = activation
        for name, tensor in parameters.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor.detach()))

    def forward(self, buffers: Tensor) -> Tensor:
        w1, b1, w2, b2 = (self._parameters[name] for name in ("w1", "b1", "w2", "b2"))
        return linear(activate(linear(buffers.flatten(0, -2), w1, b1), self.activation), w2, b2).view_as(buffers)


def st_moe(inputs: Inputs) -> Layer:
    """st-moe-pytorch, all tokens as one sequence; it knows normalized weights only, and is held to those."""
    import st_moe_pytorch

    case, capacity = inputs.case, buffer_rows(inputs)
    smallest = st_moe_pytorch.st_moe_pytorch.MIN_EXPERT_CAPACITY
    if case.K < 2:
        raise Unavailable("routes to at least 2 experts")
    if capacity < smallest and max(inputs.demand) > capacity:
        raise Unavailable(f"gives every expert at least {smallest} rows")
    factor = (capacity + 0.5) * case.E / case.T  # it takes the floor of T * factor / E
    experts = [StMoeExpert(parameters, case.activation) for parameters in expert_by_expert(inputs)[1]]
    layer = st_moe_pytorch.MoE(
        dim=case.D, num_experts=case.E, experts=nn.ModuleList(experts), gating_top_n=case.K,
        threshold_train=0.0, threshold_eval=0.0,  # every choice is taken, not some by chance
        capacity_factor_train=factor, capacity_factor_eval=factor, straight_through_dispatch_tensor=False,
    ).to(inputs.device).eval()  # fmt: skip
    layer.gate.to_gates.weight = nn.Parameter(inputs.router.detach())
    parameters = [layer.gate.to_gates.weight, *(p for expert in experts for p in expert.parameters())]
    half = inputs.dtype in (torch.bfloat16, torch.float16)  # where it needs autocast: its gate gives fp32

    def forward(x: Tensor) -> Tensor:
        with torch.autocast(inputs.device, inputs.dtype if half else None, enabled=half):
            return layer(x[None]).outputs[0].to(x.dtype)

    return Layer(forward, parameters, lambda grads: of_experts(inputs, grads), True)


# ------------------------------------------------------------------------------------------- what they need to run


def rows_bytes(inputs: Inputs, num_rows: int) -> float:
    """What the rows hold at the same time, forward and backward: tokens, two of width, one of F, results."""
    case = inputs.case
    return float(num_rows * (3 * case.D + 2 * case.width + 2 * case.F) * inputs.x.element_size())


def one_hot_bytes(inputs: Inputs, copies: int) -> float:
    """``copies`` tensors of [T, E, C] beside the buffers."""
    case, capacity = inputs.case, buffer_rows(inputs)
    one_hot = copies * case.T * case.E * capacity * inputs.x.element_size()
    return one_hot + rows_bytes(inputs, case.E * capacity)


class Peer(NamedTuple):
    build: Build
    memory: Callable[[Inputs], float]  # bytes, about, that one call forward and backward needs
    flops: Callable[[Inputs], float] = lambda inputs: 0.0  # of one forward pass beside the experts' products
    package: str | None = None  # that it needs
    graph: bool = True  # False: no CUDA graph can hold it, as it waits for the GPU; an attempt can spoil what follows

    @property
    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None


def dispatch_flops(inputs: Inputs) -> float:
    """Of the two products with one-hot tensors."""
    case = inputs.case
    return 4.0 * case.T * case.E * buffer_rows(inputs) * case.D


PEERS: Mapping[str, Peer] = {
    "torch loop": Peer(loop, lambda inputs: rows_bytes(inputs, inputs.served), graph=False),
    "one-hot einsum": Peer(one_hot_einsum, lambda inputs: one_hot_bytes(inputs, 4), dispatch_flops),
    "torch.bmm": Peer(bmm, lambda inputs: rows_bytes(inputs, inputs.case.E * buffer_rows(inputs))),
    "torch grouped_mm": Peer(grouped_mm, lambda inputs: rows_bytes(inputs, inputs.served)),
    "st-moe-pytorch": Peer(
        st_moe, lambda inputs: one_hot_bytes(inputs, 2 * inputs.case.K + 3), dispatch_flops, graph=False
    ),
}  # fmt: skip


def gradients(layer: Layer, x: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """A call forward and backward: y, and the gradients of x and of the parameters."""
    x = leaf(x)

    def call() -> tuple[Tensor, list[Tensor]]:
        y = layer.forward(x)
        wanted = [x, *layer.parameters]
        return y, list(torch.autograd.grad(y, wanted, grad, allow_unused=True, materialize_grads=True))

    return call


def named(layer: Layer, result: tuple[Tensor, list[Tensor]]) -> dict[str, Tensor]:
    y, (grad_x, *grads) = result
    return {"y": y, "x": grad_x, **layer.canonical(grads)}


def exact(inputs: Inputs, normalize: bool, backward: bool) -> dict[str, Tensor]:
    """The result, and with the backward all gradients, by the plain loop in a wider dtype."""
    wide = inputs.widened(WIDER[inputs.dtype], normalize)
    layer = loop(wide)
    if not backward:
        with torch.no_grad():
            return {"y": layer.forward(wide.x)}
    return {name: t.detach() for name, t in named(layer, gradients(layer, wide.x, wide.grad)()).items()}
