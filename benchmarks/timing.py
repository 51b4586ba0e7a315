"""Contenders are checked, then timed in turn, round after round, so that what disturbs the machine hits all alike.

On a CPU by the wall clock. On a GPU as CUDA graphs between events, from a cold L2 cache: what is timed is the GPU's
work and not the host's; what cannot be captured is timed as it is launched, and its row says so.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import widenet_kernels as wk

COLD_BYTES = 256 << 20  # several times the L2 of any GPU so far
LEAST_ROUNDS, MOST_ROUNDS = 5, 30
MIB = 1 << 20

Call = Callable[[], Any]
Row = dict[str, Any]


class Unavailable(Exception):
    """Why a contender cannot run here."""


class Contender(NamedTuple):
    name: str
    kind: str  # ours, peer or limit
    build: Callable[[], Call]  # raises Unavailable
    error: Callable[[Any], float] | None = None  # of what the call returns
    flops: float | None = None  # of the call, as all contenders of a section are counted
    nbytes: float | None = None  # each input read once, each output written once
    work: float = 0.0  # FLOPs to foresee its time by
    memory: float = 0.0  # bytes it will need, about
    repeat: int = 1  # the call does the same so many times; times are of one of them
    graph: bool = True  # whether a CUDA graph of it can be tried


class Budget(NamedTuple):
    seconds: float  # for the rounds of one set of contenders
    patience: float  # seconds; what takes longer is called once
    largest_error: float  # of any row of a result


class Clock:
    """Times a call on a CPU."""

    device = "cpu"

    def __init__(self) -> None:
        self._flops_per_second: dict[tuple[torch.dtype, int], float] = {}  # by dtype and threads

    def prepare(self, call: Call, graph: bool) -> tuple[Call, str]:
        """What is to be called in the rounds, and how it is timed."""
        return call, "cpu"

    def turn(self, call: Call) -> float:
        """Milliseconds of one call. One before it is not timed, so that a contender meets the caches and the allocator
        as it leaves them itself: memory that malloc gave back in between would be paged in anew."""
        call()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    def synchronize(self) -> None:
        pass

    def host_us(self, call: Call) -> float:
        """What the host takes for a call, of ten issued into an empty queue; the median of three turns."""
        calls, times = 10, []
        for _ in range(3):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - start) * 1e6 / calls)
        self.synchronize()
        return statistics.median(times)

    def free_bytes(self) -> float:
        meminfo = Path("/proc/meminfo")
        if not meminfo.exists():
            return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return float(available.split()[1]) * 1024

    def peak_bytes(self, call: Call) -> int:
        """The most that torch holds during the call above what it held before, of what the calling thread allocates:
        without the workspace, 1 MiB, of a product that another thread does by itself. What our ops keep counts."""
        wk.empty_cache()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            call()
        events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def foreseen_seconds(self, flops: float, dtype: torch.dtype) -> float:
        """By the speed of one small product: without instructions for a dtype, it can be hundreds of times slower."""
        measured = (dtype, torch.get_num_threads())
        if measured not in self._flops_per_second:
            side, times = 256, []
            a = torch.ones(side, side, dtype=dtype)
            for _ in range(10):  # the fastest counts: others may use the machine too
                start = time.perf_counter()
                torch.mm(a, a)
                times.append(time.perf_counter() - start)
            self._flops_per_second[measured] = 2 * side**3 / min(times)
        return flops / self._flops_per_second[measured]


class CudaClock(Clock):
    device = "cuda"

    def __init__(self) -> None:
        self._cold = torch.rand(COLD_BYTES // 4, device="cuda")

    def prepare(self, call: Call, graph: bool) -> tuple[Call, str]:
        if not graph:
            return call, "events"
        try:
            return captured(call), "graph"
        except Exception as error:
            return call, f"events, not captured: {one_line(error)[:80]}"

    def turn(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cold.sum()  # reads, so that no dirty lines are left to be written back during the call
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free_bytes(self) -> float:
        """For one contender: its graph holds what it takes while the others are called."""
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + held) / 2

    def peak_bytes(self, call: Call) -> int:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def foreseen_seconds(self, flops: float, dtype: torch.dtype) -> float:
        return 0.0


def clock(device: str) -> Clock:
    return CudaClock() if device == "cuda" else Clock()


class Replay:
    """A captured call. The graph reads the call's tensors: they must live as long."""

    def __init__(self, graph: torch.cuda.CUDAGraph, call: Call) -> None:
        self._graph, self._call = graph, call

    def __call__(self) -> None:
        self._graph.replay()


def captured(call: Call) -> Call:
    """The call as a CUDA graph on the current stream, on which everything it differentiates must have run."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return Replay(graph, call)


def measure(
    contenders: list[Contender], dtype: torch.dtype, clock: Clock, budget: Budget, rows: dict[str, Row],
    progress: Callable[[str], None],
) -> None:  # fmt: skip
    """Puts into ``rows``, by name, the figures of each contender, or why there are none: interrupted, what there is."""
    calls: dict[str, Call] = {}
    samples: dict[str, list[float]] = {}
    for contender in contenders:
        progress(contender.name)
        row = rows[contender.name] = {}
        try:
            check_cost(contender, dtype, clock, budget.patience)
            call, first_ms = checked(contender, clock, budget, row)
            if first_ms > budget.patience * 1e3:
                row |= summary([first_ms], contender.repeat) | {"timed": "once"}
                continue
            row["peak_mib"] = clock.peak_bytes(call) / MIB
            if clock.device == "cuda":  # on a CPU that is the call itself
                row["host_us"] = clock.host_us(call) / contender.repeat
            calls[contender.name], row["timed"] = clock.prepare(call, contender.graph)
            samples[contender.name] = []
        except Unavailable as why:
            row["why"] = str(why)
        except Exception as error:  # a contender that cannot run here stops no other
            row["why"] = described(error)
    try:
        for name, reason in interleaved(calls, clock, budget.seconds, samples, progress):
            rows[name] = {"why": reason}
    finally:
        repeats = {contender.name: contender.repeat for contender in contenders}
        for name, times in samples.items():
            if times:
                rows[name] |= summary(times, repeats[name])


def interleaved(
    calls: dict[str, Call], clock: Clock, seconds: float, samples: dict[str, list[float]],
    progress: Callable[[str], None],
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """Rounds in which each has one turn. Whose call fails is yielded with why, and has no more turns and no samples."""
    start = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if not calls or (number >= LEAST_ROUNDS and time.perf_counter() - start > seconds):
            return
        for name, call in list(calls.items()):
            progress(f"{name}, round {number + 1}")
            try:
                samples[name].append(clock.turn(call))
            except Exception as error:
                del calls[name], samples[name]
                why = described(error)
                yield name, why
                clock.synchronize()  # raises if the GPU can do no more


def check_cost(contender: Contender, dtype: torch.dtype, clock: Clock, patience: float) -> None:
    free = clock.free_bytes()
    if contender.memory > free:
        raise Unavailable(f"needs {contender.memory / MIB:,.0f} MiB, {free / MIB:,.0f} are free")
    seconds = clock.foreseen_seconds(contender.work, dtype)
    if seconds > patience:
        rate = contender.work / seconds / 1e9
        raise Unavailable(f"torch.mm makes {rate:.3g} GFLOP/s here: {seconds:,.0f} s foreseen, patience {patience:g} s")


def checked(contender: Contender, clock: Clock, budget: Budget, row: Row) -> tuple[Call, float]:
    """The call, and the milliseconds of its first time, which gave the right answer."""
    call = contender.build()
    start = time.perf_counter()
    result = call()
    clock.synchronize()
    first_ms = (time.perf_counter() - start) * 1e3
    if contender.error:
        row["relative_error"] = contender.error(result)
        if not row["relative_error"] <= budget.largest_error:
            raise Unavailable(f"WRONG: off by {row['relative_error']:.3g}, allowed {budget.largest_error:g}")
    return call, first_ms


def summary(times: list[float], repeat: int = 1) -> Row:
    """Of milliseconds: the median, the lowest, the distance of the quartiles; and each turn."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    figures = {"ms": statistics.median(times), "lowest_ms": min(times), "spread_ms": high - low}
    scaled = {name: value / repeat for name, value in figures.items()}
    return scaled | {"rounds": len(times), "turns_ms": [ms / repeat for ms in times]}


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)[:300]}"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
