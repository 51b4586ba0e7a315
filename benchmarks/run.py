"""A run: the quick check of the build, then the benches over the shapes; interrupted, what there is."""

import contextlib
import functools
import gc
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

import widenet_kernels as wk

from . import ceilings, gemms, gpu_sanitize, host, launches, layer, model, results, stages, transformer
from .results import Section
from .shapes import DTYPES, Case, Inputs
from .timing import Budget, Row, clock, measure

try:
    from tqdm import tqdm as Progress
except ModuleNotFoundError:
    from .silent import Progress

LARGEST_ERROR = {"fp64": 1e-9, "fp32": 1e-3, "fp16": 2e-2, "bf16": 6e-2}  # of any row
Sections = Callable[[Inputs], Iterator[Section]]
ONCE: Mapping[str, Sections] = {  # whatever the shape
    "ceilings": ceilings.sections,
    "host": host.sections,
    "transformers": transformer.sections,
}
PRODUCTS = ("first", "second", "grad_rows", "grad_hidden", "weight_1", "weight_2")  # of a layer, forward and backward


def tiles(product: str, inputs: Inputs) -> Iterator[Section]:
    """Nothing where Triton's kernels do not run."""
    if "triton" in wk.available_backends("moe_ffn", inputs.device, inputs.dtype):
        from . import sweeps

        yield from sweeps.sections(product, inputs)


BENCHES: Mapping[str, Sections] = {
    **ONCE,
    "layer": layer.sections,
    **{name: functools.partial(stages.sections, name) for name in stages.STAGES},
    "backward": stages.backward,
    "launches": launches.sections,
    "products": gemms.sections,
    **{f"tiles-{product}": functools.partial(tiles, product) for product in PRODUCTS},
    "train_step": model.sections,
}


class Plan(NamedTuple):
    """What is to be measured."""

    benches: list[str]
    cases: list[Case]
    dtypes: list[str]
    directions: list[str]
    device: str
    threads: list[int]
    seconds: float
    patience: float


def broken(device: str) -> list[str]:
    """What is wrong with the ops of each backend on a few inputs, forward and backward, held against float64."""
    backends = ("native", "triton", "reference")
    there = [name for name in backends if name in wk.available_backends("route", device)]
    faults = []
    torch.set_num_threads(1)  # so little work is slower when threads wait for each other; a run sets its own number
    for backend, case in itertools.product(there, gpu_sanitize.SMALL):
        good, seen = gpu_sanitize.check(case._replace(backend=backend), device)
        if not good:
            faults.append(f"{backend} on {device}, {case}: {seen}")
    return faults


def run(plan: Plan, report: Callable[[list[Row]], None]) -> None:
    """Reports the rows of each section; KeyboardInterrupt comes through when what is there has been reported."""
    steps = [
        (threads, case, dtype, bench)
        for threads, case, dtype, bench in itertools.product(plan.threads, plan.cases, plan.dtypes, plan.benches)
        if bench not in ONCE or case is plan.cases[0]
    ]
    timer, made = clock(plan.device), functools.lru_cache(maxsize=1)(Inputs)
    with on_stream(plan.device), Progress(steps, file=sys.stderr, unit="bench", leave=False, disable=None) as bar:
        for threads, case, dtype, bench in bar:
            torch.set_num_threads(threads)
            about = {"dtype": dtype, "device": plan.device, "threads": threads}
            for section in BENCHES[bench](made(case, plan.device, DTYPES[dtype])):
                if section.direction not in plan.directions:
                    continue
                bar.set_description(f"{bench} {case.name} {dtype} {section.direction}")
                budget = Budget(plan.seconds, plan.patience, LARGEST_ERROR[dtype])
                measured: dict[str, Row] = {}
                try:
                    measure(section.contenders, DTYPES[dtype], timer, budget, measured, bar.set_postfix_str)
                finally:
                    rows = list(results.complete(section, about, measured))
                    if rows:  # none where the first contender was interrupted
                        report(rows)
                free_memory(plan.device)


def on_stream(device: str) -> contextlib.AbstractContextManager:
    """Graphs are captured on the stream of what they differentiate, which must not be the default one."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


def free_memory(device: str) -> None:
    """What a section's calls and graphs held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
