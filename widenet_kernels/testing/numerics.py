"""The tolerance policy: how far a result may be from the truth, and what has to agree bit for bit.

Integers and pure data movement agree bit for bit. Other results are compared with the same computation in float64 and
may be off by at most twice what plain torch in the same dtype is off (in the largest element), plus an ulp.
"""

import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Results = dict[str, Tensor]


def assert_same_bits(out: Tensor, expected: Tensor, what: str = "result") -> None:
    """Equal in dtype, shape and every element; NaN equals NaN, -0.0 equals 0.0."""
    assert out.dtype == expected.dtype, f"{what}: {out.dtype} instead of {expected.dtype}"
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def assert_float64(out: Tensor, exact: Tensor, what: str = "result") -> None:
    """Two computations in float64 that differ only in the order of their sums."""
    assert out.dtype == exact.dtype == torch.float64, f"{what}: {out.dtype} and {exact.dtype}"
    scale = float(exact.detach().abs().max()) if exact.numel() else 0.0
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-13 * max(scale, 1.0), msg=lambda text: f"{what}: {text}")


def assert_gradcheck(function: Callable, inputs: Tensor | Sequence[Tensor]) -> None:
    """Against finite differences of float64: every derivative, or random sums of all where kernels are interpreted."""
    fast = os.environ.get("TRITON_INTERPRET") == "1"
    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)


def largest_error(out: Tensor, exact: Tensor) -> float:
    assert exact.dtype == torch.float64
    assert out.shape == exact.shape, f"{list(out.shape)} instead of {list(exact.shape)}"
    return float((out.detach().double() - exact).abs().max()) if out.numel() else 0.0


def assert_as_good_as(out: Tensor, plain: Tensor | float, exact: Tensor, what: str = "result") -> None:
    """``|out - exact| <= 2 max|plain - exact| + ulp``, ``plain`` being torch in the dtype of ``out`` or its error."""
    if isinstance(plain, Tensor):
        assert out.dtype == plain.dtype, f"{what}: {out.dtype} instead of {plain.dtype}"
        plain = largest_error(plain, exact)
    error = largest_error(out, exact)
    bound = 2 * plain + torch.finfo(out.dtype).eps * (float(exact.abs().max()) if exact.numel() else 0.0)
    assert error <= bound, (  # a NaN fails too
        f"{what}: off by {error:.3g} (rms {float((out.double() - exact).square().mean().sqrt()):.3g}), "
        f"allowed {bound:.3g}: plain torch is off by {plain:.3g}"
    )


def values_and_grads(
    function: Callable[..., Tensor], inputs: Mapping[str, Tensor | None], seeds: Sequence[int]
) -> list[Results]:
    """The result of ``function(**inputs)`` and the gradient of every input, for a random gradient from each seed."""
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    out = function(**leaves)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    results = []
    for seed in seeds:
        grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        grads = torch.autograd.grad(out, list(wanted.values()), grad.to(out.dtype).to(out.device), retain_graph=True)
        named = {f"grad of {name}": g for name, g in zip(wanted, grads, strict=True)}
        results.append({"out": out.detach(), **named})
    return results


def value_and_grads(function: Callable[..., Tensor], inputs: Mapping[str, Tensor | None]) -> Results:
    return values_and_grads(function, inputs, (0,))[0]


def assert_op_as_good_as(
    function: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Mapping[str, Tensor | None]
) -> None:
    """Forward and every gradient of ``function`` by the policy, against ``plain`` in the same dtype and in float64.

    A few elements say little about how far off plain torch is, so that is its worst of four gradients.
    """
    ours = value_and_grads(function, inputs)
    same = values_and_grads(plain, inputs, range(4))
    exact = values_and_grads(plain, {name: None if t is None else t.double() for name, t in inputs.items()}, range(4))
    for name, result in ours.items():
        if result.dtype == torch.float64:
            assert_float64(result, exact[0][name], name)
            continue
        assert result.dtype == same[0][name].dtype, f"{name}: {result.dtype} instead of {same[0][name].dtype}"
        error = max(largest_error(s[name], e[name]) for s, e in zip(same, exact, strict=True))
        assert_as_good_as(result, error, exact[0][name], name)
