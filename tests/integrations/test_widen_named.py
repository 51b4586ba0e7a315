"""widen on modules that are named, whatever they are; and what is refused."""

import copy
from typing import Any

import pytest
import torch.nn.functional as F
from dense_models import FFN, D, E, batch, dense, layers_of, logits, random, settle
from torch import Tensor, nn

from widenet_kernels.integrations import widen
from widenet_kernels.testing.numerics import assert_float64

ACTIVATIONS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "silu": nn.SiLU()}


class Block(nn.Module):
    """Somebody's own."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Functional(nn.Module):
    """The activation is a function; the second layer is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, FFN, bias=False), nn.Linear(FFN, D, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Gated(nn.Module):
    """With the names and the order of Llama's first code: w1 is the gate's, w3 the value's."""

    def __init__(self, function: Any, ffn_dim: int = FFN) -> None:
        super().__init__()
        self.function = function
        self.w1, self.w2, self.w3 = nn.Linear(D, ffn_dim), nn.Linear(ffn_dim, D), nn.Linear(D, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.function(self.w1(x)) * self.w3(x))


OWN = {
    **{
        f"sequential-{name}": nn.Sequential(nn.Linear(D, FFN), act, nn.Linear(FFN, D))
        for name, act in ACTIVATIONS.items()
    },
    "square": nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D)),
    "functional": Functional(),
    "swiglu": Gated(F.silu),
    "geglu": Gated(F.gelu),
    "square-swiglu": Gated(F.silu, D),
}


@pytest.mark.parametrize("name", OWN)
def test_any_network_by_name(name: str) -> None:
    model = nn.Sequential(*(Block(copy.deepcopy(OWN[name])) for _ in range(3))).double()
    if name != "functional":
        settle(model)
    before = copy.deepcopy(model)
    report = widen(model, E, modules=["1.mlp", "2.mlp"], noise_std=0.0)
    assert report.widened == dict.fromkeys(["1.mlp", "2.mlp"], type(OWN[name]).__name__)
    assert not report.loss_in_output
    activation = name.split("-")[-1] if name != "functional" else "gelu_tanh"
    assert layers_of(model)[0].experts.activation == {"square": "silu"}.get(activation, activation)
    x = random(3, 7, D)
    assert_float64(model(x), before(x))


@pytest.mark.parametrize("trained", [(), ("w1",), ("w3",)], ids=["neither", "gate", "value"])
def test_a_gated_network_trains_where_one_of_its_first_layers_did(trained: tuple[str, ...]) -> None:
    model = nn.Sequential(Block(Gated(F.silu).requires_grad_(False)))
    for name in trained:
        getattr(model[0].mlp, name).requires_grad_(True)
    widen(model, E, modules=["0.mlp"])
    experts = dict(layers_of(model)[0].experts.named_parameters())
    assert {name for name, p in experts.items() if p.requires_grad} == ({"w1", "b1"} if trained else set())


def test_dropout_of_a_named_network() -> None:
    mlp = nn.Sequential(nn.Linear(D, FFN), nn.GELU(), nn.Dropout(0.1), nn.Linear(FFN, D), nn.Dropout(0.3))
    model = nn.Sequential(Block(mlp))
    widen(model, E, modules=["0.mlp"])
    assert model[0].mlp.dropout.p == 0.3


def test_layers_by_name() -> None:
    model, before = dense("encoder"), dense("encoder")
    assert list(widen(model, E, modules=["encoder.layers.1"] * 2).widened) == ["encoder.layers.1"]
    given = batch("encoder")
    assert_float64(logits(model(**given)), logits(before(**given)))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class TwoArguments(nn.Sequential):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(D, D),
        nn.Sequential(nn.Linear(D, FFN), nn.Tanh(), nn.Linear(FFN, D)),
        nn.Sequential(nn.Linear(D, FFN), nn.GELU(), nn.Linear(FFN, FFN)),
        nn.Sequential(nn.Linear(D, FFN), nn.GELU(), nn.Linear(FFN, D, bias=False)),
        nn.Sequential(nn.LayerNorm(D), nn.Linear(D, FFN), nn.GELU(), nn.Linear(FFN, D)),
        nn.Sequential(nn.Linear(D, FFN), nn.GELU(), nn.LayerNorm(FFN, elementwise_affine=False), nn.Linear(FFN, D)),
        nn.Sequential(nn.Linear(D, FFN), nn.GELU(), nn.Linear(FFN, FFN), nn.GELU(), nn.Linear(FFN, D)),
        Residual(nn.Linear(D, FFN), nn.GELU(), nn.Linear(FFN, D)),
        TwoArguments(nn.Linear(D, FFN), nn.GELU(), nn.Linear(FFN, D)),
        Gated(F.relu),
    ],
    ids=["one", "tanh", "sizes", "bias", "norm", "norm-between", "three", "residual", "arguments", "reglu"],
)
def test_a_network_of_another_form_is_refused(module: nn.Module) -> None:
    model = nn.Sequential(Block(Functional()), Block(module))
    with pytest.raises(ValueError, match=rf"^widen: 1.mlp: expected a module x .* got {type(module).__name__}$"):
        widen(model, E, modules=["0.mlp", "1.mlp"])
    assert isinstance(model[0].mlp, Functional)
    assert not layers_of(model)
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modules": ["encoder.layers.9"]}, r"modules: expected names of modules in the model, got 'encoder.layers.9'"),
        ({"modules": [""]}, r"modules: expected names of modules in the model, got ''"),
        ({"blocks": [3]}, r"blocks: expected indices of the 3 networks found, got \[3\]"),
        ({"blocks": []}, r"blocks: expected indices of the 3 networks found, got \[\]"),
        ({"blocks": 1}, "blocks: expected a list of int, got 1"),
        ({"modules": "mlp"}, "modules: expected a list of str, got 'mlp'"),
        ({"num_experts": 0}, "num_experts: expected a number from 1 on, got 0"),
        ({"num_experts": "4"}, "num_experts: expected a number from 1 on, got '4'"),
        ({"aux_loss_weight": "a"}, "aux_loss_weight: expected a number, got 'a'"),
        ({"activation": "relu"}, r"activation: expected none, since the dense networks decide it, got one"),
        ({"experts": None}, r"experts: expected none"),
    ],
    ids=str,
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^widen: {message}"):
        widen(dense("encoder"), **{"num_experts": E} | options)


def test_errors_of_the_layer_and_of_bert() -> None:
    with pytest.raises(ValueError, match=r"^TopKRouter: k: expected 1 to 4"):
        widen(dense("encoder"), E, k=5)
    with pytest.raises(ValueError, match=r"^widen: model: .* or modules that name .* got a Linear with none of them"):
        widen(nn.Linear(2, 2), E)
    pytest.importorskip("transformers", minversion="5.0")
    with pytest.raises(ValueError, match=r"^widen: bert.encoder.layer.0: expected chunk_size_feed_forward 0.*got 2"):
        widen(dense("bert", chunk_size_feed_forward=2), E)
