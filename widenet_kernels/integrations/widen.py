"""widen: the dense feed-forward networks of a model that is there already become mixtures of experts."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from widenet_kernels.integrations.balance import BalanceLosses
from widenet_kernels.integrations.feed_forward import (
    KNOWN,
    FeedForward,
    Place,
    find_places,
    is_of_transformers,
    recognise,
)
from widenet_kernels.integrations.padding import Padding
from widenet_kernels.nn import MoELayer

DECIDED = ("dim", "ffn_dim", "activation", "bias", "router", "experts")  # what is no option here


@dataclass(frozen=True)
class WidenReport:
    """What :func:`widen` did to a model."""

    widened: dict[str, str]  # name of the module -> its class
    num_experts: int
    shared: bool  # by all of them
    total_before: int  # parameters of the model
    total_after: int
    trainable_before: int  # those that require a gradient
    trainable_after: int
    aux_loss_weight: float
    loss_in_output: bool  # True: the balance loss is in the loss of the output; False: add moe_losses(model)

    def __str__(self) -> str:
        where = (
            "in the output's loss" if self.loss_in_output else "not in the output: add moe_losses(model) to the loss"
        )
        return "\n".join(
            [
                f"{self.num_experts} experts {'for all' if self.shared else 'in each'} of {len(self.widened)} places:",
                *(f"  {name} ({kind})" for name, kind in self.widened.items()),
                f"parameters: {self.total_before:,} before, {self.total_after:,} after",
                f"trainable: {self.trainable_before:,} before, {self.trainable_after:,} after",
                f"balance loss, times {self.aux_loss_weight:g}: {where}",
            ]
        )


class MoEFeedForward(nn.Module):
    """x [..., D] -> y [..., D]: a :class:`MoELayer` in the place of a dense network that returned y alone.

    Args:
        layer: the layer.
        losses: what collects its balance loss.
        padding: what knows which tokens ask for no expert; None: all ask.
        dropout: on y.
        owner: whether the layer is a submodule here; False: it is one of another MoEFeedForward, which shares it.
    """

    def __init__(
        self, layer: MoELayer, losses: BalanceLosses, padding: Padding | None, dropout: float, owner: bool
    ) -> None:
        super().__init__()
        self.losses, self.padding = losses, padding
        self.dropout = nn.Dropout(dropout)
        if owner:
            self.layer = layer
        else:
            object.__setattr__(self, "layer", layer)  # unregistered: its parameters stand in the state dict once

    def forward(self, x: Tensor) -> Tensor:
        y, aux = self.layer(x, None if self.padding is None else self.padding.valid(x))
        return self.dropout(self.losses.add(aux.balance_loss, y))


def widen(
    model: nn.Module,
    num_experts: int,
    *,
    modules: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    share: bool = False,
    upcycle: bool = True,
    aux_loss_weight: float = 0.01,
    loss_in_output: bool | None = None,
    **options: Any,
) -> WidenReport:
    """Put experts in the place of a model's dense feed-forward networks; the model is changed in place.

    With the defaults it computes what it did before, until training tells the experts apart: every expert is a copy of
    the dense network, dropless, with gate weights that sum to 1. dtype, device, training mode and what required a
    gradient stay as they are; the routers are new and trainable. Widen before an optimizer, DistributedDataParallel or
    torch.compile is given the model; weights that were tied to a dense network's are tied no more. To load a widened
    model's state dict, widen a model like it first.

    - What is found without being named: the networks of torch.nn.TransformerEncoderLayer and of transformers' ViT, BERT
      and Llama. The fast path of TransformerEncoderLayer, which would go past the experts, is switched off, and the
      nested tensors of TransformerEncoder with it.
    - Dropout stands on the experts' combined output, not inside them: in ViT, BERT and TransformerEncoderLayer where it
      is (the one between the layer's two Linear layers goes), for a named module the largest rate of a nn.Dropout in
      it.
    - Padding asks for no expert, takes no room and counts in no balance loss, if the block's attention is
      TransformerEncoderLayer's or one of transformers, stands before the network and is given a mask. For padding
      itself the model's output is then another one than before.
    - The balance loss is collected from each forward of the model as a whole; calls of its parts do not count. If the
      model's output has a ``loss`` it is added to that, in evaluation too; otherwise add :func:`moe_losses` to yours.
      So do where labels are kept from the model and the loss is made of its logits, as transformers' Trainer does with
      label smoothing and with a ``compute_loss_func``. Checkpointing counts nothing twice and changes no gradient; only
      around the model as a whole must it not be reentrant if :func:`moe_losses` is to have a gradient.

    Args:
        model: the model, or any module; widen the TransformerEncoder, not one of its layers.
        num_experts: E.
        modules: names, as in ``model.named_modules()``, of the modules to widen: x [N, L, D] -> y [N, L, D], of two
            Linear layers and an activation between (gelu, its tanh form, relu, silu), or three with a gate (silu,
            gelu); or layers built like TransformerEncoderLayer or BertLayer. None: all that are found.
        blocks: which of them, by index, negative from the end; None: all.
        share: one router and one set of experts for all of them, as in WideNet, which are submodules of the first;
            False: each its own.
        upcycle: every expert starts as a copy of the dense network (when shared: of the first one widened); False:
            new weights, a new layer's defaults for ``capacity_factor`` and ``normalize``.
        aux_loss_weight: lambda, what the sum of the balance losses over the blocks counts in the loss.
        loss_in_output: whether the model's output has a ``loss`` when it is given labels: an attribute, a key, or the
            first element of a tuple if that is a scalar. None: if it is a model of transformers that takes labels.
        options: of :class:`MoELayer`: ``k``, ``capacity_factor``, ``eval_capacity_factor``, ``priority``,
            ``noise_std``, ``normalize``, ``backend``. Their defaults are those of :meth:`MoELayer.from_dense`. Without
            ``normalize`` a copy's output is multiplied by the sum of the token's k gate weights.

    Returns:
        What changed, the numbers of parameters, and where the balance loss is.

    Raises:
        ValueError: naming what was expected and what came; the model is then as it was.
    """
    check_arguments(num_experts, modules, blocks, aux_loss_weight, options)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "widen: model: expected one to be given to DistributedDataParallel afterwards, for it does not see new "
            f"parameters, got a {type(model).__name__} that has it already"
        )
    places = chosen(model, modules, blocks)
    before = count(model)
    losses = BalanceLosses(aux_loss_weight, takes_labels(model) if loss_in_output is None else loss_in_output)
    layers = make_layers(places, num_experts, share, upcycle, options)
    for index, (place, layer) in enumerate(zip(places, layers, strict=True)):
        padding = None if place.attention is None else Padding(place.block, place.attention)
        new = MoEFeedForward(layer, losses, padding, place.dropout, owner=index == 0 or not share)
        place.put(new.train(place.module.training))
    model.register_forward_pre_hook(losses.begin)
    model.register_forward_hook(losses.end, with_kwargs=True)
    (total_before, trainable_before), (total_after, trainable_after) = before, count(model)
    return WidenReport(
        {place.name: type(place.module).__name__ for place in places},
        num_experts,
        share,
        total_before,
        total_after,
        trainable_before,
        trainable_after,
        aux_loss_weight,
        losses.loss_in_output,
    )


def check_arguments(num_experts: Any, modules: Any, blocks: Any, aux_loss_weight: Any, options: dict[str, Any]) -> None:
    for name in DECIDED:
        if name in options:
            raise ValueError(f"widen: {name}: expected none, since the dense networks decide it, got one")
    if not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"widen: num_experts: expected a number from 1 on, got {num_experts!r}")
    for name, value, kind in (("modules", modules, str), ("blocks", blocks, int)):
        if value is None:
            continue
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, kind) for v in value):
            raise ValueError(f"widen: {name}: expected a list of {kind.__name__}, got {value!r}")
    if not isinstance(aux_loss_weight, int | float):
        raise ValueError(f"widen: aux_loss_weight: expected a number, got {aux_loss_weight!r}")


def chosen(model: nn.Module, modules: Sequence[str] | None, blocks: Sequence[int] | None) -> list[Place]:
    """The places to widen, in the model's order, or in that of ``modules``."""
    places = find_places(model, modules)
    if not places:
        raise ValueError(
            f"widen: model: expected torch.nn.TransformerEncoderLayer or transformers' {', '.join(KNOWN)} in it, or "
            f"modules that name its dense feed-forward networks, got a {type(model).__name__} with none of them"
        )
    if blocks is None:
        return places
    depths = range(len(places))
    if not blocks or not all(-len(places) <= block < len(places) for block in blocks):
        raise ValueError(f"widen: blocks: expected indices of the {len(places)} networks found, got {list(blocks)}")
    return [places[depth] for depth in sorted({depths[block] for block in blocks})]


def make_layers(
    places: list[Place], num_experts: int, share: bool, upcycle: bool, options: dict[str, Any]
) -> list[MoELayer]:
    """A layer for each place, or the same one for all."""
    layers: list[MoELayer] = []
    shared: FeedForward | None = None
    for place in places:
        dense = recognise(place)
        if shared is None:
            layers.append(new_layer(dense, num_experts, upcycle, options))
            shared = dense if share else None
        elif dense.kind == shared.kind:
            layers.append(layers[0])
        else:
            raise ValueError(
                f"widen: share: expected networks all like the first, {shared.kind}, got {dense.kind} at {place.name}"
            )
    return layers


def new_layer(dense: FeedForward, num_experts: int, upcycle: bool, options: dict[str, Any]) -> MoELayer:
    """Experts that are copies of the network, or have new weights; trained where it was trained."""
    linear1, linear2, activation = dense
    if upcycle:
        layer = MoELayer.from_dense(linear1, linear2, num_experts, activation, **options)
    else:
        layer = MoELayer(
            linear1.in_features,
            linear2.in_features,
            num_experts,
            activation=activation,
            bias=linear1.bias is not None,
            **options,
        ).to(linear1.weight)
    experts = layer.experts
    for weight, bias, linear in ((experts.w1, experts.b1, linear1), (experts.w2, experts.b2, linear2)):
        weight.requires_grad_(linear.weight.requires_grad)
        if bias is not None:
            bias.requires_grad_(linear.bias.requires_grad)
    return layer


def takes_labels(model: nn.Module) -> bool:
    """Whether it is a model of transformers whose output has a loss when it is given labels."""
    of_transformers = any(
        kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__ if is_of_transformers(kind)
    )
    arguments = inspect.signature(model.forward).parameters
    return of_transformers and any("label" in name or name == "start_positions" for name in arguments)


def count(model: nn.Module) -> tuple[int, int]:
    """Parameters of the model, and those that require a gradient; shared ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
