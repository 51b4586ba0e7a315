"""Every shape that is measured, by name; the suites; and the inputs of a shape."""

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import widenet_kernels as wk
from widenet_kernels.routing import GATED

PATCHES = 197  # tokens of an image of 224 x 224, the first position included
MARGIN = 0.125  # between the best logits of a token: what rounding makes of a logit must not change the ranking
Parameters = dict[str, Any]  # tensors; the biases may be None
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Case(NamedTuple):
    """One layer, in the alphabet of :mod:`widenet_kernels.routing`."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int
    capacity_factor: float | None = 1.2  # None: dropless
    activation: str = "gelu"
    bias: bool = True
    normalize: bool = False
    routing: str = "uniform"  # or "zipf": the demand for expert e falls as 1 / (e + 1)

    @property
    def width(self) -> int:
        return 2 * self.F if self.activation in GATED else self.F

    @property
    def capacity(self) -> int | None:
        if self.capacity_factor is None:
            return None
        return wk.expert_capacity(self.T, self.E, self.K, self.capacity_factor)

    @property
    def dims(self) -> dict[str, Any]:
        """As the result file names them."""
        names = ("T", "D", "F", "E", "K", "capacity_factor", "activation", "routing")
        return {name: getattr(self, name) for name in names}

    def tiny(self) -> "Case":
        """For a look at the code alone; with a capacity, some choices are dropped."""
        factor = None if self.capacity_factor is None else 0.9
        return self._replace(T=40, D=16, F=24, E=min(self.E, 4), K=min(self.K, 2), capacity_factor=factor)


MIXTRAL = Case("mixtral", 8192, 4096, 14336, 8, 2, None, "swiglu", bias=False, normalize=True)
FINE_GRAINED = Case("fine-grained", 8192, 2048, 768, 128, 8, None, "swiglu", bias=False, normalize=True)
SMALL = Case("small", 512, 512, 1024, 32, 4, None, "swiglu", bias=False, normalize=True)
HOST = Case("host", 1, 64, 64, 4, 2, None)  # so small that what is measured is the way to the kernels
SIZES = {"b": (768, 4096), "l": (1024, 4096), "h": (1280, 5120)}  # D and F of WideNet (Xue et al. 2021)
IMAGES = (8, 64, 256)
WIDENET = {
    (size, images): Case(f"widenet-{size}-{images}", images * PATCHES, *SIZES[size], 4, 2)
    for size in SIZES
    for images in IMAGES
}
TEXT = [Case(f"widenet-text-e{E}", 16 * 512, 768, 3072, E, 2) for E in (4, 8, 16)]
DECODE = [Case(f"decode-{T}", T, *SIZES["b"], 4, 2, None) for T in (1, 2, 4, 8, 16, 32, 64)]
OVER_T = [Case(f"tokens-{T}", T, 256, 1024, 4, 2) for T in (256, 1024, 4096, 16384, 65536)]
OVER_C = [Case(f"capacity-{factor}", 4096, 256, 1024, 4, 2, factor) for factor in (1.5, 2.0, 4.0)]  # nothing is dropped
OVER_E = [Case(f"experts-{E}", 2048, 512, 1024, E, 2) for E in (2, 4, 8, 16, 32, 64)]


def varied(case: Case) -> Iterator[Case]:
    """The case under other capacities and under skewed routing."""
    for factor in (1.0, 2.0):
        yield case._replace(name=f"{case.name}-capacity-{factor}", capacity_factor=factor)
    yield case._replace(name=f"{case.name}-dropless", capacity_factor=None)
    yield case._replace(name=f"{case.name}-zipf", routing="zipf")


CASES = {
    case.name: case
    for case in (
        *WIDENET.values(),
        *TEXT,
        *(MIXTRAL, FINE_GRAINED, SMALL, HOST),
        *DECODE,
        *itertools.chain.from_iterable(varied(WIDENET["b", images]) for images in IMAGES),
        *(case._replace(name=f"{case.name}-zipf", routing="zipf") for case in (FINE_GRAINED, SMALL)),
        *OVER_T,
        *OVER_C,
        *OVER_E,
    )
}
SUITES = {
    "default": ("widenet-b-8", "small", "decode-1", "decode-8", "decode-64"),
    "cpu-targets": (
        *("widenet-b-8", "widenet-b-8-zipf", "widenet-b-8-capacity-1.0", "widenet-b-8-dropless"),
        *("small", "small-zipf", *(case.name for case in DECODE)),
    ),
    "gpu": ("widenet-b-256", "mixtral", "fine-grained", "widenet-b-256-zipf", "small", "decode-64"),
    "scaling": tuple(case.name for case in (*OVER_T, *OVER_C, *OVER_E)),
}
NAMES = (*CASES, *SUITES)


def find(name: str) -> Case:
    if name not in CASES:
        raise ValueError(f"shape: expected one of {', '.join(CASES)}, got {name!r}")
    return CASES[name]


def chosen(names: Iterable[str]) -> list[Case]:
    """The shapes of these names and suites, each once."""
    expanded = itertools.chain.from_iterable(SUITES.get(name, (name,)) for name in names)
    return [find(name) for name in dict.fromkeys(expanded)]


class Inputs:
    """Random tokens and weights of a case, and where its router sends the tokens.

    The tokens are made such that the router's logits are given ones: noise (Gumbel's, under which the first choice of
    a token is drawn from the softmax), plus the logarithm of the wished demand. The plan is the reference's, to stand
    on nothing that is measured.
    """

    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self.generator = torch.Generator(device).manual_seed(0)
        router = self.random(case.E, case.D, scale=case.D**-0.5)
        self.router = router.to(dtype)
        x, router = self.random(case.T, case.D), self.router.float()
        wanted = spread(self.wanted_logits(), case.K)
        missing = wanted - x @ router.t()
        x += torch.linalg.solve(router @ router.t(), missing.t()).t() @ router  # the least that has these logits
        self.x = x.to(dtype)
        self.gate, self.plan, self.logits = wk.route(
            self.x, self.router, case.K, case.capacity, normalize=case.normalize, backend="reference"
        )
        self.counts: list[int] = self.plan.expert_count.tolist()
        self.demand: list[int] = self.plan.expert_demand.tolist()
        self.served = sum(self.counts)
        self.serving = sum(count > 0 for count in self.counts)  # experts

    def random(self, *size: int, scale: float = 1.0) -> Tensor:
        """Normal, in fp32."""
        return torch.randn(*size, device=self.device, generator=self.generator).mul_(scale)

    def normal(self, *size: int, scale: float = 1.0) -> Tensor:
        return self.random(*size, scale=scale).to(self.dtype)

    def wanted_logits(self) -> Tensor:
        """[T, E]"""
        case = self.case
        uniform = torch.rand(case.T, case.E, device=self.device, generator=self.generator)
        gumbel = -(-uniform.clamp(1e-6, 1 - 1e-6).log()).log()
        if case.routing == "uniform":
            return gumbel
        return gumbel - torch.arange(1, case.E + 1, device=self.device).log()

    @functools.cached_property
    def experts(self) -> Parameters:
        """w1 [E, D, width], b1 [E, width], w2 [E, F, D], b2 [E, D], which only whole layers need."""
        case = self.case
        return {
            "w1": self.normal(case.E, case.D, case.width, scale=case.D**-0.5),
            "b1": self.normal(case.E, case.width) if case.bias else None,
            "w2": self.normal(case.E, case.F, case.D, scale=case.F**-0.5),
            "b2": self.normal(case.E, case.D) if case.bias else None,
        }

    @functools.cached_property
    def grad(self) -> Tensor:
        """[T, D]: of the layer's result."""
        return self.normal(self.case.T, self.case.D)

    def widened(self, dtype: torch.dtype, normalize: bool) -> "Inputs":
        """The same values in another dtype, for a layer that normalizes its weights or does not."""
        wide = copy.copy(self)
        wide.dtype, wide.case = dtype, self.case._replace(normalize=normalize)
        wide.x, wide.router, wide.grad = (t.to(dtype) for t in (self.x, self.router, self.grad))
        wide.experts = {name: None if t is None else t.to(dtype) for name, t in self.experts.items()}
        return wide

    def served_rows(self) -> Tensor:
        """[served], int64"""
        return (self.plan.row_choice >= 0).nonzero().view(-1)

    @functools.cached_property
    def served_experts(self) -> tuple[Tensor, Tensor]:
        """[served], int64: the expert of each served row; [E], int32: where its rows end, packed."""
        counts = self.plan.expert_count
        experts = torch.arange(self.case.E, device=counts.device).repeat_interleave(counts)
        return experts, counts.cumsum(0).to(torch.int32)

    def choice_served(self) -> Tensor:
        """[T, K] bool"""
        return self.plan.choice_row >= 0


def spread(logits: Tensor, k: int) -> Tensor:
    """The logits with at least MARGIN between each of the k best and the next."""
    best, order = logits.sort(dim=-1, descending=True)
    gaps = best[:, :-1] - best[:, 1:]
    wider = torch.where(torch.arange(gaps.shape[1], device=gaps.device) < k, gaps.clamp_min(MARGIN), gaps)
    below = torch.cat([torch.zeros_like(best[:, :1]), wider.cumsum(1)], dim=1)
    return torch.empty_like(logits).scatter_(1, order, best[:, :1] - below)
