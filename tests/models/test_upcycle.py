"""Networks of experts made from dense ones of transformers, small and random: near them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import away_from_the_start, masked_words, samples, texts
from torch import Tensor, nn

from widenet_kernels.models import (
    WideNetForImageClassification,
    WideNetForMaskedLM,
    WideNetForQuestionAnswering,
    WideNetForSequenceClassification,
    WideNetTextModel,
    upcycle_albert,
    upcycle_vit,
)
from widenet_kernels.models.block import DenseFFN

transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("safetensors")

SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
VIT = SIZES | {"image_size": 8, "patch_size": 4, "num_channels": 2, "num_labels": 5}
ALBERT = SIZES | {"vocab_size": 23, "embedding_size": 6, "max_position_embeddings": 9}
OUTPUTS = {  # of ours, and of theirs
    "AlbertModel": {"hidden": "last_hidden_state", "pooled": "pooler_output"},
    "AlbertForPreTraining": {"logits": "prediction_logits", "sentence_order_logits": "sop_logits"},
    "AlbertForMaskedLM": {"logits": "logits"},
    "AlbertForSequenceClassification": {"logits": "logits"},
    "AlbertForQuestionAnswering": {"start_logits": "start_logits", "end_logits": "end_logits"},
}
DTYPES = [pytest.param(torch.float64, 1e-10, id="fp64"), pytest.param(torch.float32, 1e-5, id="fp32")]


def vit(kind: str = "ViTForImageClassification", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.ViTConfig(**VIT | options))
    return away_from_the_start(model.double()).eval()


def albert(kind: str = "AlbertForPreTraining", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    labels = {"num_labels": 3} if kind.endswith("Classification") else {}
    model = getattr(transformers, kind)(transformers.AlbertConfig(**ALBERT | labels | options))
    return away_from_the_start(model.double()).eval()


def images() -> Tensor:
    return samples(dtype=torch.float64)[0]


def given(dense: nn.Module, as_folder: bool, folder: Path) -> nn.Module | Path:
    if not as_folder:
        return dense
    dense.save_pretrained(folder)
    return folder


def near(ours: Tensor, theirs: Tensor) -> float:
    """The root of the mean square of what they differ by, of that of theirs."""
    return ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()


# What it computes


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("as_folder", [False, True], ids=["model", "folder"])
def test_vit_computes_what_the_dense_one_did(
    dtype: torch.dtype, tolerance: float, as_folder: bool, tmp_path: Path
) -> None:
    dense = vit(layer_norm_eps=1e-3).to(dtype)
    model = upcycle_vit(given(dense, as_folder, tmp_path), num_experts=3)
    assert isinstance(model, WideNetForImageClassification)
    assert not model.training
    config = model.config
    assert (config.num_experts, config.normalize, config.capacity_factor, config.share_blocks) == (3, True, None, False)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    x = images().to(dtype)
    output = model(x)
    assert len(output.routing) == 3
    torch.testing.assert_close(output.logits, dense(x).logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("as_folder", [False, True], ids=["model", "folder"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_albert_computes_what_the_dense_one_did(
    kind: str, dtype: torch.dtype, tolerance: float, as_folder: bool, tmp_path: Path
) -> None:
    dense = albert(kind, layer_norm_eps=1e-3).to(dtype)
    model = upcycle_albert(given(dense, as_folder, tmp_path), num_experts=3)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    batch = texts()
    output, expected = model(*batch), dense(**batch._asdict())
    for ours, theirs in OUTPUTS[kind].items():
        got, want = getattr(output, ours), expected[theirs]
        if got.shape[:2] == batch.attention_mask.shape:  # at padding they may differ
            got, want = got[batch.attention_mask == 1], want[batch.attention_mask == 1]
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish"])
def test_activations(activation: str) -> None:
    dense = albert("AlbertForMaskedLM", hidden_act=activation)
    batch = texts(lengths=(7, 7))
    logits = upcycle_albert(dense)(*batch).logits
    torch.testing.assert_close(logits, dense(**batch._asdict()).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"moe_layers": 2},
        {"dense": True},
        {"k": 3, "num_experts": 4},
        {"k": 1},
        {"k": 4, "num_experts": 4, "normalize": False},  # all probabilities: their sum is 1 too
    ],
    ids=str,
)
def test_vit_with_other_experts(options: dict[str, Any]) -> None:
    dense = vit()
    model = upcycle_vit(dense, **options)
    if "moe_layers" in options or "dense" in options:
        assert isinstance(model.encoder.ffn[0], DenseFFN)
    torch.testing.assert_close(model(images()).logits, dense(images()).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{"share_norms": True}, {"share_blocks": False}, {"routing_groups": 1}], ids=str)
def test_albert_with_other_sharing(options: dict[str, Any]) -> None:
    dense = albert()
    batch = texts(lengths=(7, 7))
    logits = upcycle_albert(dense, **options)(*batch).logits
    torch.testing.assert_close(logits, dense(**batch._asdict()).prediction_logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("experts", "k"), [(4, 2), (8, 2), (4, 1), (16, 2)])
def test_near_the_dense_one_without_normalizing(experts: int, k: int) -> None:
    """What the sum of a token's gate weights misses k/E by, its experts' output is off: some percent at most.

    The logits are off by up to 0.06 % (ALBERT's initial router is N(0, 0.02^2)) and 3 % (ViT's is Glorot-uniform).
    """
    dense, batch = albert(), texts(lengths=(7, 7))
    model = upcycle_albert(dense, num_experts=experts, k=k, normalize=False)
    gates: list[Tensor] = []
    model.model.encoder.ffn.router.register_forward_hook(lambda _, __, output: gates.append(output[0].weight))
    assert near(model(*batch).logits, dense(**batch._asdict()).prediction_logits) < 0.01
    sums = torch.cat(gates).sum(dim=1) * experts / k
    assert (sums >= 1).all()  # the k largest are at least their share
    assert (sums < 1.03).all()
    vision = upcycle_vit(vit(), num_experts=experts, k=k, normalize=False)
    assert near(vision(images()).logits, vit()(images()).logits) < 0.05


# What it is made of


def test_every_expert_is_a_copy() -> None:
    dense = vit()
    model = upcycle_vit(dense, num_experts=3)
    for ffn, layer in zip(model.encoder.ffn, dense.vit.layers, strict=True):
        assert not torch.equal(ffn.router.weight[0], ffn.router.weight[1])
        for expert in range(3):
            assert torch.equal(ffn.experts.w1[expert], layer.mlp.fc1.weight.t())
            assert torch.equal(ffn.experts.b1[expert], layer.mlp.fc1.bias)
            assert torch.equal(ffn.experts.w2[expert], layer.mlp.fc2.weight.t())
            assert torch.equal(ffn.experts.b2[expert], layer.mlp.fc2.bias)
    scaled = upcycle_vit(dense, num_experts=3, k=2, normalize=False)
    for ffn, layer in zip(scaled.encoder.ffn, dense.vit.layers, strict=True):
        assert torch.equal(ffn.experts.w1[0], layer.mlp.fc1.weight.t())
        torch.testing.assert_close(ffn.experts.w2[2], layer.mlp.fc2.weight.t() * 1.5)
        torch.testing.assert_close(ffn.experts.b2[2], layer.mlp.fc2.bias * 1.5)
        assert ffn.router.weight.abs().max() < 0.01  # of at most (6 / 15)^(1/2)


def test_dropouts_are_the_checkpoints_unless_told_otherwise() -> None:
    dense = vit(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
    config = upcycle_vit(dense).config
    assert (config.dropout, config.attention_dropout) == (0.2, 0.3)
    assert upcycle_vit(dense, dropout=0.0, capacity_factor=1.2).config.capacity_factor == 1.2
    classes = albert("AlbertForSequenceClassification", hidden_dropout_prob=0.2, classifier_dropout_prob=0.4)
    assert upcycle_albert(classes).dropout.p == 0.2


def test_a_body_without_a_classifier_gets_a_new_one() -> None:
    dense = vit("ViTModel")
    model = upcycle_vit(dense, num_classes=7)
    assert model.head.out_features == 7
    encoded = []
    model.head.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0]))
    model(images())
    torch.testing.assert_close(encoded[0], dense(images()).last_hidden_state[:, 0], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="upcycle_vit: num_classes: expected one, for ViTModel has no classifier"):
        upcycle_vit(dense)


def test_heads_of_another_kind_or_size_start_anew() -> None:
    dense = albert("AlbertForMaskedLM")
    for kind in (WideNetTextModel, WideNetForSequenceClassification, WideNetForQuestionAnswering):
        assert type(upcycle_albert(dense, kind)) is kind
    assert upcycle_albert(dense, WideNetForSequenceClassification, num_labels=4).head.out_features == 4
    assert upcycle_albert(dense, WideNetTextModel).pooler is None
    assert upcycle_albert(albert("AlbertModel")).pooler is not None
    classes = albert("AlbertForSequenceClassification")
    assert torch.equal(upcycle_albert(classes).head.weight, classes.classifier.weight)
    assert upcycle_albert(classes, num_labels=4).head.out_features == 4
    assert upcycle_vit(vit(), num_classes=6).head.out_features == 6
    words = albert("AlbertForTokenClassification")
    fresh = upcycle_albert(words, WideNetForSequenceClassification, num_labels=3)
    assert not torch.equal(fresh.head.weight, words.classifier.weight)


def test_experts_grow_apart_in_training() -> None:
    model = upcycle_albert(albert(), num_experts=3).train()
    before = model.model.encoder.ffn.router.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = texts()
    words, orders = masked_words(batch)
    model(*batch, labels=words, sentence_order_labels=orders).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    experts = model.model.encoder.ffn.experts
    for weight in (experts.w1, experts.b1, experts.w2, experts.b2):
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert not torch.equal(weight[one], weight[other])
    assert not torch.equal(model.model.encoder.ffn.router.weight, before)


def test_upcycled_models_save_and_load(tmp_path: Path) -> None:
    model = upcycle_albert(albert())
    model.save_pretrained(tmp_path)
    loaded = WideNetForMaskedLM.from_pretrained(tmp_path)
    assert loaded.config.activation == "gelu_tanh"
    assert torch.equal(loaded(*texts()).logits, model(*texts()).logits)


# What is refused


@pytest.mark.parametrize(
    ("options", "overrides", "message"),
    [
        ({"num_hidden_groups": 3}, {}, "upcycle_albert: num_hidden_groups: expected 1, got 3"),
        ({"inner_group_num": 2}, {}, "upcycle_albert: inner_group_num: expected 1, got 2"),
        ({"hidden_act": "tanh"}, {}, "upcycle_albert: hidden_act: expected one of gelu, .*, got 'tanh'"),
        ({}, {"num_heads": 3}, "upcycle_albert: num_heads: expected 2, the source's, got 3"),
        ({}, {"authors": True}, "upcycle_albert: authors: expected False, the source's, got True"),
        ({}, {"k": 5}, "WideNetTextConfig: k: expected 1 to 4"),
    ],
    ids=["groups", "inner", "activation", "heads", "authors", "k"],
)
def test_says_what_does_not_fit(options: dict[str, Any], overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle_albert(albert(**options), **overrides)


def test_another_kind_of_checkpoint() -> None:
    with pytest.raises(ValueError, match="upcycle_vit: source: expected one of model_type 'vit', got 'albert'"):
        upcycle_vit(albert())
    for other in (nn.Linear(2, 2), upcycle_vit(vit())):
        with pytest.raises(ValueError, match="upcycle_vit: source: expected one of model_type 'vit', got None"):
            upcycle_vit(other)
    with pytest.raises(
        ValueError, match=r"kind: expected one of WideNetTextModel, .* for AlbertForTokenClassification"
    ):
        upcycle_albert(albert("AlbertForTokenClassification"))
    with pytest.raises(ValueError, match=r"kind: expected one of WideNetTextModel, .* got .*WideNetForImage"):
        upcycle_albert(albert(), WideNetForImageClassification)
    untied = albert("AlbertForMaskedLM", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"predictions.decoder.weight: expected the word embedding, got another"):
        upcycle_albert(untied)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        (
            {"num_hidden_layers": 4},
            "expected 'encoder.layer.3.attention.attention.query.weight', got none of that name",
        ),
        ({"num_hidden_layers": 2}, r"expected those of its config, got 'encoder.layer.2.att.* and 12 more too"),
        ({"intermediate_size": 21}, r"encoder.ffn.0.experts.w1: expected \[4, 12, 21\], got \[4, 12, 20\]"),
        ({"image_size": 12}, r"position_embedding: expected \[10, 12\], got \[5, 12\]"),
    ):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=f"upcycle_vit: .*{message}"):
            upcycle_vit(tmp_path)
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "hidden_act"}))
    with pytest.raises(ValueError, match="upcycle_vit: config of the source: expected a field 'hidden_act', got none"):
        upcycle_vit(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"upcycle_albert: folder: expected a local one with config.json"):
        upcycle_albert(tmp_path / "nothing")
