"""Every op of the GPU backend, forward and backward, on a few inputs, held against float64 on the CPU.

    python benchmarks/gpu_sanitize.py                                    # small: for compute-sanitizer to watch
    python benchmarks/gpu_sanitize.py --large --jobs 8 --json results.json  # real tile sizes too: a first look

Under compute-sanitizer set PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gpu_results
import torch
from torch import Tensor

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.inputs import Shape

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of ||out - exact|| / ||exact||
Results = dict[str, Tensor]


class Case(NamedTuple):
    shape: Shape
    activation: str
    dtype: torch.dtype
    bias: bool

    def __str__(self) -> str:
        return f"{self.shape} {self.activation} {self.dtype} {'bias' if self.bias else 'no bias'}"


SMALL = (
    Case(Shape(150, 64, 96, 4, 2, 90, "skewed", "dropped choices and unused rows"), "gelu", torch.bfloat16, True),
    Case(Shape(61, 33, 47, 5, 3, None, "holes", "odd sizes, packed, with holes"), "swiglu", torch.float32, True),
    Case(Shape(70, 40, 24, 3, 1, 30, "empty", "an expert without rows"), "geglu", torch.float16, False),
)  # fmt: skip
LARGE = (
    Case(Shape(3000, 256, 512, 4, 2, 1700, "skewed", "full tiles and cut ones"), "gelu", torch.bfloat16, True),
    Case(Shape(2000, 512, 384, 8, 2, None, "skewed", "full tiles, gated, packed"), "swiglu", torch.bfloat16, False),
    Case(Shape(1500, 192, 320, 4, 2, 900, "even", "fp32 in full precision"), "gelu_tanh", torch.float32, True),
    Case(Shape(1000, 136, 264, 64, 8, None, "even", "many experts, few rows each"), "silu", torch.float16, True),
)
TINY = (Case(Shape(12, 8, 12, 3, 2, 7, "skewed", "for a CPU"), "gelu", torch.float32, True),)


def run(case: Case, device: str, backend: str, exact: bool) -> Results:
    """All results and gradients by name; ``exact``: the same inputs in float64."""
    shape = case.shape

    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.double() if exact else tensor
        return tensor.to(device).requires_grad_()

    x = leaf(inputs.make_x(shape, dtype=case.dtype))
    weight = leaf(inputs.make_gate_weight(shape))
    parameters = [leaf(t) for t in inputs.make_experts(shape, case.activation, bias=case.bias, dtype=case.dtype)]
    results: Results = {}
    plan = wk.plan_routing(inputs.make_expert_index(shape, device=device), shape.E, shape.C, backend=backend)
    results |= {f"plan: {name}": t for name, t in zip(plan._fields, plan, strict=True) if isinstance(t, Tensor)}
    results |= routed(shape, leaf, x, backend)
    results |= differentiated("permute", lambda x: wk.permute(x, plan, backend=backend), x=x)
    rows = wk.permute(x, plan, backend=backend).detach().requires_grad_()
    w1, b1, w2, b2 = parameters
    results |= differentiated(
        "grouped_gemm",
        lambda rows, w1, b1: wk.grouped_gemm(rows, w1, plan, b1, case.activation, backend=backend),
        rows=rows, w1=w1, b1=b1,
    )  # fmt: skip
    results |= differentiated(
        "combine", lambda rows, weight: wk.combine(rows, weight, plan, backend=backend), rows=rows, weight=weight
    )
    results |= differentiated(
        "moe_ffn",
        lambda x, weight, w1, b1, w2, b2: wk.moe_ffn(
            x, weight, plan, w1, b1, w2, b2, case.activation, backend=backend
        ),
        x=x, weight=weight, w1=w1, b1=b1, w2=w2, b2=b2,
    )  # fmt: skip
    return results | accumulated(case, plan, x, weight, parameters, backend)


def routed(shape: Shape, leaf: Callable[..., Any], x: Tensor, backend: str) -> Results:
    """topk_gate and route; indices are not compared here, as float64 may rank near ties otherwise."""
    logits = leaf(inputs.make_logits(shape))
    router = leaf(inputs.normal(shape.E, shape.D, seed=9) / shape.D**0.5)

    def gate(logits: Tensor) -> Tensor:
        return wk.topk_gate(logits, shape.K, backend=backend).weight

    def route(x: Tensor, router: Tensor) -> Tensor:
        gate, _, logits = wk.route(x, router, shape.K, shape.C, backend=backend)
        return torch.cat([gate.weight, logits, gate.probs], dim=1)

    return differentiated("topk_gate", gate, logits=logits) | differentiated("route", route, x=x, router=router)


def differentiated(name: str, function: Callable[..., Tensor], **leaves: Tensor | None) -> Results:
    """The result and the gradient of every leaf, for a random gradient that is the same on every device."""
    out = function(**leaves)
    wanted = {key: t for key, t in leaves.items() if t is not None}
    grad = inputs.normal(*out.shape, seed=11, dtype=out.dtype).to(out.device)
    grads = torch.autograd.grad(out, list(wanted.values()), grad)
    return {name: out} | {f"{name}: grad of {key}": g for key, g in zip(wanted, grads, strict=True)}


def accumulated(
    case: Case, plan: wk.RoutingPlan, x: Tensor, weight: Tensor, parameters: list[Tensor | None], backend: str
) -> Results:
    """The experts' gradients added to buffers by two uses. In float64 twice what one use returns."""
    buffers = wk.GradBuffers(*(None if t is None else torch.zeros_like(t, dtype=torch.float32) for t in parameters))
    for _ in range(2):
        y = wk.moe_ffn(x, weight, plan, *parameters, case.activation, grad_buffers=buffers, backend=backend)
        y.backward(inputs.normal(*y.shape, seed=12, dtype=y.dtype).to(y.device), inputs=[x])
    fields = zip(buffers._fields, buffers, strict=True)
    return {f"grad_buffers: {name}": buffer for name, buffer in fields if buffer is not None}


def worst(case: Case, device: str) -> tuple[str, float]:
    """The result that is furthest off, and by how much; NaN and wrong integers count as infinitely far."""
    results = run(case, device, "triton", exact=False)
    exact = run(case, "cpu", "reference", exact=True)
    furthest = ("", 0.0)
    for name, truth in exact.items():
        out = results[name].detach().cpu().double()
        if out.shape != truth.shape:
            return f"{name}: {list(out.shape)} instead of {list(truth.shape)}", float("inf")
        error = float((out - truth.detach().double()).norm() / truth.detach().double().norm().clamp_min(1e-30))
        if error != error or (not truth.is_floating_point() and error > 0):
            return name, float("inf")
        furthest = max(furthest, (name, error), key=lambda pair: pair[1])
    return furthest


def verdict(case: Case, device: str) -> dict[str, str | bool]:
    try:
        name, error = worst(case, device)
    except Exception as failure:
        text = " ".join(str(failure).split())[:500]
        return {"case": str(case), "good": False, "verdict": f"{type(failure).__name__}: {text}"}
    good = error <= LIMITS[case.dtype]
    return {"case": str(case), "good": good, "verdict": f"{'ok' if good else 'WRONG'}: {name} is off by {error:.1e}"}


def verdicts(cases: tuple[Case, ...], device: str, jobs: int) -> list[dict[str, str | bool]]:
    """With several jobs each case has a process of its own: kernels compile side by side, a crash takes one case."""
    if jobs == 1:
        return [verdict(case, device) for case in cases]
    results = []
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(verdict, case, device) for case in cases]
        for case, future in zip(cases, pending, strict=True):
            try:
                results.append(future.result())
            except concurrent.futures.BrokenExecutor as failure:
                results.append({"case": str(case), "good": False, "verdict": f"its process died: {failure}"})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="large cases too")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, help="add the verdicts to this file")
    parser.add_argument("--cpu-smoke", action="store_true", help="one tiny case under Triton's interpreter")
    options = parser.parse_args()
    device = "cpu" if options.cpu_smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_sanitize.py: no GPU that torch can use; --cpu-smoke runs the code on the CPU")
    if options.cpu_smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    cases = TINY if options.cpu_smoke else SMALL + (LARGE if options.large else ())
    results = verdicts(cases, device, options.jobs)
    for result in results:
        print(f"{result['case']}: {result['verdict']}", flush=True)
    if options.json:
        gpu_results.add(options.json, ("smoke",), results)
    sys.exit(not all(result["good"] for result in results))


if __name__ == "__main__":
    main()
