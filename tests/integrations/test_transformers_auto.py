"""Our models by transformers' Auto classes: the same folders, bits and losses, and what a new head starts as."""

import copy
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from families import transformers
from torch import Tensor, nn

from widenet_kernels import models as ours
from widenet_kernels.integrations.transformers import register
from widenet_kernels.integrations.transformers.models import AUTO_CLASSES
from widenet_kernels.models.pretrained import OF_TRANSFORMERS
from widenet_kernels.testing.numerics import assert_same_bits

pytest.importorskip("safetensors")
register()

SIZES = {"hidden_size": 12, "ffn_size": 20, "num_layers": 3, "num_heads": 2, "num_experts": 3}
IMAGES = ours.WideNetConfig(**SIZES, image_size=8, patch_size=4, num_channels=2, num_classes=5)
TEXTS = ours.WideNetTextConfig(
    **SIZES, vocab_size=23, embedding_size=6, max_positions=9, num_labels=3, capacity_factor=None
)
LABELS = {  # of a batch of two images, or two texts of six words
    "WideNetForImageClassification": {"labels": torch.tensor([4, 1])},
    "WideNetTextModel": {},
    "WideNetForMaskedLM": {
        "labels": torch.randint(0, 23, (2, 6), generator=torch.Generator().manual_seed(1)),
        "sentence_order_labels": torch.tensor([0, 1]),
    },
    "WideNetForSequenceClassification": {"labels": torch.tensor([2, 0])},
    "WideNetForQuestionAnswering": {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([3, 2])},
}
AUTO = {theirs.__name__: auto for auto, theirs in AUTO_CLASSES.items()}
RENAMED = {"last_hidden_state": "hidden", "pooler_output": "pooled"}

kinds = pytest.mark.parametrize("kind", LABELS)


def make(kind: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    torch.manual_seed(0)
    model_class = getattr(ours, kind)
    config = IMAGES if kind == "WideNetForImageClassification" else TEXTS
    model = model_class(type(config)(**asdict(config) | overrides))
    with torch.no_grad():  # away from zeros and ones, which would hide a tensor that is not loaded
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def batch(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    if kind == "WideNetForImageClassification":
        return {"pixel_values": torch.randn(2, 2, 8, 8, generator=generator).to(dtype)}
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    return {"input_ids": mask * torch.randint(1, 23, (2, 6), generator=generator), "attention_mask": mask}


def assert_same_result(theirs: Any, own: Any) -> None:
    """Every field of transformers' output is the one of ours, to the bit."""
    assert isinstance(theirs, transformers.utils.ModelOutput)
    for name, value in theirs.items():
        assert_same_bits(value, getattr(own, RENAMED.get(name, name)), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@kinds
def test_loads_what_ours_wrote(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(kind, dtype)
    model.save_pretrained(tmp_path)
    loaded = AUTO[kind].from_pretrained(tmp_path)
    assert type(loaded).__name__ == kind
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert_same_bits(loaded.state_dict()[name], tensor, name)
    given = batch(kind, dtype)
    assert_same_result(loaded(**given, **LABELS[kind]), model(**given, **LABELS[kind]))
    if LABELS[kind]:
        assert loaded(**given).loss is None
    as_tuple = loaded(**given, return_dict=False)
    assert isinstance(as_tuple, tuple)


@kinds
def test_ours_loads_what_transformers_wrote(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    model.save_pretrained(tmp_path / "ours")
    loaded = AUTO[kind].from_pretrained(tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert asdict(model.config).items() <= written.items()
    back = type(model).from_pretrained(tmp_path / "theirs")
    assert back.config == model.config
    given = batch(kind)
    for one, two in zip(back(**given)[:2], model(**given)[:2], strict=True):
        assert (one is None and two is None) or torch.equal(one, two)
    again = AUTO[kind].from_pretrained(tmp_path / "theirs")
    assert_same_result(again(**given), model(**given))


@kinds
def test_gradients_reach_every_parameter_once(kind: str) -> None:
    model = make(kind)
    loaded = AUTO[kind].from_config(config_of(model)).eval()
    loaded.load_state_dict(model.state_dict())
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    for trained in (model, loaded):
        out = trained(**batch(kind), **LABELS[kind])
        (out.loss if LABELS[kind] else out[0].square().sum() + out[1].square().sum()).backward()
    for (name, one), two in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert_same_bits(two.grad, one.grad, name)


def config_of(model: nn.Module) -> Any:
    return transformers.AutoConfig.for_model(model.config.model_type, **asdict(model.config))


@kinds
def test_a_new_model_is_drawn_as_ours(kind: str) -> None:
    config = IMAGES if kind == "WideNetForImageClassification" else TEXTS
    torch.manual_seed(3)
    own = getattr(ours, kind)(config)
    torch.manual_seed(3)
    theirs = AUTO[kind].from_config(transformers.AutoConfig.for_model(config.model_type, **asdict(config)))
    for name, tensor in own.state_dict().items():
        assert_same_bits(theirs.state_dict()[name], tensor, name)


def test_what_takes_a_parts_place_takes_it_in_our_model_too() -> None:
    model = AUTO["WideNetForImageClassification"].from_config(config_of(make("WideNetForImageClassification")))
    for changed in (model, copy.deepcopy(model)):
        changed.head = nn.Linear(12, 2)
        assert changed.own.head is changed.head
        assert changed.eval()(**batch("WideNetForImageClassification")).logits.shape == (2, 2)
    assert {p.dtype for p in model.double().own.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in model.requires_grad_(False).own.parameters())


def test_a_new_head_on_a_pretrained_body(tmp_path: Path) -> None:
    """The body is what was loaded; the head is drawn as our own constructor draws it."""
    pretrained = make("WideNetForMaskedLM")
    pretrained.save_pretrained(tmp_path)
    body = pretrained.model.state_dict()
    model = AUTO["WideNetForSequenceClassification"].from_pretrained(tmp_path, num_labels=7)
    for name, tensor in model.own.model.state_dict().items():
        assert_same_bits(tensor, body[name], name)
    assert model.head.weight.shape == (7, 12)
    assert 0 < float(model.head.weight.detach().std()) < 0.03  # N(0, 0.02^2)
    assert not model.head.bias.any()
    alone = AUTO["WideNetTextModel"].from_pretrained(tmp_path)
    assert_same_result(alone(**batch("WideNetTextModel")), pretrained.model(**batch("WideNetTextModel")))


def test_another_number_of_classes_of_images(tmp_path: Path) -> None:
    pretrained = make("WideNetForImageClassification")
    pretrained.save_pretrained(tmp_path)
    model = AUTO["WideNetForImageClassification"].from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert (model.config.num_labels, model.config.num_classes, model.own.config.num_classes) == (2, 2, 2)
    assert model(**batch("WideNetForImageClassification")).logits.shape == (2, 2)
    assert_same_bits(model.encoder.ffn.experts.w1, pretrained.encoder.ffn.experts.w1)
    assert 0 < float(model.head.weight.detach().abs().max()) <= (6 / 14) ** 0.5  # Glorot-uniform


# The configs


@pytest.mark.parametrize("own", [IMAGES, TEXTS], ids=["images", "texts"])
def test_configs(own: ours.EncoderConfig, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(own.model_type, **asdict(own))
    assert config.own() == own
    assert (config.num_hidden_layers, config.num_attention_heads, config.intermediate_size) == (3, 2, 20)
    assert config.num_labels == len(config.id2label) == (5 if own is IMAGES else 3)
    config.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.own() == own
    assert loaded.id2label == config.id2label
    assert transformers.AutoConfig.for_model(own.model_type).own() == type(own)()
    renamed = transformers.AutoConfig.for_model(own.model_type, num_hidden_layers=7, id2label={0: "a", 1: "b", 2: "c"})
    assert renamed.own().num_layers == 7
    assert (renamed.num_labels, renamed.id2label[2]) == (3, "c")
    renamed.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).id2label == {0: "a", 1: "b", 2: "c"}
    with pytest.raises(ValueError, match="num_heads: expected a divisor of hidden_size"):
        transformers.AutoConfig.for_model(own.model_type, num_heads=5)


def test_ours_knows_every_field_of_transformers() -> None:
    theirs = {field.name for field in fields(transformers.PreTrainedConfig)} | {"output_attentions"}
    assert theirs - {"architectures"} <= OF_TRANSFORMERS


def test_registering_again_changes_nothing() -> None:
    before = {auto: auto._model_mapping[theirs.config_class] for auto, theirs in AUTO_CLASSES.items()}
    register()
    assert before == {auto: auto._model_mapping[theirs.config_class] for auto, theirs in AUTO_CLASSES.items()}
    assert before == AUTO_CLASSES
