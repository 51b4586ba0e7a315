"""A whole layer, forward and backward, captured as a CUDA graph and replayed on new data: the bits of an eager call?

    python -m widenet_kernels.benchmarks.gpu_graph --jobs 8 --json results.json

What a replay cannot see is what the host decided while capturing. So tokens, gradient and parameters change in place
between replays, and with them where the tokens go. The same kernels run in the same order as in the eager call on the
same tensors: every bit must be equal. On a CPU (``--cpu-smoke``) a replay is a second call.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import widenet_kernels as wk
from widenet_kernels.testing import inputs

from . import gpu_sanitize, gpu_verdicts

Results = dict[str, Tensor]
PARAMETER_SCALE = 0.05  # keeps logits and activations near 1


class Case(NamedTuple):
    """A layer of the shape, activation and dtype of ``like``, for which the smoke has compiled kernels already."""

    like: gpu_sanitize.Case
    capacity_factor: float | None
    priority: str
    backend: str | None

    def __str__(self) -> str:
        T, D, F, E, K, *_ = self.like.shape
        room = "dropless" if self.capacity_factor is None else f"capacity {self.capacity_factor}"
        about = f"T{T}-D{D}-F{F}-E{E}-K{K} {room} {self.priority} {self.like.dtype}"
        return f"{self.backend or 'backend=None'} {about}"


class Step:
    """Forward and backward of one layer; what goes in stays in the same places."""

    def __init__(self, case: Case, device: str) -> None:
        T, D, F, E, K, *_ = case.like.shape
        self.layer = wk.MoELayer(
            D, F, E, K, case.capacity_factor,
            priority=case.priority, activation=case.like.activation, bias=case.like.bias, noise_std=0.0,
            backend=case.backend,
        ).to(device, case.like.dtype)  # fmt: skip
        self.x, self.grad = (torch.empty(T, D, device=device, dtype=case.like.dtype) for _ in range(2))
        self.leaves = {"x": self.x.requires_grad_(), **dict(self.layer.named_parameters())}

    @torch.no_grad()
    def load(self, number: int, alike: bool = False) -> None:
        """New values for everything; ``alike``: all tokens are the same one and want the same experts."""
        for place, tensor in enumerate((self.x, self.grad, *self.layer.parameters())):
            scale = 1.0 if place < 2 else PARAMETER_SCALE
            tensor.copy_(inputs.normal(*tensor.shape, seed=100 * number + place) * scale)
        if alike:
            self.x.copy_(self.x[0].expand_as(self.x))

    def __call__(self) -> Results:
        """What the layer gives, and every gradient in a tensor that no earlier call has given."""
        for leaf in self.leaves.values():
            leaf.grad = None
        y, aux = self.layer(self.x)
        loss = (y * self.grad).sum() + 0.01 * aux.balance_loss + 0.001 * aux.z_loss
        loss.backward()
        results = {"y": y, **aux._asdict()} | {f"gradient of {name}": leaf.grad for name, leaf in self.leaves.items()}
        return {name: tensor.detach() for name, tensor in results.items()}


def captured(step: Step) -> Callable[[], Results]:
    """The step as a graph: warmed up on a stream of its own; its gradients then lie in the graph's memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step()

    def replay() -> Results:
        graph.replay()
        return static

    return replay


def difference(out: Tensor, eager: Tensor) -> str | None:
    """How the bits differ; NaN is like itself."""
    out_bytes, eager_bytes = (t.contiguous().view(-1).view(torch.uint8) for t in (out, eager))
    if torch.equal(out_bytes, eager_bytes):
        return None
    apart = (out.double() - eager.double()).abs()
    return f"{int((apart != 0).sum())} of {apart.numel()} elements differ, by up to {float(apart.max()):.1e}"


def check(case: Case, device: str) -> tuple[bool, str]:
    torch.manual_seed(0)
    step = Step(case, device)
    step.load(0)
    replay = captured(step) if device == "cuda" else step
    loads = [(1, False), (2, True), (3, False)]
    demands = set()
    for number, alike in loads:
        step.load(number, alike)
        replayed = {name: tensor.clone() for name, tensor in replay().items()}
        for name, eager in step().items():
            if seen := difference(replayed[name], eager):
                return False, f"replay {number}: {name}: {seen}"
        demands.add(tuple(replayed["expert_demand"].tolist()))
    if len(demands) == 1:
        return False, "the tokens went the same way each time: nothing was shown"
    return True, f"{len(replayed)} results of {len(loads)} replays are the eager call's, to the bit"


def main() -> None:
    options = gpu_verdicts.parser(__doc__).parse_args()
    device = gpu_verdicts.device_of(options)
    bf16, _, fp32, _ = gpu_sanitize.LARGE
    likes = gpu_sanitize.TINY if options.cpu_smoke else (bf16, fp32)
    backends = [None, *(name for name in wk.available_backends("moe_ffn", device) if name == "triton")]
    cases = [
        Case(like, capacity_factor, priority, backend)
        for backend, like, capacity_factor, priority in itertools.product(
            backends, likes, (1.2, None), ("choice", "score")
        )
    ]
    gpu_verdicts.report("graph", check, cases, device, options)


if __name__ == "__main__":
    main()
