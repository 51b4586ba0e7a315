"""Dense feed-forward networks in somebody's model: where they stand and what they compute."""

import copy
import inspect
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from widenet_kernels.models.block import activate
from widenet_kernels.models.config import ACTIVATIONS

GATES = {"silu": "swiglu", "gelu": "geglu"}  # the activation of the gate, and the name of the whole
KNOWN = ("ViTMLP", "LlamaMLP", "BertLayer")  # classes of transformers, found without being named


class Place(NamedTuple):
    """Where a dense network stands."""

    name: str  # of the module in the model
    module: nn.Module
    dense: nn.Module  # x [N, L, D] -> y: the module, or made of its parts
    block: nn.Module  # that calls it
    attention: nn.Module | None  # of the block: its mask tells what is padding
    dropout: float  # what dropout in the module goes with it
    put: Callable[[nn.Module], None]  # another x -> y in its place


class FeedForward(NamedTuple):
    """linear2(activation(linear1(x))); with a gated activation linear1 is the gate's and the value's layer joined."""

    linear1: nn.Linear
    linear2: nn.Linear
    activation: str

    @property
    def kind(self) -> tuple:
        """(D, width of linear1, activation, whether there are biases, dtype, device)."""
        linear1 = self.linear1
        kept = linear1.weight.dtype, linear1.weight.device
        return linear1.in_features, linear1.out_features, self.activation, linear1.bias is not None, *kept


# Where they stand


def find_places(model: nn.Module, names: Sequence[str] | None) -> list[Place]:
    """Those of the named modules; None: all whose class is known, in the model's order."""
    if names is None:
        return [place_of(model, name, module) for name, module in model.named_modules() if is_known(module)]
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name == "" or name not in modules:
            raise ValueError(f"widen: modules: expected names of modules in the model, got {name!r}")
    return [place_of(model, name, modules[name]) for name in dict.fromkeys(names)]


def is_known(module: nn.Module) -> bool:
    """Whether its class is known, and its network dense."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return isinstance(module.linear2, nn.Linear)
    names = {kind.__name__ for kind in type(module).__mro__ if is_of_transformers(kind)}
    return not names.isdisjoint(KNOWN) and ("BertLayer" not in names or has_berts_parts(module))


def is_of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")


def has_berts_parts(module: nn.Module) -> bool:
    """Whether it has a network in two parts: intermediate, and the layer that output begins with."""
    return all(hasattr(getattr(module, part, None), "dense") for part in ("intermediate", "output"))


def place_of(model: nn.Module, name: str, module: nn.Module) -> Place:
    if isinstance(module, nn.TransformerEncoderLayer):
        return in_encoder_layer(model, name, module)
    if has_berts_parts(module):
        return in_bert_layer(name, module)
    block = model.get_submodule(name.rpartition(".")[0])
    dropout = max((part.p for part in module.modules() if isinstance(part, nn.Dropout)), default=0.0)
    return Place(name, module, module, block, attention_of(block), dropout, lambda new: model.set_submodule(name, new))


def in_encoder_layer(model: nn.Module, name: str, layer: nn.TransformerEncoderLayer) -> Place:
    """Its linear1 becomes the new network, what stands behind that does nothing, and there is no fast path.

    The fast path of the layer, and that of a TransformerEncoder to nested tensors, read the weights of the two layers
    and call neither. The dropout between the layers goes; that on the output stays.
    """
    encoders = [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoder) and any(each is layer for each in module.layers)
    ]

    def put(new: nn.Module) -> None:
        layer.linear1 = new  # type: ignore[assignment]
        for part in ("activation", "dropout", "linear2"):
            setattr(layer, part, nn.Identity())
        layer.activation_relu_or_gelu = 0  # neither: what the layer asks before it takes its fast path
        for encoder in encoders:
            encoder.use_nested_tensor = False

    dense = nn.Sequential(layer.linear1, Function(layer.activation), layer.linear2)
    return Place(name, layer, dense, layer, layer.self_attn, 0.0, put)


def in_bert_layer(name: str, layer: nn.Module) -> Place:
    """Its intermediate becomes the new network; output keeps the dropout, the sum and the norm behind it."""
    if getattr(layer, "chunk_size_feed_forward", 0):
        raise ValueError(
            f"widen: {name}: expected chunk_size_feed_forward 0, since each chunk would be routed by itself, "
            f"got {layer.chunk_size_feed_forward}"
        )
    intermediate, output = layer.intermediate, layer.output

    def put(new: nn.Module) -> None:
        layer.intermediate = new
        output.dense = nn.Identity()  # type: ignore[union-attr]

    dense = nn.Sequential(intermediate, output.dense)  # type: ignore[arg-type, union-attr]
    return Place(name, layer, dense, layer, attention_of(layer), 0.0, put)


def attention_of(block: nn.Module) -> nn.Module | None:
    """The block's self-attention, where it is one of transformers and takes a mask."""
    for module in block.children():
        if is_of_transformers(type(module)) and "attention_mask" in inspect.signature(module.forward).parameters:
            return module
    return None


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# What they compute


def recognise(place: Place) -> FeedForward:
    """What the dense network is, whatever its layers and its activation are called; see :func:`find_form`.

    Raises:
        ValueError: where it is none that experts can be made of.
    """
    linears = linear_layers(place.dense)
    theirs = {parameter for linear in linears for parameter in linear.parameters()}
    form = None
    if theirs.issuperset(place.dense.parameters()) and len({linear.bias is None for linear in linears}) == 1:
        form = find_form(place)
    if form is None:
        raise unknown(place)
    order, activation = form
    *first, linear2 = [linears[index] for index in order]
    if len(first) == 1:
        return FeedForward(first[0], linear2, activation)
    return FeedForward(joined(*first), linear2, GATES[activation])


def linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def find_form(place: Place) -> tuple[tuple[int, ...], str] | None:
    """Its Linear layers in the order gate, value, last, or first, last, and the activation; None: of no form known.

    Found by asking a copy: what it makes of random tokens is held against every form. Its weights are random too, for
    with a last layer of zeros, say, all forms are one. In float64 the two kinds of gelu differ by far more than
    rounding, even where the copy's activation computes in float32.
    """
    generator = torch.Generator().manual_seed(0)

    def normal_like(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu").to(like.device)

    probe = copy.deepcopy(place.dense).double().eval()
    if any(parameter.is_meta for parameter in probe.parameters()):
        probe.to_empty(device="cpu")
    linears = linear_layers(probe)
    orders = [order for order in orders_of(len(linears)) if fits([linears[index] for index in order])]
    if not orders:
        return None
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(normal_like(parameter) / parameter.shape[-1] ** 0.5)
        x = normal_like(linears[0].weight.new_empty(1, 7, linears[orders[0][-1]].out_features))
        try:
            y = probe(x)
        except Exception as error:
            raise unknown(place) from error
        for order in orders:
            *first, last = [linears[index] for index in order]
            for activation in ACTIVATIONS if len(first) == 1 else GATES:
                expected = last(hidden(first, activation, x))
                if isinstance(y, Tensor) and y.shape == x.shape and (y - expected).abs().max() < 1e-6:
                    return order, activation
    return None


def orders_of(count: int) -> list[tuple[int, ...]]:
    """Two layers as they are defined, three in every order: some define the gate first, others the value."""
    if count == 2:
        return [(0, 1)]
    return list(permutations(range(3))) if count == 3 else []


def fits(layers: list[nn.Linear]) -> bool:
    *first, last = layers
    size = (last.out_features, last.in_features)
    return all((layer.in_features, layer.out_features) == size for layer in first)


def hidden(first: list[nn.Linear], activation: str, x: Tensor) -> Tensor:
    gate, *value = (layer(x) for layer in first)
    return activate(gate, activation) * value[0] if value else activate(gate, activation)


def joined(gate: nn.Linear, value: nn.Linear) -> nn.Linear:
    """One layer whose outputs are those of the gate, then those of the value."""
    both = copy.deepcopy(gate)
    both.out_features *= 2
    for name, parameter in gate.named_parameters():
        other = getattr(value, name)
        wanted = parameter.requires_grad or other.requires_grad
        setattr(both, name, nn.Parameter(torch.cat([parameter.detach(), other.detach()]), requires_grad=wanted))
    return both


def unknown(place: Place) -> ValueError:
    plain, gated = ", ".join(ACTIVATIONS), ", ".join(GATES)
    return ValueError(
        f"widen: {place.name}: expected a module x [N, L, D] -> y [N, L, D] that is linear2(activation(linear1(x))) or "
        f"linear2(activation(gate(x)) * value(x)), the activation one of {plain}, with a gate one of {gated}, its "
        "torch.nn.Linear layers with biases in all or in none, and no other parameters; got "
        f"{type(place.module).__name__}"
    )
