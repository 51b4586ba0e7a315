import io
import math

import pytest
import torch
from literal import literal_loss
from tiny import STILL, TINY, away_from_the_start, overfit, samples, tiny
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from widenet_kernels import MoELayer
from widenet_kernels.models import AuthorsMoELayer, WideNetConfig, WideNetForImageClassification


def num_parameters(config: WideNetConfig) -> int:
    with torch.device("meta"):
        model = WideNetForImageClassification(config)
    return sum(parameter.numel() for parameter in model.parameters())


# What it is made of


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (WideNetConfig.base(), 29_691_369),
        (WideNetConfig.large(), 40_942_569),
        (WideNetConfig.huge(), 63_343_081),
        (WideNetConfig.base(authors=True), 29_691_369),
        (WideNetConfig.large(num_layers=12), 40_893_417),  # Table 4 of the paper, and its "w/o MoE" rows of Table 3:
        (WideNetConfig.base(dense=True, ffn_size=3072), 9_225_449),
        (WideNetConfig.large(dense=True), 15_757_289),
        (WideNetConfig.huge(dense=True), 23_997_161),
    ],
    ids=["base", "large", "huge", "authors", "large-12", "dense-base", "dense-large", "dense-huge"],
)
def test_parameter_count_is_that_of_the_paper(config: WideNetConfig, count: int) -> None:
    assert num_parameters(config) == count


def test_another_block_costs_its_two_layer_norms_alone() -> None:
    more = num_parameters(WideNetConfig(**TINY | {"num_layers": 4})) - num_parameters(WideNetConfig(**TINY))
    assert more == 2 * 2 * TINY["hidden_size"]


def test_every_depth_uses_the_same_attention_and_experts() -> None:
    model = tiny()
    calls: list[nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    model(samples()[0])
    encoder = model.encoder
    for shared in (encoder.attention, encoder.ffn, encoder.ffn.router, encoder.ffn.experts):
        assert calls.count(shared) == 3
    norms = [norm for block in encoder.blocks for norm in (block.attention_norm, block.ffn_norm)]
    assert len(set(norms)) == 6
    assert [module for module in calls if isinstance(module, nn.LayerNorm)] == [*norms, encoder.norm]


def test_state_dict_names_each_parameter_once_and_round_trips() -> None:
    model, other = tiny(seed=0).eval(), tiny(seed=1).eval()
    state = model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state) == len(list(model.parameters()))
    images, labels = samples()
    assert not torch.equal(model(images).logits, other(images).logits)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(model(images, labels).loss, other(images, labels).loss)


def test_initial_values() -> None:
    model = tiny(hidden_size=128, ffn_size=256)
    assert model.position_embedding.std().item() == pytest.approx(0.02, rel=0.1)
    attention, ffn = model.encoder.attention, model.encoder.ffn
    for weight, fans in (
        *((part, 128 + 128) for part in attention.qkv.weight.chunk(3)),
        (attention.out.weight, 128 + 128),
        (ffn.experts.w1[3], 128 + 256),
        (ffn.router.weight, 128 + 4),
        (model.patch_embedding.weight, 16 * 2 + 16 * 128),
        (model.head.weight, 128 + 5),
    ):
        bound = math.sqrt(6 / fans)
        assert 0.95 * bound < weight.abs().max() <= bound
    for bias in (attention.qkv.bias, attention.out.bias, model.patch_embedding.bias, model.head.bias):
        assert not bias.any()
    for bias in (ffn.experts.b1, ffn.experts.b2):
        assert bias.std().item() == pytest.approx(1e-6, rel=0.2)
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize(
    ("options", "inside", "behind"),
    [({}, 0, 6), ({"authors": True}, 6, 3), ({"expert_dropout": 0.3}, 6, 6), ({"dense": True}, 0, 6)],
    ids=["default", "authors", "expert-dropout", "dense"],
)
def test_where_dropout_sits(options: dict, inside: int, behind: int) -> None:
    """On the embedding, behind attention and experts; the authors have it inside the experts instead."""
    model = tiny(**options)
    called: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.register_forward_hook(lambda module, *_: called.append(module))
    model(samples()[0])
    expert_dropout = None if "dense" in options else model.encoder.ffn.experts.dropout
    assert called[0] is model.dropout
    assert sum(module is expert_dropout for module in called) == inside
    assert len(called) == 1 + inside + behind
    if expert_dropout is not None and inside:
        assert expert_dropout.p == options.get("expert_dropout", 0.1)


# What it computes


@pytest.mark.parametrize("authors", [False, True], ids=["default", "authors"])
@pytest.mark.parametrize("kernels", [None, "reference"], ids=["best", "reference"])
def test_loss_and_gradients_against_the_literal_model(authors: bool, kernels: str | None) -> None:
    options = {"capacity_factor": 0.9, "dropout": 0.0, "label_smoothing": 0.1, "aux_loss_weight": 0.5}
    model = away_from_the_start(tiny(**options, authors=authors, backend=kernels).double())
    images, labels = samples(dtype=torch.float64)
    literal = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}

    torch.manual_seed(7)
    output = model(images, labels)
    output.loss.backward()
    torch.manual_seed(7)
    loss, logits, dropped = literal_loss(literal, model.config, images, labels)
    loss.backward()

    assert dropped > 0.05
    shares = torch.stack([aux.dropped_share for aux in output.routing])
    assert shares.mean().item() == pytest.approx(dropped, abs=1e-6)
    torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.logits, logits, rtol=1e-10, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, literal[name].grad, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_loss_is_cross_entropy_plus_weighted_sum_of_the_balance_losses() -> None:
    model = tiny(aux_loss_weight=0.25).eval()
    images, labels = samples()
    output = model(images, labels)
    assert len(output.routing) == 3
    assert torch.equal(output.aux_loss, sum(aux.balance_loss for aux in output.routing))
    assert output.aux_loss > 2.5  # about 1 a depth, not averaged
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels) + output.aux_loss / 4)
    assert model(images).loss is None


def test_labels_may_be_probabilities() -> None:
    model = tiny(label_smoothing=0.1).eval()
    images, labels = samples()
    mixed = nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(model(images, mixed).loss, model(images, labels).loss)


def test_representation_layer_can_be_left_out() -> None:
    model = tiny(representation=False).eval()
    images, _ = samples()
    encoded = model.encoder(
        nn.functional.pad(model.patch_embedding(images).flatten(2).mT, (0, 0, 1, 0)) + model.position_embedding
    )[0]
    torch.testing.assert_close(model(images).logits, model.head(encoded.mean(dim=1)))


def test_fully_dropped_token_passes_through_the_residual_only() -> None:
    model = tiny(capacity_factor=0.0, k=1, **STILL)  # room for one row an expert, the least there is
    block, ffn, attention = model.encoder.blocks[0], model.encoder.ffn, model.encoder.attention
    with torch.no_grad():
        attention.out.weight.zero_()
    x = torch.randn(1, 10, 12, requires_grad=True)
    y, aux = block(x, attention, ffn)
    _, plan, _ = ffn.router(block.ffn_norm(x)[0], ffn.capacity(10))
    dropped = (plan.choice_row < 0).all(dim=1)
    assert dropped.sum() == 10 - aux.expert_count.sum() >= 6
    assert torch.equal(y[0, dropped], x[0, dropped])
    assert not torch.isclose(y[0, ~dropped], x[0, ~dropped]).all(dim=1).any()
    y[0, dropped].sum().backward()
    assert torch.equal(x.grad[0], dropped[:, None].float().expand(10, 12))
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in ffn.parameters())


def test_dense_network_has_nothing_to_route() -> None:
    images, labels = samples()
    output = tiny(dense=True).eval()(images, labels)
    assert output.routing == ()
    assert output.aux_loss == 0
    assert torch.equal(output.loss, nn.functional.cross_entropy(output.logits, labels))


# The authors' form


@pytest.mark.parametrize(
    ("tokens", "experts", "rows"),
    [(6304, 4, 3781), (6304, 16, 944), (10, 2, 10), (3, 8, 0), (1, 4, 0), (0, 4, 0)],
)
def test_authors_experts_serve_one_row_less(tokens: int, experts: int, rows: int) -> None:
    assert AuthorsMoELayer(4, 4, experts).capacity(tokens) == rows


def test_authors_capacity_in_evaluation_and_without_one() -> None:
    layer = AuthorsMoELayer(4, 4, 4, eval_capacity_factor=1.0)
    assert (layer.capacity(100), layer.eval().capacity(100)) == (59, 49)
    assert AuthorsMoELayer(4, 4, 4, capacity_factor=None).capacity(100) is None


def test_authors_form_of_the_layer() -> None:
    layer = tiny(authors=True).encoder.ffn
    assert type(layer) is AuthorsMoELayer
    assert (layer.priority, layer.experts.activation, layer.experts.output_activation) == (
        "token",
        "gelu_tanh",
        "gelu_tanh",
    )
    assert layer.router.noise_std == 1 / 4
    plain = tiny().encoder.ffn
    assert type(plain) is MoELayer
    assert (plain.priority, plain.experts.activation, plain.experts.output_activation) == ("choice", "gelu", None)


# How it behaves


@pytest.mark.parametrize("options", [{}, {"authors": True}, {"dense": True}], ids=["default", "authors", "dense"])
def test_overfits_a_handful_of_samples(options: dict) -> None:
    images, labels = samples()
    output = overfit(tiny(**options, dropout=0.0, num_layers=2), (images,), labels=labels)
    assert output.loss - 0.01 * output.aux_loss < 0.1
    assert torch.equal(output.logits.argmax(dim=1), labels)


def test_same_seed_same_bits() -> None:
    model = tiny()
    images, labels = samples()

    def gradients(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        model.zero_grad()
        model(images, labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    first = gradients(3)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(3), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, gradients(4), strict=True))
    model.eval()
    assert torch.equal(model(images).logits, model(images).logits)


def test_autocast_bf16() -> None:
    model = tiny(**STILL)
    images, labels = samples()
    full = model(images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, labels)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == output.aux_loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, full.loss, rtol=0.02, atol=0)
    in_fp32 = nn.functional.cross_entropy(output.logits.float(), labels) + 0.01 * output.aux_loss
    torch.testing.assert_close(output.loss, in_fp32, rtol=1e-6, atol=0)
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "compiler"),
    [({}, "aot_eager"), ({"authors": True}, "aot_eager"), ({"num_layers": 1}, "inductor")],
    ids=["aot_eager", "authors-aot_eager", "inductor"],
)
def test_compiles_as_one_graph(options: dict, compiler: str) -> None:
    model = tiny(**STILL | options)
    images, labels = samples()
    model(images, labels).loss.backward()
    eager = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    counter = CompileCounterWithBackend(compiler)
    output = torch.compile(model, fullgraph=True, backend=counter)(images, labels)
    output.loss.backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(output.loss, model(images, labels).loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, eager[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("authors", [False, True], ids=["default", "authors"])
def test_compiles_to_two_graphs_for_every_batch_size(authors: bool) -> None:
    model = tiny(**STILL, num_layers=1, authors=authors)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    images, labels = samples(11)
    for size in (3, 5, 7, 8, 11):
        loss = compiled(images[:size], labels[:size]).loss
        torch.testing.assert_close(loss, model(images[:size], labels[:size]).loss)
        loss.backward()
    assert counter.frame_count <= 2


# What it refuses


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected an int of at least 1, got 0"),
        ({"ffn_size": 8.0}, "ffn_size: expected an int of at least 1, got 8.0"),
        ({"image_size": 225}, "patch_size: expected a divisor of image_size 225, got 16"),
        ({"num_heads": 5}, "num_heads: expected a divisor of hidden_size 768, got 5"),
        ({"k": 5}, "k: expected 1 to 4, the number of experts, got 5"),
        ({"priority": "first"}, "priority: expected 'choice' or 'token' or 'score', got 'first'"),
        ({"capacity_factor": -1.0}, "capacity_factor: expected a finite number >= 0, got -1.0"),
        ({"eval_capacity_factor": math.inf}, "eval_capacity_factor: expected a finite number >= 0, got inf"),
        ({"noise_std": math.nan}, "noise_std: expected a finite number >= 0, got nan"),
        ({"aux_loss_weight": -0.1}, "aux_loss_weight: expected a finite number >= 0, got -0.1"),
        ({"dropout": 1.0}, "dropout: expected at least 0 and below 1, got 1.0"),
        ({"expert_dropout": -0.1}, "expert_dropout: expected at least 0 and below 1, got -0.1"),
        ({"label_smoothing": 2}, "label_smoothing: expected at least 0 and below 1, got 2"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps: expected a finite number above 0, got 0.0"),
        ({"authors": True, "dense": True}, "authors: expected False with dense=True"),
    ],
)
def test_config_says_what_is_wrong(override: dict, message: str) -> None:
    with pytest.raises(ValueError, match="WideNetConfig: ") as caught:
        WideNetConfig.base(**override)
    assert message in str(caught.value)


def test_presets_take_overrides_and_only_known_ones() -> None:
    assert WideNetConfig.huge(num_layers=3, hidden_size=64).num_layers == 3
    with pytest.raises(TypeError, match="depth"):
        WideNetConfig.large(depth=3)


@pytest.mark.parametrize("shape", [(2, 8, 8), (6, 3, 8, 8), (6, 2, 8, 12)])
def test_images_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pixel_values: expected .* = \[any, 2, 8, 8\], got \[" + str(shape[0])):
        tiny()(torch.zeros(shape))
