"""The MoE layer against the time of its GEMMs alone: what routing, permutation, activation and combine cost on a CPU.

    python benchmarks/bench_layer.py                    # WideNet-B's layer, 8 images, fp32 and bf16
    python benchmarks/bench_layer.py --json result.json

The floor is torch.mm(out=) on exactly the rows that the layer serves, 2 products forward and 4 backward, into buffers
made beforehand. All contenders run in turn in one process, round after round.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import widenet_kernels as wk
from widenet_kernels.testing.timing import Timing, interleaved

TOKENS, DIM, FFN_DIM, EXPERTS, K = 8 * 197, 768, 4096, 4, 2
CAPACITY_FACTOR = 1.2
ROUTING_STAGES = ("route", "permute", "combine")  # route is gate and plan; each forward and backward


class GemmsAlone:
    """The layer's products and nothing else, on rows that lie expert by expert."""

    def __init__(self, experts: wk.Experts, counts: list[int], dtype: torch.dtype) -> None:
        self.w1, self.w2 = experts.w1.detach(), experts.w2.detach()
        self.grad_w1, self.grad_w2 = torch.empty_like(self.w1), torch.empty_like(self.w2)
        ends = torch.tensor(counts).cumsum(0).tolist()
        self.rows_of = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        num_rows = sum(counts)
        self.x, self.grad_out = torch.randn(num_rows, DIM, dtype=dtype), torch.randn(num_rows, DIM, dtype=dtype)
        self.hidden, self.grad_z = (torch.randn(num_rows, FFN_DIM, dtype=dtype) for _ in range(2))
        self.out, self.grad_x = torch.empty_like(self.x), torch.empty_like(self.x)
        self.z, self.grad_hidden = torch.empty_like(self.hidden), torch.empty_like(self.hidden)

    def forward(self) -> None:
        for e, rows in enumerate(self.rows_of):
            torch.mm(self.x[rows], self.w1[e], out=self.z[rows])
            torch.mm(self.hidden[rows], self.w2[e], out=self.out[rows])

    def forward_backward(self) -> None:
        self.forward()
        for e, rows in enumerate(self.rows_of):
            torch.mm(self.grad_out[rows], self.w2[e].t(), out=self.grad_hidden[rows])
            torch.mm(self.hidden[rows].t(), self.grad_out[rows], out=self.grad_w2[e])
            torch.mm(self.x[rows].t(), self.grad_z[rows], out=self.grad_w1[e])
            torch.mm(self.grad_z[rows], self.w1[e].t(), out=self.grad_x[rows])


def differentiated(function: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> Callable[[], None]:
    """Forward and backward of function(x), with a ready gradient and no gradients kept."""
    inputs = [x, *parameters]
    grad = torch.randn_like(function(x))

    def run() -> None:
        torch.autograd.grad(function(x), inputs, grad)

    return run


def contenders(dtype: torch.dtype) -> tuple[dict[str, Callable[[], object]], list[int]]:
    torch.manual_seed(0)
    layer = wk.MoELayer(DIM, FFN_DIM, EXPERTS, K, CAPACITY_FACTOR).to(dtype)
    x = torch.randn(TOKENS, DIM, dtype=dtype, requires_grad=True)
    layer.eval()  # without noise the same tokens are served every time
    capacity = layer.capacity(TOKENS)
    gate, plan, _ = layer.router(x.detach(), capacity)
    weight = gate.weight.detach().requires_grad_()
    rows = wk.permute(x.detach(), plan).requires_grad_()
    gemms = GemmsAlone(layer.experts, plan.expert_count.tolist(), dtype)

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x)[0]

    return {
        "gemms forward": gemms.forward,
        "layer forward": forward,
        "gemms forward+backward": gemms.forward_backward,
        "layer forward+backward": differentiated(lambda x: layer(x)[0], x, list(layer.parameters())),
        "route": differentiated(lambda x: layer.router(x, capacity)[0].weight, x, list(layer.router.parameters())),
        "permute": differentiated(lambda x: wk.permute(x, plan), x, []),
        "combine": differentiated(lambda rows: wk.combine(rows, weight, plan), rows, [weight]),
    }, plan.expert_count.tolist()


def report(dtype: str, timings: dict[str, Timing], counts: list[int]) -> dict[str, Any]:
    flops = 4 * sum(counts) * DIM * FFN_DIM
    for name, timing in timings.items():
        print(f"{dtype:8} {name:24} {timing.median_ms:9.2f} ms  (spread {timing.spread_ms:.2f})")
    ratios = {
        way: timings[f"gemms {way}"].median_ms / timings[f"layer {way}"].median_ms
        for way in ("forward", "forward+backward")
    }
    routing = sum(timings[name].median_ms for name in ROUTING_STAGES) / timings["layer forward+backward"].median_ms
    gflops = flops / timings["gemms forward"].median_ms / 1e6
    print(
        f"{dtype:8} of the floor's speed: forward {ratios['forward']:.3f}, forward+backward "
        f"{ratios['forward+backward']:.3f}; gate, plan, permute and combine {routing:.1%} of the layer; "
        f"floor {gflops:.0f} GFLOP/s\n"
    )
    times = {name: timing._asdict() for name, timing in timings.items()}
    return {"share_of_floor": ratios, "routing_share": routing, "floor_gflops": gflops, "served": counts} | times


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "widenet_kernels": wk.__version__,
        "commit": commit.stdout.strip() or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the result here too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not wk.build_info()["native"]:
        sys.exit(f"no compiled kernels to measure: {wk.build_info()['reason']}")

    results: dict[str, Any] = {
        "machine": machine(),
        "shape": {"T": TOKENS, "D": DIM, "F": FFN_DIM, "E": EXPERTS, "K": K},
    }
    print(
        f"T={TOKENS} D={DIM} F={FFN_DIM} E={EXPERTS} K={K}, {options.threads} threads of {results['machine']['cpu']}\n"
    )
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        functions, counts = contenders(dtype)
        results[name] = report(name, interleaved(functions, options.rounds), counts)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
