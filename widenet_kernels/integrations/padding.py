"""Padding: which tokens a block's experts need not serve, known from the mask that its attention was given."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

ARGUMENTS = ("key_padding_mask", "attention_mask")  # of torch's MultiheadAttention, and of transformers' attentions


class Padding:
    """What an attention's mask says about the tokens of its block.

    The mask is noted where the block calls its attention, so checkpointing that runs the block again notes the same
    one again, whatever has been forwarded since. Before that call the block knows none: a network that stands in front
    of the attention, as in a Conformer, serves all tokens.

    Args:
        block: the module that calls the attention and the network.
        attention: a module whose forward has one of ``ARGUMENTS``.
    """

    mask: Any = None  # of the attention's last call; neither copied nor saved

    def __init__(self, block: nn.Module, attention: nn.Module) -> None:
        names = list(inspect.signature(attention.forward).parameters)
        self.argument = next(name for name in ARGUMENTS if name in names)
        self.place = names.index(self.argument)
        self.batch_first = getattr(attention, "batch_first", True)
        block.register_forward_pre_hook(self.forget)
        attention.register_forward_pre_hook(self.note, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "mask"}

    def forget(self, block: nn.Module, args: tuple) -> None:
        """A forward pre-hook of the block."""
        self.mask = None

    def note(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the attention."""
        self.mask = kwargs.get(self.argument, args[self.place] if len(args) > self.place else None)

    def valid(self, x: Tensor) -> Tensor | None:
        """[...] bool for the block's tokens x [..., D], False for padding; None: no token is known to be.

        That is so without a mask, for one of flex attention, and for the new tokens of a text whose earlier ones are
        in a cache.
        """
        if not isinstance(self.mask, Tensor):
            return None
        valid = _not_padding(self.mask) if self.argument == "key_padding_mask" else _attended(self.mask)
        if not self.batch_first and valid.dim() == 2:
            valid = valid.t()
        return valid if valid.shape == x.shape[:-1] else None


def _not_padding(key_padding_mask: Tensor) -> Tensor:
    """[N, L] or [L], True or -inf for padding -> bool."""
    return ~key_padding_mask if key_padding_mask.dtype == torch.bool else key_padding_mask != -math.inf


def _attended(attention_mask: Tensor) -> Tensor:
    """[N, L], or [N, heads, queries, L] of bool or what is added to the scores -> [N, L]: some query attends to it."""
    if attention_mask.dim() != 4:
        return attention_mask != 0
    if attention_mask.is_floating_point():
        attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min
    return (attention_mask != 0).any(dim=1).any(dim=1)
