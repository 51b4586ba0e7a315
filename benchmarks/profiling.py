"""Where the layer's time goes: by stage, by its public ops one after the other and with the fused moe_ffn.

The layer runs twice in every round under torch.profiler: composed of the public ops, and with moe_ffn in the place of
permute to combine. Each stage is a named range, forward and backward: its gradients are taken by themselves, in the
order in which autograd would. On a CPU a stage's time is its range's, on a GPU that of the kernels it launched. The
activation, which the first grouped_gemm would do as it writes its result, stands by itself here, in plain torch.
"""

import argparse
import contextlib
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.benchmark import Timer

import widenet_kernels as wk
from widenet_kernels.reference.activation import activate

from . import arguments, results
from .shapes import CASES, DTYPES, Case, Inputs, find

ROUNDS = 5
HOST_DIM = 64  # D and F so small that what is measured is the way to the kernels
OP_CALL = re.compile(r"\w+::[\w.]+")  # how torch's profiler names them


@contextlib.contextmanager
def named(name: str, device: str) -> Iterator[None]:
    """A range in torch's trace, and on a GPU in that of Nsight Systems (NVTX)."""
    with record_function(name), torch.cuda.nvtx.range(name) if device == "cuda" else contextlib.nullcontext():
        yield


class Step(NamedTuple):
    """A stage that has run: what it gave, and the leaf in its place that the next stage took."""

    name: str
    out: Tensor
    leaf: Tensor


class Layer:
    """The layer of these inputs, composed of stages with names."""

    def __init__(self, inputs: Inputs, backward: bool) -> None:
        self.inputs, self.backward = inputs, backward
        self.x, self.router = self.leaf(inputs.x), self.leaf(inputs.router)
        self.experts = {name: None if t is None else self.leaf(t) for name, t in inputs.experts.items()}
        self.steps: list[Step] = []

    def leaf(self, tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(self.backward)

    def stage(self, name: str, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """The result, cut off from the graph before it, so that the stage's backward can be run by itself."""
        with named(name, self.inputs.device):
            out = function(*arguments)
        leaf = self.leaf(out)
        self.steps.append(Step(name, out, leaf))
        return leaf

    def route(self, prefix: str) -> tuple[Tensor, wk.RoutingPlan]:
        """The first stage: what the last pass left is dropped."""
        self.steps.clear()
        for tensor in (self.x, self.router, *self.experts.values()):
            if tensor is not None:
                tensor.grad = None
        case, plans = self.inputs.case, []

        def weight() -> Tensor:
            gate, plan, _ = wk.route(self.x, self.router, case.K, case.capacity, normalize=case.normalize)
            plans.append(plan)
            return gate.weight

        return self.stage(f"{prefix}: route", weight), plans[0]

    def composed(self) -> None:
        activation, (w1, b1, w2, b2) = self.inputs.case.activation, self.experts.values()
        weight, plan = self.route("composed")
        rows = self.stage("composed: permute", wk.permute, self.x, plan)
        z = self.stage("composed: first GEMM", wk.grouped_gemm, rows, w1, plan, b1)
        hidden = self.stage("composed: activation", activate, z, activation)
        out = self.stage("composed: second GEMM", wk.grouped_gemm, hidden, w2, plan, b2)
        self.stage("composed: combine", wk.combine, out, weight, plan)
        self.run_backward()

    def fused(self) -> None:
        weight, plan = self.route("fused")
        self.stage(
            "fused: moe_ffn", wk.moe_ffn, self.x, weight, plan, *self.experts.values(), self.inputs.case.activation
        )
        self.run_backward()

    def run_backward(self) -> None:
        """Stage by stage from the last; on this thread on a GPU too, where the ranges are."""
        if not self.backward:
            return
        self.steps[-1].leaf.grad = self.inputs.grad
        with torch.autograd.set_multithreading_enabled(False):
            for name, out, leaf in reversed(self.steps):
                with named(f"{name} backward", self.inputs.device):
                    out.backward(leaf.grad)


def profiled(calls: list[Callable[[], None]], device: str, rounds: int) -> profile:
    """The calls in turn, round after round; once before, unseen."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    for call in calls:
        call()
    with profile(activities=activities) as watched:
        for _ in range(rounds):
            for call in calls:
                call()
        if device == "cuda":
            torch.cuda.synchronize()
    return watched


def stage_times(watched: profile, device: str) -> list[dict[str, Any]]:
    """Each range's median over the rounds, in the order of the first round."""
    samples: dict[str, list[float]] = {}
    for event in watched.events():
        if event.name.startswith(("composed: ", "fused: ")) and event.device_type == torch.autograd.DeviceType.CPU:
            us = event.device_time_total if device == "cuda" else event.cpu_time_total
            samples.setdefault(event.name, []).append(us)
    if not any(map(any, samples.values())):
        raise RuntimeError("bench profile: torch's profiler saw no kernels: does another one watch the GPU?")
    rows = []
    for name, times in samples.items():
        composition, _, stage = name.partition(": ")
        way = "backward" if stage.endswith(" backward") else "forward"
        ms = statistics.median(times) / 1e3
        rows.append({"composition": composition, "stage": stage.removesuffix(" backward"), "pass": way, "ms": ms})
    return rows


def launches(watched: profile, device: str) -> int:
    """Kernels that ran on the GPU; on a CPU, calls of ops, those inside other ops too."""
    if device == "cuda":
        on_gpu = [event for event in watched.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not event.name.startswith(("fused: ", "Memset", "Memcpy")) for event in on_gpu)
    return sum(OP_CALL.fullmatch(event.name) is not None for event in watched.events())


def gpu_host_us(call: Callable[[], None]) -> float:
    """From the call to its return, while the GPU still works."""
    times = []
    for _ in range(4 * ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def overheads(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """{op: us of a forward call} on a CPU at T = 1 and small D and F, where next to nothing is computed."""
    inputs = Inputs(case._replace(T=1, D=HOST_DIM, F=HOST_DIM), "cpu", dtype)
    small, plan, weight = inputs.case, inputs.plan, inputs.gate.weight
    w1, b1, w2, b2 = inputs.experts.values()
    rows = wk.permute(inputs.x, plan)
    calls = {
        "route": lambda: wk.route(inputs.x, inputs.router, small.K, small.capacity, normalize=small.normalize),
        "permute": lambda: wk.permute(inputs.x, plan),
        "grouped_gemm": lambda: wk.grouped_gemm(rows, w1, plan, b1, small.activation),
        "combine": lambda: wk.combine(rows, weight, plan),
        "moe_ffn": lambda: wk.moe_ffn(inputs.x, weight, plan, w1, b1, w2, b2, small.activation),
    }
    threads = torch.get_num_threads()
    return {
        op: Timer("call()", globals={"call": call}, num_threads=threads).blocked_autorange().median * 1e6
        for op, call in calls.items()
    }


def measure(case: Case, dtype: str, device: str, backward: bool, trace: Path | None) -> dict[str, Any]:
    layer = Layer(Inputs(case, device, DTYPES[dtype]), backward)
    watched = profiled([layer.composed, layer.fused], device, ROUNDS)
    if trace:
        trace.unlink(missing_ok=True)  # torch says nothing of a file that it could not write
        watched.export_chrome_trace(str(trace))
    host = {"fused layer": gpu_host_us(layer.fused)} if device == "cuda" else overheads(case, DTYPES[dtype])
    return {
        "profile": 1,
        "machine": results.machine(),
        "shape": case.name,
        "dims": case.dims,
        "dtype": dtype,
        "device": device,
        "pass": "forward+backward" if backward else "forward",
        "rounds": ROUNDS,
        "stages": stage_times(watched, device),
        "launches": launches(profiled([layer.fused], device, 1), device),
        "host_us": host,
    }


def report(found: dict[str, Any]) -> str:
    on_gpu = found["device"] == "cuda"
    about = "the GPU's time" if on_gpu else f"{found['machine']['threads']} threads"
    lines = [f"{found['shape']}, {found['dtype']}, {about}, medians of {found['rounds']} rounds"]
    sums = {}
    for composition in ("composed", "fused"):
        stages = [stage for stage in found["stages"] if stage["composition"] == composition]
        total = sums[composition] = sum(stage["ms"] for stage in stages)
        lines += ["", f"{composition:32}{total:10.3f} ms"]
        for stage in stages:
            lines.append(f"  {stage['stage']:18}{stage['pass']:12}{stage['ms']:10.3f} ms {stage['ms'] / total:7.1%}")
    saved = sums["composed"] - sums["fused"]
    what = "kernels of the fused layer" if on_gpu else "calls of ops in the fused layer, those inside others too"
    host = "host time until it returns" if on_gpu else f"a forward call at T = 1, D = F = {HOST_DIM}"
    less = "less" if saved >= 0 else "more"
    lines += ["", f"fused it takes {abs(saved):.3f} ms {less}, {abs(saved) / sums['composed']:.1%}"]
    lines.append(f"{found['launches']} {what}")
    lines += [f"{host}: " + ", ".join(f"{name} {us:.1f} us" for name, us in found["host_us"].items())]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    backward = options.direction == "forward+backward"
    found = measure(find(options.shape), options.dtype, options.device, backward, options.trace)
    print(report(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.trace and not options.trace.exists():
        sys.exit(f"bench profile: torch could not write {options.trace}")


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        help="the layer's time by stage, launches, host time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = arguments.default_device()
    parser.add_argument(
        "--shape", choices=CASES, metavar="NAME", default="widenet-b-8", help="widenet-b-8 if not given"
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16" if device == "cuda" else "fp32")
    parser.add_argument("--device", type=arguments.device, choices=arguments.DEVICES, default=device)
    parser.add_argument("--pass", dest="direction", choices=("forward", "forward+backward"), default="forward+backward")
    about = "for chrome://tracing or ui.perfetto.dev"
    parser.add_argument("--trace", type=arguments.output, metavar="FILE.json", help=about)
    parser.add_argument("--json", type=arguments.output, metavar="FILE.json", help="for bench plot --profile")
    parser.set_defaults(run=run)
