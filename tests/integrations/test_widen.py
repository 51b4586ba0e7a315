"""widen: what becomes of a dense model, for each architecture; torch's fast path, sharing, and what is kept."""

import copy
from typing import Any

import pytest
import torch
from dense_models import FFN, LENGTHS, D, E, batch, demands, dense, layers_of, logits, padding, random, widened
from torch import nn

from widenet_kernels.integrations import moe_losses, widen
from widenet_kernels.testing.numerics import assert_float64

NAMES = {
    "encoder": {f"encoder.layers.{depth}": "TransformerEncoderLayer" for depth in range(3)},
    "vit": {f"vit.layers.{depth}.mlp": "ViTMLP" for depth in range(3)},
    "bert": {f"bert.encoder.layer.{depth}": "BertLayer" for depth in range(3)},
    "llama": {f"model.layers.{depth}.mlp": "LlamaMLP" for depth in range(3)},
}


# What it computes


def test_computes_what_the_dense_model_did(kind: str) -> None:
    model, before = dense(kind), dense(kind)
    report = widen(model, E)
    assert report.widened == NAMES[kind]
    assert len(layers_of(model)) == 3
    given = batch(kind)
    assert_float64(logits(model(**given)), logits(before(**given)))


@pytest.mark.parametrize("options", [{"k": 1}, {"k": 4}, {"capacity_factor": 8.0}, {"num_experts": 1, "k": 1}], ids=str)
def test_with_other_options(options: dict[str, Any]) -> None:
    model, before = dense("encoder"), dense("encoder")
    widen(model, **{"num_experts": E, **options})
    assert layers_of(model)[0].router.k == options.get("k", 2)
    given = batch("encoder")
    assert_float64(logits(model(**given)), logits(before(**given)))


def test_parameters_by_hand(kind: str) -> None:
    model = dense(kind)
    dense_total = sum(parameter.numel() for parameter in model.parameters())
    biases = 0 if kind == "llama" else FFN + D
    weights = (3 if kind == "llama" else 2) * D * FFN
    report = widen(model, E)
    assert report.total_before == report.trainable_before == dense_total
    expected = dense_total + 3 * ((E - 1) * (weights + biases) + E * D)  # three routers without a bias
    assert report.total_after == report.trainable_after == expected
    assert expected == sum(parameter.numel() for parameter in model.parameters())
    text = str(report)
    assert text.startswith("4 experts in each of 3 places:")
    assert f"{dense_total:,} before, {expected:,} after" in text
    assert all(f"{name} ({what})" in text for name, what in NAMES[kind].items())
    assert ("add moe_losses(model)" in text) == (kind == "encoder")


def test_every_expert_learns(kind: str) -> None:
    model = dense(kind).train()
    widen(model, E, noise_std=0.0)
    before = copy.deepcopy(model.state_dict())
    given = batch(kind)
    loss = model(**given).square().mean() + moe_losses(model) if kind == "encoder" else model(**given).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    for name, parameter in model.named_parameters():
        if ".experts." in name or ".router." in name:
            assert not torch.equal(parameter, before[name]), name
    assert not torch.equal(layers_of(model)[0].experts.w1[0], layers_of(model)[0].experts.w1[1])


# torch's encoder, whose fast path calls neither layer


@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"batch_first": False}, {"activation": "gelu"}], ids=str)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_no_fast_path_goes_past_the_experts(context: Any, options: dict[str, Any], masked: bool) -> None:
    """Zero experts must be seen: then the second half of each block adds nothing. First of all without hooks of the
    test's own, for a layer with hooks takes no fast path."""
    model, before = dense("encoder", **options), dense("encoder", **options)
    widen(model, E)
    x, pad = random(3, 7, D), padding() if masked else None
    valid = ~padding() if masked else torch.ones(3, 7, dtype=torch.bool)
    if not options.get("batch_first", True):
        x, valid = x.transpose(0, 1), valid.t()
    with context():
        assert_float64(model(x, pad)[valid], before(x, pad)[valid])
        asked = demands(model)
        model(x, pad)
        assert asked == [2 * int(valid.sum())] * 3
        for layer in layers_of(model):
            layer.experts.w2.zero_()
            layer.experts.b2.zero_()
        for layer in before.encoder.layers:
            layer.linear2.weight.zero_()
            layer.linear2.bias.zero_()
        assert_float64(model(x, pad)[valid], before(x, pad)[valid])


def test_an_encoder_widened_in_part() -> None:
    """Its first layer, which decides over nested tensors, is dense still."""
    model, before = dense("encoder"), dense("encoder")
    report = widen(model, E, blocks=[-1])
    assert list(report.widened) == ["encoder.layers.2"]
    with torch.no_grad():
        given = batch("encoder")
        assert_float64(logits(model(**given)), logits(before(**given)))
    assert list(widen(model, E).widened) == ["encoder.layers.0", "encoder.layers.1"]  # what is left
    with torch.no_grad():
        assert_float64(logits(model(**given)), logits(before(**given)))
    with pytest.raises(
        ValueError, match=r"^widen: model: expected torch.nn.TransformerEncoderLayer or .* got a Encoder"
    ):
        widen(model, E)


def test_an_encoder_made_of_a_widened_layer() -> None:
    """It copies the layer, and with it what collects its losses; neither it nor the copies take a fast path."""
    layer = dense("encoder").encoder.layers[0]
    before = nn.TransformerEncoder(layer, 2).eval()
    widen(layer, E)
    with pytest.warns(UserWarning, match="activation_relu_or_gelu was not True"):
        model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        x, pad = random(3, 7, D), padding()
        assert_float64(model(x, src_key_padding_mask=pad)[~pad], before(x, src_key_padding_mask=pad)[~pad])
    terms = [moe_losses(copied) for copied in model.layers]
    assert_float64(moe_losses(model), terms[0] + terms[1])


def test_a_mask_of_numbers_and_one_text_alone() -> None:
    model = dense("encoder")
    widen(model, E)
    asked = demands(model)
    given = batch("encoder")
    numbers = torch.zeros(3, 7, dtype=torch.float64).masked_fill(padding(), -torch.inf)
    assert_float64(model(given["x"], numbers)[~padding()], model(**given)[~padding()])
    layer = model.encoder.layers[0]
    layer(given["x"][1], src_key_padding_mask=padding()[1])
    assert asked == [2 * sum(LENGTHS)] * 6 + [2 * LENGTHS[1]]


def test_dropout_stands_behind_the_experts() -> None:
    model = dense("encoder", dropout=0.5).train()
    widen(model, E, noise_std=0.0)
    layer = model.encoder.layers[0]
    assert layer.dropout2.p == 0.5
    x = random(3, 7, D)
    wide = layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))
    assert_float64(wide, layer.linear1.layer(x)[0])  # none between


# One set for all blocks


def test_shared_experts_are_copies_of_the_first(kind: str) -> None:
    model, before = dense(kind), dense(kind)
    total = sum(parameter.numel() for parameter in model.parameters())
    first = copy.deepcopy(model)
    widen(first, E, blocks=[0])
    report = widen(model, E, share=True)
    layers = layers_of(model)
    assert layers[0] is layers[1] is layers[2]
    for name, parameter in layers_of(first)[0].experts.named_parameters():
        assert torch.equal(parameter, layers[0].experts.get_parameter(name))
    biases = 0 if kind == "llama" else FFN + D
    weights = (3 if kind == "llama" else 2) * D * FFN
    assert str(report).startswith("4 experts for all of 3 places:")
    assert report.total_after == total + (E - 3) * (weights + biases) + E * D
    keys = [name for name in model.state_dict() if name.endswith("router.weight")]
    assert len(keys) == 1
    if kind != "encoder":
        return
    same = [before.encoder.layers[0].linear1, before.encoder.layers[0].linear2]
    for block in before.encoder.layers:
        block.linear1, block.linear2 = same
    given = batch(kind)
    assert_float64(logits(model(**given)), logits(before(**given)))


def test_networks_that_differ_share_no_experts() -> None:
    model = nn.ModuleList([nn.Sequential(nn.Linear(D, width), nn.GELU(), nn.Linear(width, D)) for width in (FFN, 24)])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"^widen: share: expected .* like the first, \(12, 20, .*got \(12, 24, .* at 1"
    ):
        widen(model, E, modules=["0", "1"], share=True)
    assert model.state_dict().keys() == before.keys()
    assert not model._forward_hooks


def test_shared_experts_save_once(tmp_path: Any) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    safetensors = pytest.importorskip("safetensors.torch")
    model = dense("bert")
    widen(model, E, share=True)
    model.save_pretrained(tmp_path)
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    again = dense("bert")
    widen(again, E, share=True, upcycle=False, capacity_factor=None, normalize=True)
    missing = again.load_state_dict(saved, strict=False)
    assert not missing.unexpected_keys
    assert all("decoder" in name for name in missing.missing_keys)  # tied in the dense model
    given = batch("bert")
    assert torch.equal(again(**given).logits, model(**given).logits)


# New weights, and what is kept


def test_new_weights() -> None:
    model = dense("encoder")
    widen(model, E, upcycle=False, k=3)
    layer = layers_of(model)[0]
    assert (layer.router.k, layer.capacity_factor, layer.router.normalize) == (3, 1.2, False)  # a new layer's defaults
    assert not torch.equal(layer.experts.w1[0], layer.experts.w1[1])
    assert (layer.experts.ffn_dim, layer.experts.activation) == (FFN, "relu")
    assert model(**batch("encoder")).isfinite().all()


def test_dtype_mode_and_what_is_frozen_stay() -> None:
    model = dense("encoder").bfloat16()
    frozen, first, mixed = model.encoder.layers
    frozen.train()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    mixed.linear1.bias.requires_grad_(False)
    state = torch.get_rng_state()
    report = widen(model, E)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert frozen.linear1.layer.experts.training
    assert not first.linear1.layer.experts.training
    assert not any(parameter.requires_grad for parameter in frozen.linear1.layer.experts.parameters())
    assert all(parameter.requires_grad for parameter in first.linear1.layer.parameters())
    trained = {name for name, p in mixed.linear1.layer.named_parameters() if p.requires_grad}
    assert trained == {"router.weight", "experts.w1", "experts.w2", "experts.b2"}
    assert report.trainable_after == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not torch.equal(state, torch.get_rng_state())  # the routers are drawn by torch's generator


def test_widening_is_reproducible() -> None:
    states = []
    for _ in range(2):
        model = dense("encoder")
        torch.manual_seed(5)
        widen(model, E)
        states.append(model.state_dict())
    assert all(torch.equal(one, states[1][name]) for name, one in states[0].items())


def test_a_model_without_memory_waits_for_a_state_dict() -> None:
    model = widened("encoder", share=True)
    with torch.device("meta"):
        other = dense("encoder")
        widen(other, E, share=True)
    assert {parameter.device.type for parameter in other.parameters()} == {"meta"}
    other.load_state_dict(model.state_dict(), assign=True)
    given = batch("encoder")
    assert torch.equal(other(**given), model(**given))
