import math
import re

import pytest
import torch
from torch import nn

from widenet_kernels.training import Lamb, warmup_decay


def rates(steps: int, lrs: tuple[float, ...] = (1.0,), **options: object) -> list[list[float]]:
    """The lr of every group after 0, 1, ... steps."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups)
    schedule = warmup_decay(optimizer, **options)
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return [list(column) for column in zip(*seen, strict=True)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"shape": "linear"}, [0, 1 / 4, 2 / 4, 3 / 4, 1, 3 / 4, 1 / 2, 1 / 4, 0, 0, 0]),
        ({"shape": "cosine"}, [0, 1 / 4, 2 / 4, 3 / 4, 1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4, 0, 0, 0]),
        (
            {"shape": "linear", "first": 0.2, "final": 0.6},
            [0.2, 0.4, 0.6, 0.8, 1, 0.9, 0.8, 0.7, 0.6, 0.6, 0.6],
        ),
        (
            {"shape": "cosine", "first": 1.0, "final": 0.5},
            [1, 1, 1, 1, 1, (6 + 2**0.5) / 8, 3 / 4, (6 - 2**0.5) / 8, 0.5],
        ),
    ],
    ids=["linear", "cosine", "linear-from-to", "cosine-from-to"],
)
def test_every_step(options: dict[str, object], expected: list[float]) -> None:
    (seen,) = rates(len(expected), warmup_steps=4, total_steps=8, **options)
    assert seen == pytest.approx(expected, abs=1e-15)


def test_cosine_from_zero_to_zero_is_the_default() -> None:
    assert rates(9, warmup_steps=4, total_steps=8) == rates(
        9, warmup_steps=4, total_steps=8, shape="cosine", first=0.0, final=0.0
    )


def test_without_warmup_it_begins_at_the_top() -> None:
    (seen,) = rates(4, warmup_steps=0, total_steps=2, shape="linear", first=0.5)
    assert seen == [1.0, 0.5, 0.0, 0.0]


def test_groups_keep_their_ratio() -> None:
    one, other = rates(9, lrs=(0.01, 0.03), warmup_steps=4, total_steps=8)
    assert other == pytest.approx([3 * lr for lr in one], abs=1e-15)
    assert max(one) == 0.01


def test_learning_rate_in_a_tensor_is_changed_in_place() -> None:
    """As a CUDA graph that holds the optimizer's step needs it."""
    lr = torch.tensor(1.0)
    optimizer = Lamb([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = warmup_decay(optimizer, 4, 8)
    for expected in (0.0, 0.25, 0.5):
        assert optimizer.param_groups[0]["lr"] is lr
        assert lr.item() == expected
        optimizer.step()
        schedule.step()


def test_that_of_the_authors_code() -> None:
    """1e-5 to 0.01 in 9,390 steps and back in the other 84,510 of 93,900."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    schedule = warmup_decay(optimizer, 30 * 313, 300 * 313, shape="linear", first=1e-3, final=1e-3)
    factor = schedule.lr_lambdas[0]
    expected = {0: 1e-5, 1: 1e-5 + 9.99e-3 / 9390, 9390: 0.01, 51645: (0.01 + 1e-5) / 2, 93900: 1e-5, 10**6: 1e-5}
    assert {step: 0.01 * factor(step) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_resumed_it_goes_on() -> None:
    (whole,) = rates(9, warmup_steps=4, total_steps=8)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = warmup_decay(optimizer, 4, 8)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    state = optimizer.state_dict(), schedule.state_dict()

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = warmup_decay(optimizer, 4, 8)
    optimizer.load_state_dict(state[0])
    schedule.load_state_dict(state[1])
    for expected in whole[5:]:
        assert optimizer.param_groups[0]["lr"] == expected
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_decay: warmup_steps: expected at least 0, got -1"),
        ({"total_steps": 4}, "warmup_decay: total_steps: expected more than warmup_steps = 4, got 4"),
        ({"shape": "step"}, "warmup_decay: shape: expected 'cosine' or 'linear', got 'step'"),
        ({"first": 1e-5 - 1}, "warmup_decay: first: expected a share of the lr, 0 to 1, got -0.99999"),
        ({"final": math.nan}, "warmup_decay: final: expected a share of the lr, 0 to 1, got nan"),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rates(1, **{"warmup_steps": 4, "total_steps": 8} | options)
