"""Models as folders in the file layout of Hugging Face: ``config.json`` and ``model.safetensors``.

Nothing here reaches a network: a folder is a local one. The package safetensors is needed, transformers is not.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from widenet_kernels.models.config import EncoderConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NAMES_SHOWN = 4  # of tensors, in an error
OF_TRANSFORMERS = {  # fields that its save_pretrained adds to a config; none decides what a model of ours computes
    *("transformers_version", "dtype", "return_dict", "output_attentions", "output_hidden_states"),
    *("id2label", "label2id", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward"),
}

Folder = str | os.PathLike[str]
Model = TypeVar("Model", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """A model that is made from its config alone, with :meth:`save_pretrained` and :meth:`from_pretrained`."""

    config_class: ClassVar[type[EncoderConfig]]
    config: EncoderConfig

    def save_pretrained(self, folder: Folder) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into the folder, which is made where there is none.

        The config has every field, with ``model_type`` and ``architectures``. The tensors are those of the state dict,
        in their own dtypes; what blocks share, and the word embedding that is also the decoder, is stored once.

        Raises:
            ModuleNotFoundError: without the package safetensors.
        """
        save_file = safetensors_torch().save_file
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"architectures": [type(self).__name__], "model_type": self.config.model_type}
        (folder / CONFIG).write_text(json.dumps(about | asdict(self.config), indent=2) + "\n")
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls: type[Model], folder: Folder, **overrides: Any) -> Model:
        """The model that :meth:`save_pretrained` wrote, bit for bit, on the CPU and in evaluation mode.

        What transformers' ``save_pretrained`` wrote of the same model is read too.

        Args:
            folder: a local one; its tensors may lie in several files under a ``model.safetensors.index.json``.
            overrides: fields of the config to change, such as ``dropout``, ``capacity_factor`` or ``backend``.

        Raises:
            FileNotFoundError: for a file that is not there.
            ValueError: for another model's folder, unknown fields of the config, and tensors that are missing, too many
                or of another shape; naming what was expected and what came.
            ModuleNotFoundError: without the package safetensors.
        """
        owner = f"{cls.__name__}.from_pretrained"
        raw = read_config(folder, owner)
        for name, expected in (("model_type", cls.config_class.model_type), ("architectures", [cls.__name__])):
            if raw.get(name) != expected:
                raise ValueError(f"{owner}: {name} in {CONFIG}: expected {expected!r}, got {raw.get(name)!r}")
        known = {field.name for field in fields(cls.config_class)}
        beside = {"model_type", "architectures"} | OF_TRANSFORMERS
        given = {name: value for name, value in raw.items() if name not in beside} | overrides
        if unknown := given.keys() - known:
            raise ValueError(
                f"{owner}: config: expected fields of {cls.config_class.__name__}, got {listed(sorted(unknown))}"
            )
        tensors = read_tensors(folder, owner)
        with torch.device("meta"):  # nothing is drawn for what the file replaces
            model = cls.for_tensors(cls.config_class(**given), tensors)
        # Copies: what was read lies in the mapped file, at no aligned addresses, where products have other last bits
        load_strictly(model, {name: tensor.clone() for name, tensor in tensors.items()}, owner, assign=True)
        return model.eval()

    @classmethod
    def for_tensors(cls: type[Model], config: Any, tensors: dict[str, Tensor]) -> Model:
        """A new model with the parts that these tensors, by its own names, are for."""
        return cls(config)


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], owner: str, assign: bool = False) -> None:
    """All of the model's tensors, copied or (``assign``) taken as they are.

    Raises:
        ValueError: unless the tensors are exactly the model's, by name and shape.
    """
    own = model.state_dict()
    if missing := own.keys() - tensors.keys():
        raise ValueError(f"{owner}: tensors: expected {listed(sorted(missing))}, got none of that name")
    if unexpected := tensors.keys() - own.keys():
        raise ValueError(f"{owner}: tensors: expected those of the model, got {listed(sorted(unexpected))} too")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{owner}: {name}: expected {list(own[name].shape)}, got {list(tensor.shape)}")
    model.load_state_dict(tensors, assign=assign)


def read_config(folder: Folder, owner: str) -> dict[str, Any]:
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: folder: expected a local one with {CONFIG}, got {folder}")
    config = json.loads(path.read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{owner}: {CONFIG}: expected an object, got {type(config).__name__}")
    return config


def read_tensors(folder: Folder, owner: str) -> dict[str, Tensor]:
    """What the one file of weights holds, or all those that the index names."""
    folder = Path(folder)
    load_file = safetensors_torch().load_file
    if (folder / WEIGHTS).is_file():
        return load_file(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{owner}: folder: expected {WEIGHTS} or {INDEX} in it, got neither in {folder}")
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{owner}: folder: expected {name} in it, which {INDEX} names, got none")
        tensors |= load_file(folder / name)
    return tensors


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    names = list(names)
    more = len(names) - NAMES_SHOWN
    return ", ".join(map(repr, names[:NAMES_SHOWN])) + (f" and {more} more" if more > 0 else "")


def safetensors_torch() -> ModuleType:
    """The module safetensors.torch, imported when a file is read or written."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "widenet_kernels: model files need the package safetensors: pip install 'widenet-kernels[pretrained]'"
        ) from error
    return safetensors.torch
