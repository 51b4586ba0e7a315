"""The GPU scripts' rows: contenders held against the truth they are given, then timed in rounds.

On a CPU (``--cpu-smoke``) the same code runs with the wall clock.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from . import gpu_results
from .agreement import relative_error
from .timing import clock, interleaved, one_line, summary

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


class Bench:
    """Where results go and how long a measurement may take."""

    def __init__(self, path: Path, part: str, device: str, backend: str | None, seconds: float, fill: bool) -> None:
        self.path, self.part, self.device, self.backend = path, part, device, backend
        self.seconds = seconds  # for one set of contenders
        self.fill = fill  # only call everything once, to leave compiled kernels in Triton's cache
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.copy_gb_per_s = gpu_results.load(path).get("copy_gb_per_s")
        self.clock = clock(device)

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
            calls[name], rows[name]["timed"] = self.clock.prepare(work.call, work.graph)
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
            self.clock.synchronize()
        except Exception as error:  # a contender that cannot run here stops no other
            row["why"] = f"{type(error).__name__}: {one_line(error)[:300]}"
        return row

    def _timed(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
        """Figures in ms by name; on a CPU, where they mean nothing, of one turn."""
        samples = {name: [self.clock.turn(call)] for name, call in calls.items()}
        if self.device == "cuda":
            samples = {name: [] for name in calls}  # the first are not counted
            interleaved(calls, self.clock, self.seconds, samples, lambda name: None)
        return {name: summary(times) for name, times in samples.items()}

    def _figures(self, work: Work, timing: Mapping[str, float]) -> dict[str, Any]:
        figures = {name: timing[name] / work.repeat for name in ("ms", "lowest_ms", "spread_ms")}
        if work.flops:
            figures["tflops"] = work.flops / figures["ms"] / 1e9
        if work.nbytes:
            figures["gb_per_s"] = work.nbytes / figures["ms"] / 1e6
            if self.copy_gb_per_s:
                figures["floor_us"] = work.nbytes / self.copy_gb_per_s / 1e3
                figures["share_of_copy"] = figures["gb_per_s"] / self.copy_gb_per_s
        if work.host:
            figures["host_us"] = self.clock.host_us(work.call)
        return figures
