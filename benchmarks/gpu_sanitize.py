"""Every op of every GPU backend, forward and backward, on a few inputs, held against the reference in float64.

    python -m widenet_kernels.benchmarks.gpu_sanitize                    # small: for compute-sanitizer to watch
    python -m widenet_kernels.benchmarks.gpu_sanitize --large --jobs 8   # real tile sizes too: a first look

A case runs by one backend; an op that this backend does not serve chooses by itself. Under compute-sanitizer set
PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.inputs import Shape

from . import gpu_verdicts

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of ||out - exact|| / ||exact||
Results = dict[str, Tensor]
Experts = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # w1, b1, w2, b2
Chosen = Callable[[str], str | None]  # op -> its backend


class Case(NamedTuple):
    shape: Shape
    activation: str
    dtype: torch.dtype
    bias: bool
    backend: str = "reference"

    def __str__(self) -> str:
        return f"{self.backend} {self.shape} {self.activation} {self.dtype} {'bias' if self.bias else 'no bias'}"

    def on(self, device: str) -> Chosen:
        """The case's backend where it serves the op; else None, with which the op chooses by itself."""
        return lambda op: self.backend if self.backend in wk.available_backends(op, device, self.dtype) else None


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


def run(case: Case, device: str, exact: bool) -> Results:
    """All results and gradients by name; ``exact``: the same inputs in float64."""
    shape, backend = case.shape, case.on(device)

    def leaf(tensor: Tensor) -> Tensor:
        tensor = tensor.double() if exact else tensor
        return tensor.to(device).requires_grad_()

    x = leaf(inputs.make_x(shape, dtype=case.dtype))
    weight = leaf(inputs.make_gate_weight(shape))
    w1, b1, w2, b2 = inputs.make_experts(shape, case.activation, bias=case.bias, dtype=case.dtype)
    experts = (leaf(w1), None if b1 is None else leaf(b1), leaf(w2), None if b2 is None else leaf(b2))
    results: Results = {}
    index = inputs.make_expert_index(shape, device=device)
    plan = wk.plan_routing(index, shape.E, shape.C, backend=backend("plan_routing"))
    results |= {f"plan: {name}": t for name, t in zip(plan._fields, plan, strict=True) if isinstance(t, Tensor)}
    results |= routed(shape, leaf, x, backend)
    results |= differentiated("permute", lambda x: wk.permute(x, plan, backend=backend("permute")), x=x)
    rows = wk.permute(x, plan, backend=backend("permute")).detach().requires_grad_()
    w1, b1, w2, b2 = experts
    results |= differentiated(
        "grouped_gemm",
        lambda rows, w1, b1: wk.grouped_gemm(rows, w1, plan, b1, case.activation, backend=backend("grouped_gemm")),
        rows=rows, w1=w1, b1=b1,
    )  # fmt: skip
    results |= differentiated(
        "combine",
        lambda rows, weight: wk.combine(rows, weight, plan, backend=backend("combine")),
        rows=rows, weight=weight,
    )  # fmt: skip
    results |= differentiated(
        "moe_ffn",
        lambda x, weight, w1, b1, w2, b2: wk.moe_ffn(
            x, weight, plan, w1, b1, w2, b2, case.activation, backend=backend("moe_ffn")
        ),
        x=x, weight=weight, w1=w1, b1=b1, w2=w2, b2=b2,
    )  # fmt: skip
    return results | accumulated(case, plan, x, weight, experts, backend)


def routed(shape: Shape, leaf: Callable[..., Any], x: Tensor, backend: Chosen) -> Results:
    """topk_gate and route; indices are not compared here, as float64 may rank near ties otherwise."""
    logits = leaf(inputs.make_logits(shape))
    router = leaf(inputs.normal(shape.E, shape.D, seed=9) / shape.D**0.5)

    def gate(logits: Tensor) -> Tensor:
        return wk.topk_gate(logits, shape.K, backend=backend("topk_gate")).weight

    def route(x: Tensor, router: Tensor) -> Tensor:
        gate, _, logits = wk.route(x, router, shape.K, shape.C, backend=backend("route"))
        return torch.cat([gate.weight, logits, gate.probs], dim=1)

    return differentiated("topk_gate", gate, logits=logits) | differentiated("route", route, x=x, router=router)


def differentiated(name: str, function: Callable[..., Tensor], **leaves: Tensor | None) -> Results:
    """The result and the gradient of every leaf, for a random gradient that is the same on every device."""
    with torch.no_grad():  # another way through the kernels
        alone = function(**leaves)
    out = function(**leaves)
    wanted = {key: t for key, t in leaves.items() if t is not None}
    grad = inputs.normal(*out.shape, seed=11, dtype=out.dtype).to(out.device)
    grads = torch.autograd.grad(out, list(wanted.values()), grad)
    return {name: out, f"{name}: no gradient": alone} | {
        f"{name}: grad of {key}": g for key, g in zip(wanted, grads, strict=True)
    }


def accumulated(
    case: Case, plan: wk.RoutingPlan, x: Tensor, weight: Tensor, experts: Experts, backend: Chosen
) -> Results:
    """The experts' gradients added to buffers by two uses. In float64 twice what one use returns."""
    buffers = wk.GradBuffers(*(None if t is None else torch.zeros_like(t, dtype=torch.float32) for t in experts))
    for _ in range(2):
        y = wk.moe_ffn(x, weight, plan, *experts, case.activation, grad_buffers=buffers, backend=backend("moe_ffn"))
        y.backward(inputs.normal(*y.shape, seed=12, dtype=y.dtype).to(y.device), inputs=[x])
    fields = zip(buffers._fields, buffers, strict=True)
    return {f"grad_buffers: {name}": buffer for name, buffer in fields if buffer is not None}


def errors(case: Case, device: str) -> dict[str, float]:
    """How far each result is off, stage by stage; NaN, wrong shapes and wrong integers count as infinitely far."""
    results = run(case, device, exact=False)
    exact = run(case._replace(backend="reference"), device, exact=True)
    return {name: off(results[name].detach().double(), truth.detach()) for name, truth in exact.items()}


def off(out: Tensor, truth: Tensor) -> float:
    if out.shape != truth.shape:
        return float("inf")
    exact = truth.double()
    error = float((out - exact).norm() / exact.norm().clamp_min(1e-30))
    wrong = error != error or (not truth.is_floating_point() and error > 0)
    return float("inf") if wrong else error


def check(case: Case, device: str) -> tuple[bool, str]:
    """Whether all are near enough; the first that is not, or else the furthest."""
    found = errors(case, device)
    wrong = [name for name, error in found.items() if not error <= LIMITS[case.dtype]]
    name = wrong[0] if wrong else max(found, key=lambda name: found[name])
    return not wrong, f"{name} is off by {found[name]:.1e}"


def main() -> None:
    parser = gpu_verdicts.parser(__doc__)
    parser.add_argument("--large", action="store_true", help="large cases too")
    options = parser.parse_args()
    device = gpu_verdicts.device_of(options)
    cases = TINY if options.cpu_smoke else SMALL + (LARGE if options.large else ())
    there = wk.available_backends("route", device)
    backends = [name for name in ("native", "triton") if device == "cuda" or name in there]  # a GPU must have both
    every = [case._replace(backend=backend) for backend in backends for case in cases]
    gpu_verdicts.report("smoke", check, every, device, options)


if __name__ == "__main__":
    main()
