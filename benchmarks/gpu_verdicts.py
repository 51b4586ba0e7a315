"""Cases that are right or wrong: each is checked by itself, its verdict printed and put into the results' JSON."""

import argparse
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import gpu_results

Check = Callable[[Any, str], tuple[bool, str]]  # (case, device) -> whether it is good, and what was seen
Verdict = dict[str, str | bool]


def parser(about: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--jobs", type=int, default=1, help="cases at a time, each in a process of its own")
    options.add_argument("--json", type=Path, help="add the verdicts to this file")
    options.add_argument("--cpu-smoke", action="store_true", help="tiny cases on the CPU, under Triton's interpreter")
    return options


def device_of(options: argparse.Namespace) -> str:
    """Where the cases run; to be asked before the kernels are imported."""
    if options.cpu_smoke:
        os.environ["TRITON_INTERPRET"] = "1"
        return "cpu"
    if not torch.cuda.is_available():
        sys.exit(f"{Path(sys.argv[0]).name}: no GPU that torch can use; --cpu-smoke runs the code on the CPU")
    return "cuda"


def report(part: str, check: Check, cases: Sequence[Any], device: str, options: argparse.Namespace) -> NoReturn:
    """Print every case's verdict, put them into the JSON as ``part``, and exit with 1 unless all are good."""
    results: list[Verdict] = []
    for result in verdicts(check, cases, device, options.jobs):
        print(f"{result['case']}: {result['verdict']}", flush=True)
        results.append(result)
        if options.json:
            gpu_results.add(options.json, (part,), results)
    sys.exit(not all(result["good"] for result in results))


def verdicts(check: Check, cases: Sequence[Any], device: str, jobs: int) -> Iterator[Verdict]:
    """In the order of the cases; with several jobs kernels compile side by side."""
    if jobs == 1:
        yield from (verdict(check, case, device) for case in cases)
        return
    multiprocessing.set_forkserver_preload([check.__module__])  # so that torch is imported once
    with ThreadPoolExecutor(jobs) as threads:
        yield from threads.map(functools.partial(verdict_apart, check, device=device), cases)


def verdict_apart(check: Check, case: Any, device: str) -> Verdict:
    """From a process of its own: a kernel that breaks its CUDA context, or the process, spoils no other case."""
    try:
        context = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:  # the others need the CPUs too
            return pool.submit(verdict, check, case, device).result()
    except BrokenExecutor as failure:
        return {"case": str(case), "good": False, "verdict": f"its process died: {failure}"}


def verdict(check: Check, case: Any, device: str) -> Verdict:
    try:
        good, seen = check(case, device)
    except Exception as failure:
        text = " ".join(str(failure).split())[:500]
        return {"case": str(case), "good": False, "verdict": f"{type(failure).__name__}: {text}"}
    return {"case": str(case), "good": good, "verdict": f"{'ok' if good else 'WRONG'}: {seen}"}
