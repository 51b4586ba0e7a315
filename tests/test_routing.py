"""expert_capacity: the paper's formula in its order of operations, and its limits."""

import math

import pytest

import widenet_kernels as wk


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ((6304, 4, 2, 1.2), {}, 3782),
        ((10, 4, 2, 100.0), {}, 10),
        ((1, 64, 2, 1.0), {"minimum": 4}, 1),
        ((0, 4, 2, 1.2), {}, 0),
        ((0, 4, 2, 1.2), {"minimum": 8, "multiple": 8}, 0),
        ((35, 3, 2, 1.2), {}, 28),  # 1.2 * 2 * 35 / 3 in this order; 1.2 * (2 * 35 / 3) would floor to 27
        ((100, 4, 2, 1.0), {"multiple": 8}, 56),
        ((100, 4, 2, 1.0), {"multiple": 50}, 50),
        ((10, 2, 2, 1.0), {"multiple": 8}, 16),  # at most T rounded up to the multiple
        ((100, 64, 1, 1.0), {}, 1),
        ((100, 64, 1, 0.0), {}, 1),
        ((100, 64, 1, 0.0), {"minimum": 0}, 0),
        ((100, 64, 1, 0.0), {"minimum": 3, "multiple": 4}, 4),
        ((7, 1, 1, 1.0), {}, 7),
    ],
    ids=str,
)
def test_values(sizes, options, expected):
    capacity = wk.expert_capacity(*sizes, **options)
    assert capacity == expected
    assert type(capacity) is int


def test_order_of_operations():
    for tokens in range(1, 300):
        for experts in (1, 3, 4, 7):
            for factor in (0.7, 1.0, 1.2, 1.25):
                exact = max(1, min(tokens, math.floor(factor * 2 * tokens / experts)))
                assert wk.expert_capacity(tokens, experts, 2, factor) == exact


@pytest.mark.parametrize(
    ("sizes", "options", "named"),
    [
        ((-1, 4, 2, 1.2), {}, "num_tokens.*at least 0.*-1"),
        ((8, 0, 2, 1.2), {}, "num_experts >= 1.*num_experts=0"),
        ((8, 4, 0, 1.2), {}, "k >= 1.*k=0"),
        ((8, 4, 2, -0.5), {}, r"capacity_factor.*finite.*-0\.5"),
        ((8, 4, 2, math.inf), {}, "capacity_factor.*finite.*inf"),
        ((8, 4, 2, math.nan), {}, "capacity_factor.*finite.*nan"),
        ((8, 4, 2, 1.2), {"minimum": -1}, "minimum >= 0.*minimum=-1"),
        ((8, 4, 2, 1.2), {"multiple": 0}, "multiple >= 1.*multiple=0"),
    ],
    ids=str,
)
def test_errors(sizes, options, named):
    with pytest.raises(ValueError, match=f"^expert_capacity: .*{named}"):
        wk.expert_capacity(*sizes, **options)
