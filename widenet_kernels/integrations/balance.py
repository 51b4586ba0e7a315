"""The balance losses of a widened model: how they are collected, and how they get into the loss."""

from typing import Any

import torch
from torch import Tensor, nn


class BalanceLosses:
    """The sum of the balance losses of a model's current or last forward.

    :meth:`begin` and :meth:`end` are hooks of the model, and what its MoE layers report between them counts. A layer
    that checkpointing runs again in the backward reports behind :meth:`end`, so nothing counts twice.

    Checkpointing with ``use_reentrant=True`` runs a layer without gradients first, so the loss it reports then is a
    number alone. When the layer runs again its loss has a gradient; the sum remembers what came back to it, and
    :meth:`add` gives that to the loss through the layer's output.

    Args:
        weight: lambda, what the sum counts in the loss.
        loss_in_output: whether the model's output has a loss for :meth:`end` to add to.
    """

    collecting = False  # these belong to one forward: neither copied nor saved
    total: Tensor | None = None
    term: Tensor | None = None
    without_grad = False
    grad: Tensor | None = None

    def __init__(self, weight: float, loss_in_output: bool) -> None:
        self.weight, self.loss_in_output = weight, loss_in_output

    def __getstate__(self) -> dict[str, Any]:
        return {"weight": self.weight, "loss_in_output": self.loss_in_output}

    def begin(self, model: nn.Module, args: tuple) -> None:
        """A forward pre-hook of the model."""
        if getattr(model, "_is_replica", False):
            raise RuntimeError("widen: torch.nn.DataParallel is not served; expected DistributedDataParallel")
        self.collecting, self.without_grad = True, False
        self.total = self.term = self.grad = None

    def add(self, balance_loss: Tensor, y: Tensor) -> Tensor:
        """Count a layer's loss, unless this is no forward of the model; returns the layer's output y."""
        if self.collecting:
            self.total = balance_loss if self.total is None else self.total + balance_loss.to(self.total.device)
            self.without_grad = self.without_grad or not torch.is_grad_enabled()
        elif self.grad is not None and torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1:
            return _WithGrad.apply(y, balance_loss, self.grad)
        return y

    def end(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """A forward hook of the model: the output, with the term in its loss if it has one."""
        self.collecting = False
        total = torch.zeros(()) if self.total is None else self.total
        if self.without_grad and torch.is_grad_enabled():
            total = total if total.requires_grad else total.requires_grad_()
            total.register_hook(self._remember)
        self.term = self.weight * share_of_step(kwargs) * total
        return add_to_loss(output, self.term) if self.loss_in_output else output

    def _remember(self, grad: Tensor) -> None:
        self.grad = grad


class _WithGrad(torch.autograd.Function):
    """y; in the backward ``other`` gets the gradient that was given."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, other: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad.to(other)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_y, ctx.grad, None


def share_of_step(kwargs: dict[str, Any]) -> Tensor | float:
    """What share of an optimizer's step this forward is, where its arguments tell; otherwise 1.

    With gradient accumulation transformers' Trainer gives each forward the number of labels of all of them. A model
    divides its loss by that number, and nobody divides by the number of forwards any more. (It does not count the first
    label of a text that is to be continued. Here that one counts, and the shares of such a step add up to a bit more.)
    """
    labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    return 1.0 if labels is None or items is None else labels.ne(-100).sum() / items


def add_to_loss(output: Any, term: Tensor) -> Any:
    """The output with ``loss + term`` for its loss; as it is where it has none, as without labels.

    A plain tuple has one if its first element is a scalar, as those of transformers with ``return_dict=False`` do.

    Raises:
        TypeError: for an output with no place for a loss.
    """
    if isinstance(output, dict):
        if output.get("loss") is not None:
            output["loss"] = output["loss"] + term
        return output
    if isinstance(output, tuple) and not hasattr(output, "loss"):
        scalar = output and isinstance(output[0], Tensor) and output[0].dim() == 0
        return (output[0] + term, *output[1:]) if scalar else output
    if not hasattr(output, "loss"):
        raise TypeError(f"widen: loss_in_output: expected an output with a loss, got {type(output).__name__}")
    if output.loss is None:
        return output
    if isinstance(output, tuple):
        return output._replace(loss=output.loss + term)  # type: ignore[attr-defined]
    output.loss = output.loss + term
    return output


def moe_losses(model: nn.Module) -> Tensor:
    """The scalar that the balance losses of the model's last forward add to its loss: lambda times their sum.

    Differentiable. Add it to the loss of a model that :func:`widen` reported to have none in its output; in the others'
    loss it is already. It is that of the last forward: where several go before one backward, take it after each.

    Args:
        model: one that was widened, or one that holds such a one, as DistributedDataParallel and torch.compile's do.

    Raises:
        ValueError: for a model without widened networks.
        RuntimeError: before the first forward of the model as a whole; calls of its parts do not count.
    """
    collected = dict.fromkeys(getattr(module, "losses", None) for module in model.modules())
    terms = [losses.term for losses in collected if isinstance(losses, BalanceLosses)]
    if not terms:
        raise ValueError("moe_losses: model: expected one that widen has changed, got one without its networks")
    total: Tensor | float = 0.0
    for term in terms:
        if term is None:
            raise RuntimeError("moe_losses: expected a forward of the model before, got none")
        total = total + term
    return total  # type: ignore[return-value]
