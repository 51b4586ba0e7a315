"""The experts of transformers' families by our kernels: as their own eager code, without copies, or not at all."""

import copy
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import CHOICES, EXPERTS, FAMILIES, experts_of, make
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.two_tensor import TwoTensor
from transformers.integrations.moe import use_experts_implementation

from widenet_kernels.integrations.transformers import experts as integration
from widenet_kernels.integrations.transformers import register
from widenet_kernels.testing.numerics import assert_float64, assert_op_as_good_as, assert_same_bits

register()


@pytest.fixture(autouse=True)
def no_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing falls back but where a test says so; nothing has been warned of yet."""
    monkeypatch.setattr(integration, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def module(family: str, dtype: torch.dtype = torch.float64, implementation: str = "widenet") -> nn.Module:
    """The experts of one layer, with a config of their own."""
    experts = copy.deepcopy(experts_of(make(family, dtype))[0])
    experts.config._experts_implementation = implementation
    return experts


def width(experts: nn.Module) -> int:
    return experts.down_proj.shape[-1 if experts.is_transposed else 1]


def chosen(routing: str, count: int) -> Tensor:
    """[T, K] int64"""
    generator = torch.Generator().manual_seed(3)
    index = torch.rand(count, EXPERTS, generator=generator).argsort(dim=1)[:, :CHOICES]
    if routing == "one":
        index = torch.tensor([[2, 0]]).expand(count, CHOICES)
    elif routing == "twice":  # an expert chosen twice by a token, as no router does
        index = torch.full((count, CHOICES), 1)
    elif routing == "sentinels":  # all of a token's choices, some, and none
        index = index.where(torch.arange(count * CHOICES).view(count, CHOICES) % 5 < 2, EXPERTS)
    return index


def run(experts: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """y, and the gradients of the tokens, the weights and the parameters."""
    experts.zero_grad()
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = experts(x, index, weight)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(y.dtype))
    return {"y": y.detach(), "x": x.grad, "weight": weight.grad, **{n: p.grad for n, p in experts.named_parameters()}}


def inputs(experts: nn.Module, count: int = 11, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, width(experts), generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.rand(count, CHOICES, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("routing", ["all", "one", "twice"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_float64(family: str, routing: str) -> None:
    ours, eager = module(family), module(family, implementation="eager")
    x, weight = inputs(ours)
    index = chosen(routing, len(x))
    expected = run(eager, x, index, weight)
    for name, result in run(ours, x, index, weight).items():
        assert_equal(family, result, expected[name], name)


def assert_equal(family: str, result: Tensor, expected: Tensor, name: str) -> None:
    if family == "muse-spark":  # whose norm behind the experts computes in fp32: see TOLERANCE in the tests of models
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")
    else:
        assert_float64(result, expected, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_sentinels_get_no_row(family: str) -> None:
    """As expert parallelism hands them over, but for their weight, which may be anything; a token that has no other
    choice may be NaN. The eager code here serves those choices with weight 0 and tokens that are 0."""
    ours, eager = module(family), module(family, implementation="eager")
    ours._is_expert_parallel = True
    x, weight = inputs(ours)
    index = chosen("sentinels", len(x))
    absent = index == EXPERTS
    alone = absent.all(dim=1)
    assert 0 < int(alone.sum()) < int(absent.any(dim=1).sum()) < len(x)
    expected = run(eager, x.masked_fill(alone[:, None], 0), index.masked_fill(absent, 0), weight.masked_fill(absent, 0))
    results = run(ours, x.masked_fill(alone[:, None], torch.nan), index, weight.masked_fill(absent, torch.nan))
    expected["weight"] = expected["weight"].masked_fill(absent, 0)
    for name, result in results.items():
        assert_equal(family, result, expected[name], name)
    assert not results["x"][alone].any()
    everywhere = run(ours, x, torch.full_like(index, EXPERTS), weight)
    assert not any(tensor.any() for tensor in everywhere.values())


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "nemotron-h"])
def test_no_token_and_one(family: str, count: int) -> None:
    ours, eager = module(family), module(family, implementation="eager")
    x, weight = inputs(ours, count)
    index = chosen("all", count)
    results = run(ours, x, index, weight)
    assert {name: tensor.shape for name, tensor in results.items()} == {
        "y": x.shape, "x": x.shape, "weight": weight.shape, **{n: p.shape for n, p in ours.named_parameters()},
    }  # fmt: skip
    if count == 0:
        assert not any(tensor.any() for tensor in results.values())
        return
    expected = run(eager, x, index, weight)
    for name, parameter in eager.named_parameters():
        expected[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for name, result in results.items():
        assert_float64(result, expected[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "mixtral-tanh", "gpt-oss", "nemotron-h", "aria"])
def test_narrower_dtypes_by_the_policy(family: str, dtype: torch.dtype) -> None:
    ours, eager = module(family), module(family, implementation="eager")
    x, weight = inputs(ours, 37)
    index = chosen("all", len(x))
    parameters = dict(ours.named_parameters())

    def called(experts: nn.Module) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, **parameters: Tensor) -> Tensor:
            return torch.func.functional_call(experts, parameters, (x, index, weight))

        return call

    tensors = {name: tensor.to(dtype) for name, tensor in {"x": x, "weight": weight, **parameters}.items()}
    assert_op_as_good_as(called(ours), called(eager), tensors)


def test_tokens_in_another_dtype_than_the_weights() -> None:
    for family in ("mixtral", "gpt-oss"):
        experts = module(family, torch.bfloat16)
        x, weight = inputs(experts, dtype=torch.float32)
        index = chosen("all", len(x))
        y = experts(x, index, weight)
        assert y.dtype == torch.float32
        assert_same_bits(y, experts(x.bfloat16(), index, weight).float())


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_autocast(family: str) -> None:
    experts = module(family, torch.float32)
    x, weight = inputs(experts, dtype=torch.float32)
    index = chosen("all", len(x))
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, index, weight)
    assert y.dtype == torch.float32
    narrow = copy.deepcopy(experts).bfloat16()
    assert_same_bits(y, narrow(x, index, weight))


# What it costs


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "nemotron-h", "aria"])
def test_no_weight_is_copied(family: str) -> None:
    """Nothing as large as a weight is allocated in the forward, and in the backward the gradients alone."""
    sizes = {"hidden_size": 96, "intermediate_size": 80, "moe_intermediate_size": 80}
    experts = module_of_sizes(family, sizes)
    x, weight = (tensor.float() for tensor in inputs(experts, 2))
    index = chosen("all", len(x))
    weights = [p for p in experts.parameters() if p.dim() == 3]
    least = min(p.nbytes for p in weights)
    for _ in range(2):  # once more, for what a first call keeps
        experts.zero_grad()
        with Allocations(least) as forward:
            y = experts(x.requires_grad_(), index, weight.requires_grad_())
        with Allocations(least) as backward:
            y.sum().backward()
    assert forward.sizes == []
    assert sorted(backward.sizes) == sorted(p.nbytes for p in weights)
    for parameter in weights:
        assert parameter.grad.stride() == parameter.stride()


def module_of_sizes(family: str, sizes: dict[str, int]) -> nn.Module:
    small = experts_of(make(family, torch.float32))[0]
    config = copy.deepcopy(small.config)
    config.update(sizes)
    experts = type(small)(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    config._experts_implementation = "widenet"
    return experts


class Allocations:
    """The sizes of what torch allocates inside, in any op and below it, from ``least`` bytes on."""

    def __init__(self, least: int) -> None:
        self.least = least
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "Allocations":
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        events = self.profile.profiler.kineto_results.events()
        self.sizes = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() >= self.least]


def test_what_is_counted_counts() -> None:
    with Allocations(4000) as counted:
        torch.empty(1000)
        torch.empty(999)
    assert counted.sizes == [4000]


# What is not served


@use_experts_implementation
class Foreign(nn.Module):
    """Experts whose parameters our kernels do not take; what its own code makes of them is its own affair."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return 2 * hidden_states


FIRST, SECOND = torch.ones(EXPERTS, 10, 6), torch.ones(EXPERTS, 6, 5)
UNSERVED = {
    "missing": ({"down_proj": SECOND}, "gate_up_proj: expected a plain tensor, got NoneType"),
    "quantised": (
        {"gate_up_proj": FIRST.to(torch.int8), "down_proj": SECOND},
        "gate_up_proj: expected fp32, bf16, fp16 or fp64, got torch.int8",
    ),
    "fp8": (
        {"gate_up_proj": FIRST, "down_proj": SECOND.to(torch.float8_e4m3fn)},
        "down_proj: expected fp32, bf16, fp16 or fp64, got torch.float8_e4m3fn",
    ),
    "two dtypes": (
        {"gate_up_proj": FIRST, "down_proj": SECOND.half()},
        "expected parameters of one dtype, got torch.float32 gate_up_proj, torch.float16 down_proj",
    ),
    "a tensor of tensors": (
        {"gate_up_proj": TwoTensor(FIRST, FIRST), "down_proj": SECOND},
        "gate_up_proj: expected a plain tensor, got TwoTensor",
    ),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_falls_back_with_one_warning(case: str) -> None:
    """Over layers and steps; ``forward`` set on the module, as expert parallelism does, does not hide its code."""
    parameters, reason = UNSERVED[case]
    layers = [Foreign(types.SimpleNamespace(_experts_implementation="widenet")) for _ in range(2)]
    for layer in layers:
        for name, tensor in parameters.items():
            setattr(layer, name, tensor)
    layers[1].forward = layers[1].forward
    x = torch.randn(3, 5)
    with pytest.warns(RuntimeWarning) as caught:
        results = [layer(x, chosen("all", 3), torch.rand(3, CHOICES)) for layer in layers * 2]
    for result in results:
        assert_same_bits(result, 2 * x)
    expected = f"Foreign runs transformers' own code instead of 'widenet': {reason}"
    assert [str(warning.message) for warning in caught] == [expected]
