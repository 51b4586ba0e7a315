"""Models as folders: what is written, that it comes back bit for bit, and what is refused."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_text import KINDS
from tiny import BASELINES, TEXT_BASELINES, away_from_the_start, samples, texts, tiny, tiny_text
from torch import nn

from widenet_kernels.models import WideNetForImageClassification, WideNetForMaskedLM, WideNetTextModel

safetensors_torch = pytest.importorskip("safetensors.torch")

MODELS = {
    "widenet": lambda: tiny(),
    **{name: lambda options=options: tiny(**options) for name, options in BASELINES.items()},
    "authors": lambda: tiny(authors=True, representation=False, eval_capacity_factor=2.0),
    "text": lambda: tiny_text(WideNetTextModel),
    "text-without-pooler": lambda: WideNetTextModel(tiny_text(WideNetTextModel).config, pooler=False),
    **{kind.__name__: lambda kind=kind: tiny_text(kind) for kind in KINDS},
    **{
        f"text-{name}": lambda options=options: tiny_text(KINDS[0], **options)
        for name, options in TEXT_BASELINES.items()
    },
}


def logits(model: nn.Module) -> torch.Tensor:
    """The first of what the model returns that is not a loss."""
    output = model(samples()[0]) if isinstance(model, WideNetForImageClassification) else model(*texts())
    return output[0] if isinstance(model, WideNetTextModel) else output[1]


def changed(folder: Path, **changes: Any) -> None:
    """Fields of the config set to these values; None: left out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a tiny WideNet in it."""
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# What comes back


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_round_trip_to_the_bit(make: Any, tmp_path: Path) -> None:
    model = away_from_the_start(make()).eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert not loaded.training
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in state.values()), "as torch's own, or products differ"
    assert torch.equal(logits(loaded), logits(model))


def test_every_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    model = tiny().bfloat16()
    model.encoder.ffn.router.float()
    model.head.double()
    model.save_pretrained(str(tmp_path))
    state = WideNetForImageClassification.from_pretrained(str(tmp_path)).state_dict()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


def test_transposed_parameters_are_stored_as_they_read(tmp_path: Path) -> None:
    model = tiny()
    model.head.weight = nn.Parameter(torch.randn(12, 5).t())
    model.save_pretrained(tmp_path)
    assert torch.equal(WideNetForImageClassification.from_pretrained(tmp_path).head.weight, model.head.weight)


def test_what_is_loaded_trains(folder: Path) -> None:
    model = WideNetForImageClassification.from_pretrained(folder).train()
    model(*samples()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_config_can_be_overridden(folder: Path) -> None:
    model = WideNetForImageClassification.from_pretrained(folder, capacity_factor=None, dropout=0.0)
    assert (model.config.capacity_factor, model.config.dropout) == (None, 0.0)
    assert model.encoder.ffn.capacity_factor is None


def test_saving_over_the_folder_it_came_from(folder: Path) -> None:
    model = WideNetForImageClassification.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder)
    tiny(seed=1).save_pretrained(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


# What is written


def test_files_are_those_of_the_layout(tmp_path: Path) -> None:
    model = tiny_text(WideNetForMaskedLM)
    model.save_pretrained(tmp_path / "new" / "folder")
    written = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert written["architectures"] == ["WideNetForMaskedLM"]
    assert written["model_type"] == "widenet_text"
    assert written["hidden_size"] == 12
    assert written["eval_capacity_factor"] is None
    path = tmp_path / "new" / "folder" / "model.safetensors"
    with safetensors_torch.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = safetensors_torch.load_file(path)
    assert tensors.keys() == {name for name, _ in model.named_parameters()}
    # the word embedding, which is the decoder too, and the experts of every block: once
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in model.parameters())
    other = tiny_text(WideNetForMaskedLM, seed=1)
    other.load_state_dict(tensors)
    assert torch.equal(logits(other.eval()), logits(model.eval()))


def test_several_files_under_an_index(folder: Path) -> None:
    tensors = safetensors_torch.load_file(folder / "model.safetensors")
    weight_map = {}
    for number, name in enumerate(tensors):
        weight_map[name] = f"model-{number % 3 + 1:05}-of-00003.safetensors"
    for file in set(weight_map.values()):
        safetensors_torch.save_file(
            {name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file
        )
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(logits(WideNetForImageClassification.from_pretrained(folder)), logits(tiny().eval()))
    os.unlink(folder / "model-00002-of-00003.safetensors")
    with pytest.raises(FileNotFoundError, match=r"expected model-00002-of-00003.safetensors in it, which"):
        WideNetForImageClassification.from_pretrained(folder)


def test_what_transformers_adds_to_a_config_decides_nothing(folder: Path) -> None:
    changed(folder, transformers_version="5.0.0", dtype="float32", id2label={"0": "a"}, problem_type=None)
    assert torch.equal(logits(WideNetForImageClassification.from_pretrained(folder)), logits(tiny().eval()))


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "model_type in config.json: expected 'widenet', got 'vit'"),
        ({"model_type": None}, "model_type in config.json: expected 'widenet', got None"),
        ({"architectures": ["Other"]}, "architectures in config.json: expected .'WideNetForImage.*'., got .'Other'."),
        ({"depth": 3, "width": 4}, "config: expected fields of WideNetConfig, got 'depth', 'width'"),
        ({"num_heads": 5}, "WideNetConfig: num_heads: expected a divisor of hidden_size 12, got 5"),
        ({"num_classes": 6}, r"head.bias: expected \[6\], got \[5\]"),
        (
            {"representation": False},
            "tensors: expected those of the model, got 'representation.bias', 'representation.weight' too",
        ),
        (
            {"share_blocks": False},
            "tensors: expected 'encoder.attention.0.out.bias', .* and 23 more, got none of that name",
        ),
    ],
    ids=["type", "no-type", "class", "fields", "value", "shape", "unexpected", "missing"],
)
def test_says_what_does_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    changed(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        WideNetForImageClassification.from_pretrained(folder)
    assert str(caught.value).startswith(("WideNetForImageClassification.from_pretrained: ", "WideNetConfig: "))


def test_another_class_and_unknown_overrides(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"WideNetTextModel.from_pretrained: model_type in config.json: expected"):
        WideNetTextModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="config: expected fields of WideNetConfig, got 'depth'"):
        WideNetForImageClassification.from_pretrained(folder, depth=3)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"folder: expected a local one with config.json, got {tmp_path}"):
        WideNetForImageClassification.from_pretrained(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"folder: expected model.safetensors or model.safetensors.index.json"):
        WideNetForImageClassification.from_pretrained(folder)


def test_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.torch")
    for call in (tiny().save_pretrained, WideNetForImageClassification.from_pretrained):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'widenet-kernels\[pretrained\]'"):
            call(folder)
