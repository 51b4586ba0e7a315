"""How far a result is from the truth: by the worst row, so that one wrong row shows."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order, of tuples inside tuples too."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in tensors(part)] if isinstance(result, tuple | list) else []


def relative_error(result: Any, truth: Sequence[Tensor]) -> float:
    """The worst row's ||out - truth|| / ||truth||; NaN if anything is NaN."""
    return worst(error_of(out, exact) for out, exact in zip(tensors(result), truth, strict=True))


def error_by_name(result: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The same over the results of these names, which are those of the truth."""
    assert list(result) == list(truth), f"{list(result)} instead of {list(truth)}"
    return worst(error_of(out, truth[name]) for name, out in result.items())


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN if there is one, wherever it stands."""
    found = list(errors)
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def error_of(out: Tensor, exact: Tensor) -> float:
    """Integers are equal or infinitely off; a row shorter than the root mean square of all is measured by that."""
    out, exact = out.detach(), exact.detach()
    assert out.shape == exact.shape, f"{list(out.shape)} instead of {list(exact.shape)}"
    if not exact.is_floating_point():
        return 0.0 if torch.equal(out, exact) else float("inf")
    if not exact.numel():
        return 0.0
    wide = torch.promote_types(exact.dtype, torch.float32)
    length = exact.to(wide).norm(dim=-1)
    usual = length.square().mean().sqrt().clamp_min(1e-30)
    return float(((out.to(wide) - exact.to(wide)).norm(dim=-1) / length.clamp_min(usual)).max())
