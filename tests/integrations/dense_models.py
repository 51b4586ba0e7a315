"""Small models with random weights in float64, dense and widened, what goes into them, and their losses."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from widenet_kernels.integrations import moe_losses, widen
from widenet_kernels.integrations.widen import MoEFeedForward
from widenet_kernels.nn import MoELayer
from widenet_kernels.testing.numerics import assert_float64

E, D, FFN = 4, 12, 20
SIZES = {"hidden_size": D, "intermediate_size": FFN, "num_hidden_layers": 3, "num_attention_heads": 2}
LENGTHS = (7, 3, 5)  # of the texts of a batch, padded to the longest
KINDS = ("encoder", "vit", "bert", "llama")
WEIGHT = 0.3  # of the balance losses
OPTIONS = {"num_experts": E, "aux_loss_weight": WEIGHT, "noise_std": 0.0}


def padding(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """[N, L] bool, True behind each text."""
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Encoder(nn.Module):
    """torch's encoder and a head on every token, without a loss."""

    def __init__(self, num_layers: int = 3, **options: Any) -> None:
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True} | options
        nested = options["batch_first"] and not options.get("norm_first")  # else torch warns that it does not
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(D, 2, FFN, **options), num_layers, enable_nested_tensor=nested
        )
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=pad))


def settle(model: nn.Module) -> nn.Module:
    """Float64 and evaluation, with weights and biases far enough from 0 that everything counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def dense(kind: str, **options: Any) -> nn.Module:
    """One of ``KINDS``, the same at every call: torch's encoder, or a model of transformers with a head."""
    torch.manual_seed(0)
    if kind == "encoder":
        return settle(Encoder(**options))
    import transformers

    config, model = {
        "vit": ("ViTConfig", "ViTForImageClassification"),
        "bert": ("BertConfig", "BertForMaskedLM"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
    }[kind]
    own = (
        {"image_size": 8, "patch_size": 4, "num_channels": 2, "num_labels": 5} if kind == "vit" else {"vocab_size": 23}
    )
    dropout = {} if kind == "llama" else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return settle(getattr(transformers, model)(getattr(transformers, config)(**SIZES | own | dropout | options)))


def batch(kind: str, seed: int = 1, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Arguments of such a model, with labels where it takes them."""
    if kind == "encoder":
        return {"x": random(3, 7, D, seed=seed), "pad": padding(lengths)}
    if kind == "vit":
        return {"pixel_values": random(3, 2, 8, 8, seed=seed), "labels": torch.tensor([3, 0, 4])}
    ids = torch.randint(23, (3, 7), generator=torch.Generator().manual_seed(seed))
    valid = ~padding(lengths)
    return {"input_ids": ids, "attention_mask": valid.long(), "labels": ids.where(valid, -100)}


def logits(output: Any) -> Tensor:
    """[tokens, classes] of the tokens that are no padding, or [N, classes]."""
    output = output if isinstance(output, Tensor) else output.logits
    return output[~padding()] if output.dim() == 3 else output


def widened(kind: str, model_options: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """With experts that differ."""
    model = dense(kind, **model_options or {})
    widen(model, **OPTIONS | options)
    return settle(model)


def layers_of(model: nn.Module) -> list[MoELayer]:
    """One for each place."""
    return [module.layer for module in model.modules() if isinstance(module, MoEFeedForward)]


def demands(model: nn.Module) -> list[int]:
    """Fills with the number of choices that asked, of each routing from now on."""
    asked: list[int] = []
    for layer in dict.fromkeys(layers_of(model)):
        layer.register_forward_hook(lambda _, __, output: asked.append(int(output[1].expert_demand.sum())))
    return asked


def balance_losses(model: nn.Module) -> list[Tensor]:
    """Fills with the balance loss of every routing from now on, past all that collects them."""
    losses: list[Tensor] = []
    for layer in dict.fromkeys(layers_of(model)):
        layer.register_forward_hook(lambda _, __, output: losses.append(output[1].balance_loss))
    return losses


def main_loss(kind: str, output: Any, given: dict[str, Tensor]) -> Tensor:
    """What the dense model would call its loss, written down."""
    if kind == "encoder":
        return output[~given["pad"]].square().mean()
    if kind == "vit":
        return nn.functional.cross_entropy(output.logits, given["labels"])
    scores, labels = output.logits, given["labels"]
    if kind == "llama":
        scores, labels = scores[:, :-1].float(), labels[:, 1:]
    return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())


def loss_of(kind: str, model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """As a user takes it."""
    output = model(**given)
    return main_loss(kind, output, given) + moe_losses(model) if kind == "encoder" else output.loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert_float64(gradient, expected[name], name)


def checkpointed(model: Encoder, reentrant: bool) -> None:
    """Each layer of its encoder; a plain loop does what TransformerEncoder's forward does in training."""

    def forward(x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        for layer in model.encoder.layers:
            x = checkpoint(layer, x, None, src_key_padding_mask, use_reentrant=reentrant)
        return x

    model.encoder.forward = forward
