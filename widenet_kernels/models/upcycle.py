"""Upcycling: networks of experts that start as a trained dense one (Komatsuzaki et al. 2022, arXiv 2212.05055).

The dense network is a ViT or an ALBERT of the package transformers, which is not needed for it: a folder that
``save_pretrained`` wrote, or the model itself. Every expert starts as a copy of the dense FFN, so a token whose k gate
weights sum to s gets s * FFN(x):

- ``normalize=True``, the default here: s = 1. Dropless, the default here too, the new network computes what the dense
  one did, up to rounding.
- ``normalize=False``, as in WideNet: s is the sum of the k largest of E probabilities. The router starts so small
  (:data:`ROUTER_SCALE`) that all of them are about 1/E, and the experts' second layer is multiplied by E/k, for which
  s * E/k = 1 + the mean of the k largest logits - the mean of all, to first order. For k = 2 of E = 4 logits N(0, r^2)
  that is 1 + 0.66 r in the mean. A Glorot-uniform router has r = 1.4, so 1 % is left at that scale. In training the
  noise, of std 1/E, counts in r: 17 %, unless ``noise_std`` is less.

Experts grow apart in training, since each sees other tokens; with ``k=1`` and ``normalize=True`` the weight is always 1
and the router learns from the balance loss alone.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from widenet_kernels.models.config import EncoderConfig, WideNetConfig, WideNetTextConfig
from widenet_kernels.models.pretrained import Folder, PretrainedModel, listed, load_strictly, read_config, read_tensors
from widenet_kernels.models.text import WideNetTextModel
from widenet_kernels.models.text_heads import (
    WideNetForMaskedLM,
    WideNetForQuestionAnswering,
    WideNetForSequenceClassification,
)
from widenet_kernels.models.vision import WideNetForImageClassification

ROUTER_SCALE = 0.01  # of the initial router where the gate weights are not normalized

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Where the parts of a block stand: our names, theirs. ALBERT has one block for every depth.
VIT_BLOCK = {
    "query": "encoder.layer.{depth}.attention.attention.query",
    "key": "encoder.layer.{depth}.attention.attention.key",
    "value": "encoder.layer.{depth}.attention.attention.value",
    "out": "encoder.layer.{depth}.attention.output.dense",
    "attention_norm": "encoder.layer.{depth}.layernorm_before",
    "linear1": "encoder.layer.{depth}.intermediate.dense",
    "linear2": "encoder.layer.{depth}.output.dense",
    "ffn_norm": "encoder.layer.{depth}.layernorm_after",
}
VIT_RENAMED = {  # a ViT of transformers 5 in memory: its names, and those of the files
    "layers.": "encoder.layer.",
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
ALBERT_LAYER = "encoder.albert_layer_groups.0.albert_layers.0"
ALBERT_BLOCK = {
    "query": f"{ALBERT_LAYER}.attention.query",
    "key": f"{ALBERT_LAYER}.attention.key",
    "value": f"{ALBERT_LAYER}.attention.value",
    "out": f"{ALBERT_LAYER}.attention.dense",
    "attention_norm": f"{ALBERT_LAYER}.attention.LayerNorm",
    "linear1": f"{ALBERT_LAYER}.ffn",
    "linear2": f"{ALBERT_LAYER}.ffn_output",
    "ffn_norm": f"{ALBERT_LAYER}.full_layer_layer_norm",
}
ALBERT_KINDS: dict[str, type[PretrainedModel]] = {
    "AlbertModel": WideNetTextModel,
    "AlbertForPreTraining": WideNetForMaskedLM,
    "AlbertForMaskedLM": WideNetForMaskedLM,
    "AlbertForSequenceClassification": WideNetForSequenceClassification,
    "AlbertForQuestionAnswering": WideNetForQuestionAnswering,
}
ALBERT_HEADS: dict[type[PretrainedModel], dict[str, str]] = {
    WideNetTextModel: {},
    WideNetForMaskedLM: {
        "dense": "predictions.dense",
        "norm": "predictions.LayerNorm",
        "sentence_order": "sop_classifier.classifier",
    },
    WideNetForSequenceClassification: {"head": "classifier"},
    WideNetForQuestionAnswering: {"head": "qa_outputs"},
}

Config = TypeVar("Config", bound=EncoderConfig)
Model = TypeVar("Model", bound=PretrainedModel)


def upcycle_vit(source: nn.Module | Folder, **overrides: Any) -> WideNetForImageClassification:
    """A ViT whose blocks have experts in place of their FFN, in evaluation mode and the checkpoint's dtype.

    Nothing is shared between blocks, and the dropouts are the checkpoint's. The class token and its position embedding
    are one here, for our first position is zero. A classifier of another size than ``num_classes`` starts anew; a
    pooler has no place.

    Args:
        source: a ``ViTForImageClassification`` or ``ViTModel`` (then with ``num_classes``), or the folder of one.
        overrides: fields of :class:`WideNetConfig`, such as ``num_experts``, ``k``, ``moe_layers`` for experts in the
            last blocks alone, ``normalize``, ``capacity_factor``; not those that the checkpoint decides.

    Raises:
        ValueError: for another kind of checkpoint, tensors that are missing or of another shape, and an override that
            contradicts it; naming what was expected and what came.
        FileNotFoundError, ModuleNotFoundError: as from :meth:`PretrainedModel.from_pretrained`, for a folder.
    """
    dense = DenseCheckpoint("upcycle_vit", source, "vit", VIT_RENAMED)
    classes = {}
    if dense.architecture == "ViTForImageClassification":
        classes = {"num_classes": len(dense.tensor("classifier.bias"))}
    elif "num_classes" not in overrides:
        raise ValueError(
            f"upcycle_vit: num_classes: expected one, for {dense.architecture} has no classifier, got none"
        )
    config = dense.new_config(
        WideNetConfig,
        overrides,
        defaults={"pooling": "token", "representation": False, **classes},
        decided={
            "image_size": dense.field("image_size"),
            "patch_size": dense.field("patch_size"),
            "num_channels": dense.field("num_channels"),
            "share_blocks": False,
            "share_norms": False,
            "pre_norm": True,
        },
    )
    position = dense.tensor("embeddings.position_embeddings")[0].clone()
    position[0] += dense.tensor("embeddings.cls_token")[0, 0]
    state = {
        "position_embedding": position,
        **dense.layer("patch_embedding", "embeddings.patch_embeddings.projection"),
        **dense.encoder(config, VIT_BLOCK),
        **dense.layer("encoder.norm", "layernorm"),
    }
    if classes == {"num_classes": config.num_classes}:
        state |= dense.layer("head", "classifier")
    return dense.new_model(WideNetForImageClassification, config, state)


def upcycle_albert(
    source: nn.Module | Folder, kind: type[PretrainedModel] | None = None, **overrides: Any
) -> PretrainedModel:
    """A WideNet for text that starts as an ALBERT, in evaluation mode and the checkpoint's dtype.

    Attention and FFN are shared by all blocks in both; the LayerNorms, which ALBERT shares, become each block's own.
    The dropouts are the checkpoint's (0 unless it was told otherwise), that in front of a classifier of texts
    ``hidden_dropout_prob`` too: say ``dropout=0.1`` where the few texts of a fine-tuning want more.
    What the checkpoint lacks (the pooler and the order of sentences of an ``AlbertForMaskedLM``, the head of another
    ``kind``, a classifier of another size than ``num_labels``) starts anew.

    Args:
        source: an ``AlbertModel``, ``AlbertForPreTraining``, ``AlbertForMaskedLM``,
            ``AlbertForSequenceClassification`` or ``AlbertForQuestionAnswering`` of one group and one inner layer, or
            the folder of one.
        kind: the model to make; None: the checkpoint's, :class:`WideNetForMaskedLM` for both of the pre-training.
        overrides: fields of :class:`WideNetTextConfig`, such as ``num_experts``, ``k``, ``share_blocks``,
            ``normalize``, ``capacity_factor``; not those that the checkpoint decides.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError: as from :func:`upcycle_vit`.
    """
    dense = DenseCheckpoint("upcycle_albert", source, "albert")
    for name in ("num_hidden_groups", "inner_group_num"):
        if dense.field(name) != 1:
            raise ValueError(f"upcycle_albert: {name}: expected 1, got {dense.field(name)}")
    own_kind = ALBERT_KINDS.get(dense.architecture)
    kind = kind or own_kind
    if kind is None or kind not in ALBERT_HEADS:
        known = ", ".join(known.__name__ for known in ALBERT_HEADS)
        raise ValueError(f"upcycle_albert: kind: expected one of {known} for {dense.architecture}, got {kind}")
    labels = {}
    if own_kind is WideNetForSequenceClassification:
        labels = {"num_labels": len(dense.tensor("classifier.bias"))}
    config = dense.new_config(
        WideNetTextConfig,
        overrides,
        defaults=labels,
        decided={
            "vocab_size": dense.field("vocab_size"),
            "embedding_size": dense.field("embedding_size"),
            "max_positions": dense.field("max_position_embeddings"),
            "num_token_types": dense.field("type_vocab_size"),
            "pre_norm": False,
        },
    )
    state = {
        "word_embedding.weight": dense.tensor("embeddings.word_embeddings.weight"),
        "position_embedding.weight": dense.tensor("embeddings.position_embeddings.weight"),
        "token_type_embedding.weight": dense.tensor("embeddings.token_type_embeddings.weight"),
        **dense.layer("embedding_norm", "embeddings.LayerNorm"),
        **dense.layer("projection", "encoder.embedding_hidden_mapping_in"),
        **dense.encoder(config, ALBERT_BLOCK),
    }
    if "pooler.weight" in dense.tensors and kind is not WideNetForQuestionAnswering:
        state |= dense.layer("pooler", "pooler")
    if kind is not WideNetTextModel:
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    if kind is own_kind and labels.get("num_labels", config.num_labels) == config.num_labels:
        state |= albert_head(dense, kind)
    return dense.new_model(kind, config, state)


def albert_head(dense: "DenseCheckpoint", kind: type[PretrainedModel]) -> dict[str, Tensor]:
    """Our names and their tensors of what stands on the encoder."""
    state: dict[str, Tensor] = {}
    for ours, theirs in ALBERT_HEADS[kind].items():
        if theirs != "sop_classifier.classifier" or dense.architecture == "AlbertForPreTraining":
            state |= dense.layer(ours, theirs)
    if kind is WideNetForMaskedLM:
        state["decoder_bias"] = dense.tensor("predictions.bias")
        words = dense.tensor("embeddings.word_embeddings.weight")
        if not torch.equal(dense.tensors.get("predictions.decoder.weight", words), words):
            raise ValueError("upcycle_albert: predictions.decoder.weight: expected the word embedding, got another one")
    return state


class DenseCheckpoint:
    """The config and the tensors of a dense network, with what is asked of them.

    Args:
        owner: the function that errors name.
        source: a model, or the folder of one.
        model_type: what its config must say, and the prefix in front of the tensors of a model with a head.
        renamed: parts of its tensors' names, and what they are called here.
    """

    def __init__(
        self, owner: str, source: nn.Module | Folder, model_type: str, renamed: Mapping[str, str] | None = None
    ) -> None:
        self.owner = owner
        if isinstance(source, nn.Module):
            to_dict = getattr(getattr(source, "config", None), "to_dict", dict)  # a model of others has no model_type
            self.config: dict[str, Any] = to_dict()
            tensors = source.state_dict()
            self.architecture = type(source).__name__
        else:
            self.config = read_config(source, owner)
            tensors = read_tensors(source, owner)
            self.architecture = (self.config.get("architectures") or ["?"])[0]
        if self.config.get("model_type") != model_type:
            got = self.config.get("model_type")
            raise ValueError(f"{owner}: source: expected one of model_type {model_type!r}, got {got!r}")
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            name = name.removeprefix(f"{model_type}.")
            for old, new in (renamed or {}).items():
                name = name.replace(old, new)
            self.tensors[name] = tensor
        self.taken: set[str] = set()

    def field(self, name: str) -> Any:
        if name not in self.config:
            raise ValueError(f"{self.owner}: config of the source: expected a field {name!r}, got none")
        return self.config[name]

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"{self.owner}: tensors of the source: expected {name!r}, got none of that name")
        self.taken.add(name)
        return self.tensors[name]

    def layer(self, ours: str, theirs: str) -> dict[str, Tensor]:
        """Weight and bias of a layer, under our name."""
        return {f"{ours}.{part}": self.tensor(f"{theirs}.{part}") for part in ("weight", "bias")}

    def new_config(
        self, kind: type[Config], overrides: dict[str, Any], defaults: dict[str, Any], decided: dict[str, Any]
    ) -> Config:
        """Of the upcycled network: ``defaults`` may be overridden, what the checkpoint has decided may not."""
        activation = self.field("hidden_act")
        if activation not in ACTIVATIONS:
            raise ValueError(f"{self.owner}: hidden_act: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        defaults = {
            "capacity_factor": None,
            "normalize": True,
            "dropout": self.field("hidden_dropout_prob"),
            "attention_dropout": self.field("attention_probs_dropout_prob"),
        } | defaults
        decided = {
            "hidden_size": self.field("hidden_size"),
            "ffn_size": self.field("intermediate_size"),
            "num_layers": self.field("num_hidden_layers"),
            "num_heads": self.field("num_attention_heads"),
            "layer_norm_eps": self.field("layer_norm_eps"),
            "activation": ACTIVATIONS[activation],
            "authors": False,
        } | decided
        for name, value in decided.items():
            if overrides.get(name, value) != value:
                raise ValueError(f"{self.owner}: {name}: expected {value!r}, the source's, got {overrides[name]!r}")
        return kind(**defaults | overrides | decided)

    def encoder(self, config: EncoderConfig, block: dict[str, str]) -> dict[str, Tensor]:
        """The blocks' tensors, under our names; ``block``: where the parts of a block stand."""
        state: dict[str, Tensor] = {}
        for depth in range(1 if config.share_blocks else config.num_layers):
            own = "" if config.share_blocks else f".{depth}"
            at = {part: name.format(depth=depth) for part, name in block.items()}
            for part in ("weight", "bias"):
                joined = [self.tensor(f"{at[name]}.{part}") for name in ("query", "key", "value")]
                state[f"encoder.attention{own}.qkv.{part}"] = torch.cat(joined)
            state |= self.layer(f"encoder.attention{own}.out", at["out"])
            if depth < config.first_moe_layer:
                state |= self.layer(f"encoder.ffn{own}.linear1", at["linear1"])
                state |= self.layer(f"encoder.ffn{own}.linear2", at["linear2"])
            else:
                state |= self.experts(config, f"encoder.ffn{own}.experts", at["linear1"], at["linear2"])
        for depth in range(1 if config.share_norms else config.num_layers):
            for norm in ("attention_norm", "ffn_norm"):
                state |= self.layer(f"encoder.blocks.{depth}.{norm}", block[norm].format(depth=depth))
        return state

    def experts(self, config: EncoderConfig, ours: str, linear1: str, linear2: str) -> dict[str, Tensor]:
        """E copies of the FFN, the second layer scaled where the gate weights do not sum to 1."""
        scale = 1.0 if config.normalize else config.num_experts / config.k
        return {
            f"{ours}.w1": self.tensor(f"{linear1}.weight").t().expand(config.num_experts, -1, -1),
            f"{ours}.b1": self.tensor(f"{linear1}.bias").expand(config.num_experts, -1),
            f"{ours}.w2": (self.tensor(f"{linear2}.weight").t() * scale).expand(config.num_experts, -1, -1),
            f"{ours}.b2": (self.tensor(f"{linear2}.bias") * scale).expand(config.num_experts, -1),
        }

    def new_model(self, kind: type[Model], config: EncoderConfig, state: dict[str, Tensor]) -> Model:
        """With these tensors; the others, and the router's direction, are drawn as for any new model."""
        if left := sorted(name for name in self.tensors.keys() - self.taken if name.startswith("encoder.")):
            raise ValueError(
                f"{self.owner}: tensors of the source: expected those of its config, got {listed(left)} too"
            )
        model = kind.for_tensors(config, state).to(next(iter(state.values())).dtype)
        new = model.state_dict()
        if not config.normalize:
            new |= {name: ROUTER_SCALE * tensor for name, tensor in new.items() if name.endswith("router.weight")}
        load_strictly(model, new | state, self.owner)
        return model.eval()
