"""Timing on machines that others use too: every contender in turn, round after round, so that noise hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Timing(NamedTuple):
    median_ms: float
    lowest_ms: float
    spread_ms: float  # between the quartiles


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Wall time of each contender on a CPU, over ``rounds`` rounds in which each has one turn.

    A turn begins with a call that is not timed, so that a contender meets the caches and the allocator as it leaves
    them itself, not as the one before it did: memory that malloc gave back in between would be paged in anew.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name, contender in contenders.items():
            contender()
            start = time.perf_counter()
            contender()
            if number >= warmup:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: _summary(times) for name, times in samples.items()}


def _summary(times: list[float]) -> Timing:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    return Timing(statistics.median(times), min(times), high - low)
