"""How fast the GPU kernels are, against copies, dense products and what torch offers: timings, or sweeps over tiles.

    python -m widenet_kernels.benchmarks.gpu_speed results.json              # timings
    python -m widenet_kernels.benchmarks.gpu_speed results.json --sweep      # tiles for every form of GEMM
    python -m widenet_kernels.benchmarks.gpu_speed results.json --cpu-smoke  # tiny sizes under Triton's interpreter

Sections run in the order of their importance and each is in the JSON when it ends. FLOPs are those of served rows.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import widenet_kernels as wk

from . import gpu_results, gpu_stages, peers, results
from .gpu_timing import DENSE, Bench, Work
from .shapes import FINE_GRAINED, MIXTRAL, WIDENET_B, Case, Inputs

Section = Callable[[Bench], None]

# --------------------------------------------------------------------------------------------------------- sections


def ceilings(bench: Bench) -> None:
    """What the machine can do: a large copy, a large product."""
    size, side = ((1 << 30), 8192) if bench.device == "cuda" else (1 << 12, 64)
    source, target = torch.rand(size // 4, device=bench.device), torch.empty(size // 4, device=bench.device)
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    works = {
        "device-to-device copy": Work(lambda: target.copy_(source), nbytes=2 * size),
        f"bf16 torch.mm {side}x{side}x{side}": Work(lambda: torch.mm(a, b, out=product), flops=2 * side**3),
    }
    rows = bench.timed(works)
    if not bench.fill:
        bench.put("ceilings", list(rows.values()))
        bench.copy_gb_per_s = rows["device-to-device copy"]["gb_per_s"]
        gpu_results.add(bench.path, ("copy_gb_per_s",), bench.copy_gb_per_s)


def gemms(bench: Bench, case: Case) -> None:
    """grouped_gemm by itself: both layers forward, and the first one's two gradients, against products of torch."""
    inputs = Inputs(case, bench.device, torch.bfloat16)
    experts = inputs.experts
    for name, depth, weight, bias, activation in (
        ("first layer", case.D, experts["w1"], experts["b1"], case.activation),
        ("second layer", case.F, experts["w2"], experts["b2"], None),
    ):
        rows = inputs.normal(inputs.plan.num_rows, depth)
        if weight is not None:
            one_layer(bench, f"{case.name} {name}", inputs, rows, weight, bias, activation)


def one_layer(
    bench: Bench, name: str, inputs: Inputs, rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> None:
    (_, depth, width), plan = weight.shape, inputs.plan
    rows, weight = rows.requires_grad_(), weight.requires_grad_()
    served = inputs.served_rows()
    packed, grad = rows.detach()[served], inputs.normal(plan.num_rows, width)
    packed_grad, ends = grad[served], torch.tensor(inputs.counts, device=bench.device).cumsum(0).to(torch.int32)
    dense_weight, multiply = weight.detach()[0].contiguous(), peers.torch_grouped_mm()
    forward = torch.no_grad()(lambda: wk.grouped_gemm(rows, weight, plan, backend=bench.backend))
    whole = torch.no_grad()(lambda: wk.grouped_gemm(rows, weight, plan, bias, activation, backend=bench.backend))
    out = wk.grouped_gemm(rows, weight, plan, backend=bench.backend)
    flops = 2.0 * inputs.served * depth * width
    ways: dict[str, tuple[Callable, Callable, Callable]] = {  # ours, dense, torch's grouped_mm
        "forward": (
            forward,
            lambda: packed @ dense_weight,
            lambda: multiply(packed, weight.detach(), offs=ends),
        ),
        "gradient of rows": (
            lambda: torch.autograd.grad(out, [rows], grad, retain_graph=True),
            lambda: packed_grad @ dense_weight.t(),
            lambda: multiply(packed_grad, weight.detach().transpose(1, 2), offs=ends),
        ),
        "gradient of weight": (
            lambda: torch.autograd.grad(out, [weight], grad, retain_graph=True),
            lambda: packed.t() @ packed_grad,
            lambda: multiply(packed.t(), packed_grad, offs=ends),
        ),
    }
    for way, (call, dense, grouped) in ways.items():
        in_rows = way != "gradient of weight"
        truth = () if bench.fill else one_layer_truth(way, inputs, rows, weight, grad)
        truth_of_packed = [t[served] for t in truth] if in_rows else truth
        works = {DENSE: Work(dense, flops=flops), "grouped_gemm": Work(call, truth, flops=flops)}
        if way == "forward":
            works["grouped_gemm, bias and activation"] = Work(whole, flops=flops)
        works["torch grouped_mm"] = Work(grouped, truth_of_packed, flops=flops)
        bench.measure(f"{name}, {way}", works)


def one_layer_truth(way: str, inputs: Inputs, rows: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """The same in fp32, one expert after the other; unused rows are 0."""
    rows, weight, grad = rows.detach(), weight.detach(), grad.detach()
    if way == "gradient of weight":
        return [torch.stack([rows[r].float().t() @ grad[r].float() for r in inputs.rows_of()])]
    source = rows if way == "forward" else grad
    factors = weight if way == "forward" else weight.transpose(1, 2)
    out = torch.zeros(rows.shape[0], factors.shape[2], device=rows.device)
    for r, factor in zip(inputs.rows_of(), factors, strict=True):
        out[r] = source[r].float() @ factor.float()
    return [out]


# ------------------------------------------------------------------------------------------------------------- main


def timings(shrink: Callable[[Case], Case]) -> dict[str, Section]:
    widenet, mixtral, fine = (shrink(case) for case in (WIDENET_B._replace(name="WideNet-B"), MIXTRAL, FINE_GRAINED))
    return {
        "ceilings": ceilings,
        "WideNet-B routing": lambda bench: gpu_stages.routing(bench, widenet),
        "WideNet-B movement": lambda bench: gpu_stages.movement(bench, widenet),
        "WideNet-B gemms": lambda bench: gemms(bench, widenet),
        "Mixtral gemms": lambda bench: gemms(bench, mixtral),
        "fine-grained routing": lambda bench: gpu_stages.routing(bench, fine),
        "fine-grained movement": lambda bench: gpu_stages.movement(bench, fine),
    }


def fill_cache(names: list[str], seconds: float) -> None:
    """Compile what the sections need, each section in a process of its own, all at once; errors show later."""
    command = [sys.executable, "-m", "widenet_kernels.benchmarks.gpu_speed", *sys.argv[1:], "--fill", "--only"]
    running = [
        subprocess.Popen([*command, name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for name in names
    ]
    end = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()


def problems(device: str) -> dict[str, str | None]:
    """The backends that serve route, best first, and why there may be no CUDA C++ among them."""
    backends = ",".join(wk.available_backends("route", device))
    return {"route": backends, "cuda_problem": wk.build_info().get("cuda_problem")}


def run(bench: Bench, sections: dict[str, Section], names: list[str]) -> bool:
    """Whether every section came to its end; one that fails is reported and stops no other."""
    complete = True
    for name in names:
        try:
            sections[name](bench)
        except Exception as error:
            complete = False
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            print(f"{name}: {text}", file=sys.stderr, flush=True)
            if not bench.fill:
                gpu_results.add(bench.path, (bench.part, name), text)
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return complete


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the JSON file to add to")
    parser.add_argument("--sweep", action="store_true", help="sweep over tiles instead of the timings")
    parser.add_argument("--only", nargs="+", metavar="SECTION")
    parser.add_argument("--seconds", type=float, default=0.7, help="for one set of contenders")
    parser.add_argument("--fill", action="store_true", help="only compile: call everything once")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny sizes on the CPU; the numbers mean nothing")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = "cpu" if options.cpu_smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_speed.py: no GPU that torch can use; --cpu-smoke runs the code on the CPU at tiny sizes")
    if options.cpu_smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
        torch.set_num_threads(1)
    shrink = Case.tiny if options.cpu_smoke else lambda case: case
    if options.sweep:
        from . import gpu_sweep

        sections, part = gpu_sweep.sections(shrink, options.cpu_smoke), "sweeps"
    else:
        sections, part = timings(shrink), "speed"
    names = options.only or list(sections)
    if not options.fill:
        gpu_results.add(options.results, ("machine",), results.machine() | problems(device))
    if device == "cuda" and not options.fill:
        fill_cache(names, 25)  # of on_gpu.sh's limits
    bench = Bench(options.results, part, device, "triton", options.seconds, options.fill)
    if device == "cpu":
        sys.exit(not run(bench, sections, names))
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs are captured on the stream of what they differentiate
        sys.exit(not run(bench, sections, names))


if __name__ == "__main__":
    main()
