"""The networks that WideNet is compared with, and its ablations: configurations of the same code."""

import pytest
import torch
from literal import literal_loss
from tiny import (
    BASELINES,
    STILL,
    TEXT_BASELINES,
    TINY,
    TINY_TEXT,
    away_from_the_start,
    overfit,
    samples,
    texts,
    tiny,
    tiny_text,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from widenet_kernels import MoELayer
from widenet_kernels.models import (
    EncoderConfig,
    WideNetConfig,
    WideNetEncoder,
    WideNetForImageClassification,
    WideNetForMaskedLM,
    WideNetForSequenceClassification,
    WideNetTextConfig,
    WideNetTextModel,
)
from widenet_kernels.models.block import DenseFFN

CIFAR = {"representation": False, "num_classes": 10}


def num_parameters(kind: type[nn.Module], config: EncoderConfig) -> int:
    with torch.device("meta"):
        model = kind(config)
    return sum(parameter.numel() for parameter in model.parameters())


# How many parameters


@pytest.mark.parametrize(
    ("config", "count"),
    [
        pytest.param(WideNetConfig.vit_base(), 87_158_249, id="vit-base"),
        pytest.param(WideNetConfig.vit_large(), 305_376_233, id="vit-large"),
        pytest.param(WideNetConfig.vit_moe_base(), 128_090_089, id="vit-moe-base"),
        pytest.param(WideNetConfig.vit_moe_large(), 406_117_353, id="vit-moe-large"),
        pytest.param(WideNetConfig.vit_base(share_blocks=True), 9_225_449, id="shared-vit-base"),
        pytest.param(WideNetConfig.vit_large(share_blocks=True), 15_757_289, id="shared-vit-large"),
        # Table 4, and then Table 3: one pair of LayerNorms instead of one for each block
        pytest.param(WideNetConfig.vit_large(share_blocks=True, ffn_size=8192), 24_149_993, id="shared-vit-8192"),
        pytest.param(WideNetConfig.base(share_norms=True), 29_691_369 - 11 * 2 * 2 * 768, id="shared-norms-base"),
        pytest.param(WideNetConfig.large(share_norms=True), 40_942_569 - 23 * 2 * 2 * 1024, id="shared-norms-large"),
        pytest.param(WideNetConfig.huge(share_norms=True), 63_343_081 - 31 * 2 * 2 * 1280, id="shared-norms-huge"),
        pytest.param(WideNetConfig.base(routing_groups=3), 29_691_369, id="groups"),  # Figure 3
        pytest.param(WideNetConfig.huge(patch_size=14), 63_189_481, id="huge-patch-14"),
    ],
)
def test_images(config: WideNetConfig, count: int) -> None:
    assert num_parameters(WideNetForImageClassification, config) == count


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        pytest.param(WideNetConfig.base(num_experts=8), 54.88, id="base-8"),  # Figure 2
        pytest.param(WideNetConfig.base(num_experts=12), 80.07, id="base-12"),
        pytest.param(WideNetConfig.base(num_experts=16), 105.26, id="base-16"),
        pytest.param(WideNetConfig.large(num_experts=8), 74.52, id="large-8"),
        pytest.param(WideNetConfig.large(num_experts=12), 108.10, id="large-12"),
        pytest.param(WideNetConfig.large(num_experts=16), 141.68, id="large-16"),
        pytest.param(WideNetConfig.vit_base(**CIFAR), 85.81, id="cifar-vit-base"),  # Table 5
        pytest.param(WideNetConfig.vit_large(**CIFAR), 303.31, id="cifar-vit-large"),
        pytest.param(WideNetConfig.vit_moe_base(**CIFAR), 126.74, id="cifar-vit-moe-base"),
        pytest.param(WideNetConfig.vit_moe_large(**CIFAR), 404.05, id="cifar-vit-moe-large"),
        pytest.param(WideNetConfig.base(**CIFAR), 28.34, id="cifar-base"),
        pytest.param(WideNetConfig.large(**CIFAR), 38.88, id="cifar-large"),
    ],
)
def test_images_in_millions(config: WideNetConfig, millions: float) -> None:
    assert round(num_parameters(WideNetForImageClassification, config) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("config", "count"),
    [
        pytest.param(WideNetTextConfig.base(), 25_887_744, id="base-4"),
        pytest.param(WideNetTextConfig.base(num_experts=8), 44_780_544, id="base-8"),
        pytest.param(WideNetTextConfig.base(16), 82_566_144, id="base-16"),
        pytest.param(WideNetTextConfig.albert_base(), 11_683_584, id="albert"),
        pytest.param(WideNetTextConfig.bert_base(), 89_650_176, id="bert"),
    ],
)
def test_texts(config: WideNetTextConfig, count: int) -> None:
    assert num_parameters(WideNetTextModel, config) == count
    heads = 768 * 128 + 128 + 2 * 128 + 30_000 + 2 * 768 + 2
    assert num_parameters(WideNetForMaskedLM, config) == count + heads


PAPER = {"k": 2, "capacity_factor": 1.2, "normalize": False, "noise_std": None, "aux_loss_weight": 0.01, "dropout": 0.1}
IMAGES = PAPER | {"pre_norm": True, "attention_dropout": 0.0, "layer_norm_eps": 1e-6}
TEXTS = PAPER | {"pre_norm": False, "attention_dropout": 0.1, "layer_norm_eps": 1e-12, "num_heads": 12}


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        pytest.param(WideNetConfig.base(), IMAGES | {"num_heads": 12, "pooling": "mean"}, id="base"),
        pytest.param(WideNetConfig.large(), IMAGES | {"num_heads": 16, "pooling": "mean"}, id="large"),
        pytest.param(WideNetConfig.huge(), IMAGES | {"num_heads": 16, "pooling": "mean"}, id="huge"),
        pytest.param(WideNetConfig.vit_base(), IMAGES | {"num_heads": 12, "pooling": "token"}, id="vit-base"),
        pytest.param(WideNetConfig.vit_large(), IMAGES | {"num_heads": 16, "pooling": "token"}, id="vit-large"),
        pytest.param(WideNetConfig.vit_moe_base(), IMAGES | {"num_heads": 12, "pooling": "mean"}, id="vit-moe-base"),
        pytest.param(WideNetConfig.vit_moe_large(), IMAGES | {"num_heads": 16, "pooling": "mean"}, id="vit-moe-large"),
        pytest.param(WideNetTextConfig.base(), TEXTS, id="text"),
        pytest.param(WideNetTextConfig.albert_base(), TEXTS, id="albert"),
        pytest.param(WideNetTextConfig.bert_base(), TEXTS, id="bert"),
    ],
)
def test_what_the_counts_do_not_show(config: EncoderConfig, fields: dict[str, object]) -> None:
    assert {name: getattr(config, name) for name in fields} == fields


def test_constructors_take_overrides_and_only_known_ones() -> None:
    assert WideNetConfig.vit_base(ffn_size=64).ffn_size == 64
    assert WideNetTextConfig.base(8, num_layers=3).num_layers == 3
    assert WideNetTextConfig.albert_base(share_norms=False).share_norms is False
    with pytest.raises(TypeError, match="depth"):
        WideNetConfig.vit_moe_large(depth=3)
    with pytest.raises(TypeError, match="image_size"):
        WideNetTextConfig.bert_base(image_size=3)


# What is shared


def test_shared_norms_appear_once_and_others_once_per_block() -> None:
    for shared, blocks in ((True, 1), (False, 3)):
        model = tiny(share_norms=shared)
        names = [name for name in model.state_dict() if "attention_norm" in name or "ffn_norm" in name]
        assert len(names) == blocks * 2 * 2
        assert sum(isinstance(module, nn.LayerNorm) for module in model.modules()) == blocks * 2 + 1


def test_unshared_blocks_have_all_parts_of_their_own() -> None:
    encoder = tiny(share_blocks=False).encoder
    for parts in (encoder.attention, encoder.ffn, encoder.blocks):
        assert len(set(parts)) == len(parts) == 3
    assert len({ffn.router for ffn in encoder.ffn}) == 3


def test_experts_stand_in_the_last_blocks() -> None:
    model = tiny(**BASELINES["vit-moe"])
    assert [type(ffn) for ffn in model.encoder.ffn] == [DenseFFN, MoELayer, MoELayer]
    assert model.encoder.ffn[0].linear1.out_features == 16
    assert model.encoder.ffn[1].experts.ffn_dim == TINY["ffn_size"]
    output = model(samples()[0])
    assert len(output.routing) == 2
    assert torch.equal(output.aux_loss, sum(aux.balance_loss for aux in output.routing))


def test_token_pooling_looks_at_the_first_position() -> None:
    model = tiny(pooling="token", representation=False).eval()
    images, _ = samples()
    patches = nn.functional.pad(model.patch_embedding(images).flatten(2).mT, (0, 0, 1, 0))
    encoded = model.encoder(patches + model.position_embedding)[0]
    assert torch.equal(model(images).logits, model.head(encoded[:, 0]))


# Groups of blocks with one routing


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_blocks_of_a_group_reuse_one_routing(groups: int) -> None:
    model = away_from_the_start(tiny(num_layers=4, routing_groups=groups))
    routed = []
    model.encoder.ffn.router.register_forward_hook(lambda *_: routed.append(1))
    output = model(samples()[0])
    assert len(routed) == groups
    demands = [tuple(aux.expert_demand.tolist()) for aux in output.routing]
    size = 4 // groups
    assert demands == [demand for demand in demands[::size] for _ in range(size)]
    assert len(set(demands)) > 1 or groups == 1
    # T in eq. 8 is the number of routing operations
    assert torch.equal(output.aux_loss, sum(aux.balance_loss for aux in output.routing[::size]))


def test_as_many_groups_as_blocks_is_no_grouping() -> None:
    images, labels = samples()
    plain, grouped = tiny(**STILL), tiny(**STILL, routing_groups=3)
    for model in (plain, grouped):
        model(images, labels).loss.backward()
    for one, other in zip(plain.parameters(), grouped.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_reused_gate_weights_have_the_gradients_of_all_their_uses() -> None:
    """Two blocks of one group: what the second makes of the gate weights comes back to the router too."""
    torch.manual_seed(0)
    config = WideNetConfig(**TINY | STILL | {"num_layers": 2, "routing_groups": 1, "capacity_factor": None})
    encoder = WideNetEncoder(config).double()
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    weight = encoder.ffn.router.weight
    encoder(x)[0].square().sum().backward()
    step = 1e-6 * torch.randn_like(weight)
    with torch.no_grad():
        weight.add_(step)
        above = encoder(x)[0].square().sum()
        weight.sub_(2 * step)
        below = encoder(x)[0].square().sum()
    torch.testing.assert_close((weight.grad * step).sum() * 2, above - below, rtol=1e-4, atol=1e-12)


# What they compute


@pytest.mark.parametrize("options", BASELINES.values(), ids=BASELINES)
def test_loss_and_gradients_against_the_literal_model(options: dict) -> None:
    options = {"capacity_factor": 0.9, "dropout": 0.0, "aux_loss_weight": 0.5} | options
    model = away_from_the_start(tiny(**options).double())
    images, labels = samples(dtype=torch.float64)
    literal = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    torch.manual_seed(7)
    output = model(images, labels)
    output.loss.backward()
    torch.manual_seed(7)
    loss, logits, dropped = literal_loss(literal, model.config, images, labels)
    loss.backward()
    assert (dropped > 0.05) != model.config.dense
    torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.logits, logits, rtol=1e-10, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, literal[name].grad, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("options", BASELINES.values(), ids=BASELINES)
def test_overfits_a_handful_of_images(options: dict) -> None:
    images, labels = samples()
    output = overfit(tiny(**options | STILL), (images,), labels=labels)
    assert output.loss - 0.01 * output.aux_loss < 0.1
    assert torch.equal(output.logits.argmax(dim=1), labels)


@pytest.mark.parametrize("options", TEXT_BASELINES.values(), ids=TEXT_BASELINES)
def test_overfits_a_handful_of_texts(options: dict) -> None:
    labels = torch.arange(5) % 3
    model = tiny_text(WideNetForSequenceClassification, **options | STILL)
    output = overfit(model, texts(), steps=60, labels=labels)
    assert output.loss - 0.01 * output.aux_loss < 0.1
    assert torch.equal(output.logits.argmax(dim=1), labels)


@pytest.mark.parametrize("kind", ["vit-moe", "groups"])
def test_compiles_as_one_graph(kind: str) -> None:
    model = tiny(**STILL | BASELINES[kind])
    images, labels = samples()
    counter = CompileCounterWithBackend("aot_eager")
    loss = torch.compile(model, fullgraph=True, backend=counter)(images, labels).loss
    loss.backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(loss, model(images, labels).loss)


# What is refused


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"moe_layers": 2}, "moe_layers: expected None or 12 with share_blocks=True: one FFN serves all blocks, got 2"),
        ({"moe_layers": 13, "share_blocks": False}, "moe_layers: expected at most num_layers 12, got 13"),
        ({"moe_layers": 0, "share_blocks": False}, "moe_layers: expected an int of at least 1, got 0"),
        ({"dense_ffn_size": 0}, "dense_ffn_size: expected an int of at least 1, got 0"),
        ({"routing_groups": 5}, "routing_groups: expected a divisor of num_layers 12, got 5"),
        ({"routing_groups": True}, "routing_groups: expected an int of at least 1, got True"),
        ({"routing_groups": 3, "share_blocks": False}, "routing_groups: expected None with share_blocks=False"),
        ({"attention_dropout": 1.0}, "attention_dropout: expected at least 0 and below 1, got 1.0"),
        ({"authors": True, "share_blocks": False, "moe_layers": 2}, "authors: expected False with dense=True or fewer"),
        # as a file may have them
        ({"dropout": None}, "dropout: expected at least 0 and below 1, got None"),
        ({"capacity_factor": "1.2"}, "capacity_factor: expected a finite number >= 0, got '1.2'"),
        ({"noise_std": False}, "noise_std: expected a finite number >= 0, got False"),
        ({"aux_loss_weight": None}, "aux_loss_weight: expected a finite number >= 0, got None"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps: expected a finite number above 0, got '1e-6'"),
        ({"dense": "false"}, "dense: expected True or False, got 'false'"),
        ({"pre_norm": 1}, "pre_norm: expected True or False, got 1"),
        ({"backend": "cuda"}, "backend: expected None or 'native' or 'triton' or 'reference', got 'cuda'"),
    ],
)
@pytest.mark.parametrize("kind", [WideNetConfig, WideNetTextConfig])
def test_config_says_what_is_wrong(kind: type[EncoderConfig], override: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}: ") as caught:
        kind.base(**override)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["vocab_size", "embedding_size", "max_positions", "num_token_types", "num_labels"])
def test_text_config_says_what_is_wrong(name: str) -> None:
    with pytest.raises(ValueError, match=f"WideNetTextConfig: {name}: expected an int of at least 1, got 0"):
        WideNetTextConfig(**TINY_TEXT | {name: 0})


@pytest.mark.parametrize("name", ["gelu_new", "swiglu"])
def test_activation_is_one_of_four(name: str) -> None:
    expected = "WideNetTextConfig: activation: expected 'gelu' or 'gelu_tanh' or 'relu' or 'silu', got "
    with pytest.raises(ValueError, match=expected + repr(name)):
        WideNetTextConfig.base(activation=name)


def test_pooling_is_the_mean_or_the_token() -> None:
    with pytest.raises(ValueError, match="WideNetConfig: pooling: expected 'mean' or 'token', got 'max'"):
        WideNetConfig.base(pooling="max")
