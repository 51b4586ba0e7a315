"""Timing on a GPU: contenders in turn, round after round, each from a cold L2, between CUDA events.

A contender is first held against the truth it is given, then captured as a CUDA graph, so that what is timed is the
GPU's work and not the host's; what cannot be captured is timed as it is launched, and its row says so. On a CPU
(``--cpu-smoke``) the same code runs with the wall clock.
"""

import datetime
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import widenet_kernels as wk
from widenet_kernels.testing.timing import Timing, interleaved

from . import gpu_results

COLD_BYTES = 256 << 20  # several times the L2 of any GPU so far
LARGEST_ERROR = 6e-2  # of any row of bf16 results, of the length of that row or of a usual one
DENSE = "dense mm"  # the contender that the others' share_of_dense refers to


class Work(NamedTuple):
    """A contender: what to call, what it must give, and the work to count it by."""

    call: Callable[[], Any]
    truth: Sequence[Tensor] = ()  # the first results must be these
    compared: Callable[[Any], Any] = lambda result: result  # which part of the result that is
    flops: float = 0
    nbytes: float = 0  # each input read once, each output written once
    repeat: int = 1  # the call does the same this many times
    graph: bool = True
    host: bool = False  # measure what the host takes to launch it too


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order, of tuples inside tuples too."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in tensors(part)] if isinstance(result, tuple | list) else []


def relative_error(result: Any, truth: Sequence[Tensor]) -> float:
    """The worst row's ||out - truth|| / ||truth||, so that one wrong row shows; NaN if anything is NaN."""
    worst = 0.0
    for out, exact in zip(tensors(result), truth, strict=False):
        assert out.shape == exact.shape, f"{list(out.shape)} instead of {list(exact.shape)}"
        error = error_of(out.detach(), exact.detach())
        worst = error if error != error or worst != worst else max(worst, error)
    return worst


def error_of(out: Tensor, exact: Tensor) -> float:
    """Integers are equal or infinitely off; a row shorter than the root mean square of all is measured by that."""
    if not exact.is_floating_point():
        return 0.0 if torch.equal(out, exact) else float("inf")
    if not exact.numel():
        return 0.0
    length = exact.float().norm(dim=-1)
    usual = length.square().mean().sqrt().clamp_min(1e-30)
    return float(((out.float() - exact.float()).norm(dim=-1) / length.clamp_min(usual)).max())


class Bench:
    """Where results go and how long a measurement may take."""

    def __init__(self, path: Path, part: str, device: str, backend: str | None, seconds: float, fill: bool) -> None:
        self.path, self.part, self.device, self.backend = path, part, device, backend
        self.seconds = seconds  # for one set of contenders
        self.fill = fill  # only call everything once, to leave compiled kernels in Triton's cache
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.copy_gb_per_s = gpu_results.load(path).get("copy_gb_per_s")
        self._cold = torch.rand((COLD_BYTES if device == "cuda" else 64) // 4, device=device)

    def measure(self, section: str, works: Mapping[str, Work]) -> None:
        """Check and time the contenders, and put their rows into the section."""
        rows = self.timed(works)
        if not self.fill:
            self.put(section, list(rows.values()))

    def timed(self, works: Mapping[str, Work]) -> dict[str, dict[str, Any]]:
        """A row for each contender."""
        rows: dict[str, dict[str, Any]] = {name: self._checked(name, work) for name, work in works.items()}
        if self.fill:
            return rows
        running = {name: work for name, work in works.items() if "why" not in rows[name]}
        calls = {}
        for name, work in running.items():
            calls[name], rows[name]["timed"] = self._prepared(work)
        timings = self._timed(calls) if calls else {}
        for name, timing in timings.items():
            rows[name] |= self._figures(works[name], timing)
        if DENSE in timings:
            for name in timings:
                rows[name]["share_of_dense"] = rows[DENSE]["ms"] / rows[name]["ms"]
        del calls
        gc.collect()  # graphs hold memory
        return rows

    def put(self, section: str, rows: list[dict[str, Any]]) -> None:
        print(section if section not in self.rows else "")
        print("\n".join(gpu_results.row_line(row) for row in rows), flush=True)
        self.rows.setdefault(section, []).extend(rows)
        gpu_results.add(self.path, (self.part, section), self.rows[section])

    def _checked(self, name: str, work: Work) -> dict[str, Any]:
        """The row so far: the error, or why there is nothing to time."""
        row: dict[str, Any] = {"name": name}
        try:
            result = work.call()
            if work.truth and not self.fill:
                row["relative_error"] = relative_error(work.compared(result), work.truth)
                if not row["relative_error"] <= LARGEST_ERROR:
                    row["why"] = f"WRONG: off by {row['relative_error']:.3g}"
            self.synchronize()
        except Exception as error:  # a contender that cannot run here stops no other
            row["why"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return row

    def _prepared(self, work: Work) -> tuple[Callable[[], Any], str]:
        if self.device != "cuda":
            return work.call, "cpu"
        if not work.graph:
            return work.call, "events"
        try:
            return captured(work.call), "graph"
        except Exception as error:
            print(f"not captured: {' '.join(str(error).split())[:200]}")
            return work.call, "events, could not be captured"

    def _timed(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, Timing]:
        if self.device != "cuda":
            return interleaved(calls, rounds=1, warmup=0)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        self._round(calls)  # the first is not counted
        start = time.perf_counter()
        while len(next(iter(samples.values()))) < 7 or (
            time.perf_counter() - start < self.seconds and len(next(iter(samples.values()))) < 100
        ):
            for name, ms in self._round(calls).items():
                samples[name].append(ms)
        return {name: _summary(times) for name, times in samples.items()}

    def _round(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """One turn of each: read more than L2 holds, then call between two events."""
        events = {}
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._cold.sum()  # reads, so that no dirty lines are left to be written back during the call
            start.record()
            call()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) for name, (start, end) in events.items()}

    def _figures(self, work: Work, timing: Timing) -> dict[str, Any]:
        figures = {
            "ms": timing.median_ms / work.repeat,
            "lowest_ms": timing.lowest_ms / work.repeat,
            "spread_ms": timing.spread_ms / work.repeat,
        }
        if work.flops:
            figures["tflops"] = work.flops / figures["ms"] / 1e9
        if work.nbytes:
            figures["gb_per_s"] = work.nbytes / figures["ms"] / 1e6
            if self.copy_gb_per_s:
                figures["floor_us"] = work.nbytes / self.copy_gb_per_s / 1e3
                figures["share_of_copy"] = figures["gb_per_s"] / self.copy_gb_per_s
        if work.host:
            figures["host_us"] = self._host_us(work.call)
        return figures

    def _host_us(self, call: Callable[[], Any]) -> float:
        """Per call, of ten issued one after the other into an empty queue; the median of three turns."""
        calls, times = 10, []
        for _ in range(3):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - start) * 1e6 / calls)
        self.synchronize()
        return statistics.median(times)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as a CUDA graph on the current stream, on which everything it differentiates must have run."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _summary(times: list[float]) -> Timing:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(statistics.median(times), min(times), high - low)


def machine(device: str, commit: str | None) -> dict[str, Any]:
    about: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "widenet_kernels": wk.__version__,
        "route": ",".join(wk.available_backends("route", device)),  # the backends that serve it, best first
        "cuda_problem": wk.build_info().get("cuda_problem"),
        "commit": commit or _said("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }
    try:
        import triton

        about["triton"] = triton.__version__
    except ImportError:
        about["triton"] = None
    return about


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
