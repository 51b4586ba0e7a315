"""Whole models of transformers with our experts, held against their own eager code; what they generate and save."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, experts_of, make, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from widenet_kernels.integrations.transformers import register
from widenet_kernels.integrations.transformers.experts import experts_forward

register()

# Norms, router and softmax compute in fp32 even in a model of float64: a difference in the last bit of a float64 may
# come out of them as one in the last bits of an fp32, and grows in the layers behind. The experts by themselves are
# held to float64 in test_transformers_experts.py.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Nothing here falls back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


class Ops(TorchDispatchMode):
    """The names of our ops that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "widenet_kernels":
            self.names.add(func._opname)
        return func(*args, **kwargs or {})


def logits(out: Any) -> Tensor:
    return out.logits if "logits" in out else out.last_hidden_state


def step(model: nn.Module, ids: Tensor, run: Callable | None = None) -> dict[str, Tensor]:
    """The logits, every parameter's gradient, and where each layer's tokens went."""
    chosen = []
    hooks = [e.register_forward_pre_hook(lambda _, args: chosen.append(args[1:])) for e in experts_of(model)]
    model.zero_grad()
    y = logits((run or model)(ids))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype))
    for hook in hooks:
        hook.remove()
    routes = {f"index {n}": index for n, (index, _) in enumerate(chosen)}
    weights = {f"weight {n}": weight.detach() for n, (_, weight) in enumerate(chosen)}
    return {"logits": y.detach(), **weights, **{n: p.grad.clone() for n, p in model.named_parameters()}, **routes}


def assert_same_step(ours: dict[str, Tensor], eager: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == eager.keys()
    for name, expected in eager.items():
        if not expected.is_floating_point():
            assert torch.equal(ours[name], expected), name
            continue
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=tolerance * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_as_its_own_eager_code(family: str) -> None:
    model = make(family)
    model.set_experts_implementation("eager")
    eager = step(model, tokens())
    assert all(eager[name].any() for name, _ in model.named_parameters()), "a parameter that nothing depends on"
    model.set_experts_implementation("widenet")
    with Ops() as ops:
        ours = step(model, tokens())
    assert_same_step(ours, eager)
    assert ("moe_ffn" in ops.names, "grouped_gemm" in ops.names) == (FAMILIES[family].fused, not FAMILIES[family].fused)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "deepseek-v3", "nemotron-h"])
def test_generate(family: str) -> None:
    model, ids = make(family, torch.float32), tokens(2, 5)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    model.set_experts_implementation("eager")
    expected = model.generate(ids, **options)
    model.set_experts_implementation("widenet")
    assert model.generate(ids, **options).tolist() == expected.tolist()
    assert len(set(expected[0, 5:].tolist())) > 1, "one token again and again would show little"


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_compile(family: str) -> None:
    model = make(family)
    model.set_experts_implementation("eager")
    eager = step(model, tokens())
    model.set_experts_implementation("widenet")
    model.compile(fullgraph=True, backend="aot_eager")
    assert_same_step(without_routes(step(model, tokens())), without_routes(eager))


def without_routes(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hooks do not run in a compiled model."""
    return {name: tensor for name, tensor in results.items() if not name.startswith(("index", "weight "))}


def test_checkpoints_are_what_they_were(tmp_path: Path) -> None:
    model = make("mixtral")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.set_experts_implementation("widenet")
    expected = step(model, tokens())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    assert "widenet" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="widenet")
    assert loaded.config._experts_implementation == "widenet"
    assert_same_step(step(loaded, tokens()), expected, tolerance=1e-14)  # the memory's alignment decides the last bits
    eager = type(model).from_pretrained(tmp_path, experts_implementation="eager")
    assert all(torch.equal(tensor, before[name]) for name, tensor in eager.state_dict().items())


def test_registering_again_changes_nothing() -> None:
    before = dict(ALL_EXPERTS_FUNCTIONS)
    register()
    assert dict(ALL_EXPERTS_FUNCTIONS) == before
    assert before["widenet"] is experts_forward
    assert ALL_FP8_EXPERTS_FUNCTIONS["widenet"] is experts_forward  # which falls back there
