"""The learning rate over a training: up in a line, then down in a line or a cosine."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_decay(
    optimizer: Optimizer,
    warmup_steps: int,
    total_steps: int,
    *,
    shape: str = "cosine",
    first: float = 0.0,
    final: float = 0.0,
) -> LambdaLR:
    """Each group's lr, from ``first`` of it up to all of it in a line, then down to ``final`` of it.

    Call its ``step`` behind every step of the optimizer, not of epochs. After t of them the lr is, in shares of the lr
    that the group was made with,

        first + (1 - first) * t / warmup_steps                  for t < warmup_steps
        final + (1 - final) * (1 - p)                           from there on, "linear"
        final + (1 - final) * (1 + cos(pi * p)) / 2             from there on, "cosine"

    where p = (t - warmup_steps) / (total_steps - warmup_steps), and ``final`` from total_steps on.

    WideNet (Xue et al. 2021, arXiv 2107.11817, Table 6) has 300 epochs, 30 of them warm-up, and a cosine. The authors'
    code has a line instead, with ``first`` and ``final`` 1e-3 (lr from 1e-5 to 0.01 and back), and 313 steps an epoch.

    Args:
        optimizer: any; its groups' lr at this moment is the highest. Where a schedule has been on it before, their
            ``initial_lr``, which that one left, is.
        warmup_steps: steps until then, 0 for none.
        total_steps: steps of the whole training, the warm-up among them.
        shape: "cosine" or "linear".
        first, final: shares of the lr, 0 to 1.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def refuse(name: str, expected: str, got: object) -> None:
        raise ValueError(f"warmup_decay: {name}: expected {expected}, got {got!r}")

    if warmup_steps < 0:
        refuse("warmup_steps", "at least 0", warmup_steps)
    if total_steps <= warmup_steps:
        refuse("total_steps", f"more than warmup_steps = {warmup_steps}", total_steps)
    if shape not in ("cosine", "linear"):
        refuse("shape", "'cosine' or 'linear'", shape)
    for name, share in (("first", first), ("final", final)):
        if not 0 <= share <= 1:
            refuse(name, "a share of the lr, 0 to 1", share)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return first + (1 - first) * step / warmup_steps
        progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
        left = 1 - progress if shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return final + (1 - final) * left

    return LambdaLR(optimizer, factor)
