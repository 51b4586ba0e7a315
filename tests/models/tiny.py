"""The models of every test, small, and what goes into them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from widenet_kernels.models import WideNetConfig, WideNetForImageClassification, WideNetTextConfig

TINY = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 2,
    "hidden_size": 12,
    "ffn_size": 20,
    "num_layers": 3,
    "num_heads": 2,
    "num_classes": 5,
}
TINY_TEXT = {
    "vocab_size": 23,
    "embedding_size": 6,
    "hidden_size": 12,
    "ffn_size": 20,
    "num_layers": 3,
    "num_heads": 2,
    "max_positions": 9,
    "num_labels": 3,
}
STILL = {"dropout": 0.0, "attention_dropout": 0.0, "noise_std": 0.0}  # nothing random in training

# What the paper compares with, and its ablations, as overrides of a tiny WideNet
BASELINES = {
    "vit": {"share_blocks": False, "dense": True, "pooling": "token"},
    "shared-vit": {"dense": True, "dense_ffn_size": 16, "pooling": "token"},
    "vit-moe": {"share_blocks": False, "moe_layers": 2, "dense_ffn_size": 16},
    "shared-norms": {"share_norms": True},
    "groups": {"num_layers": 4, "routing_groups": 2},
    "normalized": {"normalize": True, "activation": "silu"},
}
TEXT_BASELINES = {
    "albert": {"dense": True, "share_norms": True},
    "bert": {"dense": True, "share_blocks": False},
    "shared-norms": {"share_norms": True},
    "groups": {"num_layers": 4, "routing_groups": 2},
    "pre-norm": {"pre_norm": True},
    "normalized": {"normalize": True, "activation": "relu"},
    "tanh": {"dense": True, "share_norms": True, "activation": "gelu_tanh"},
}


def tiny(seed: int = 0, **overrides: object) -> WideNetForImageClassification:
    torch.manual_seed(seed)
    return WideNetForImageClassification(WideNetConfig(**TINY | overrides))


def samples(count: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 2, 8, 8, generator=generator, dtype=dtype), torch.arange(count) % 5


def tiny_text(kind: type[nn.Module], seed: int = 0, **overrides: object) -> nn.Module:
    torch.manual_seed(seed)
    return kind(WideNetTextConfig(**TINY_TEXT | overrides))


class Texts(NamedTuple):
    """A batch of texts of different lengths; padding is word 0."""

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor


LENGTHS = (7, 3, 6, 1, 5)


def texts(lengths: tuple[int, ...] = LENGTHS, longest: int = 7, seed: int = 1) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), longest)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    words = torch.randint(1, 23, shape, generator=generator)
    return Texts(words * mask, mask.long(), torch.randint(0, 2, shape, generator=generator) * mask)


def masked_words(batch: Texts) -> tuple[Tensor, Tensor]:
    """Labels for every second word, and for the order of the sentences."""
    labels = (7 * batch.input_ids + 1) % 23
    labels[:, 1::2] = -100
    return labels.masked_fill(batch.attention_mask == 0, -100), torch.arange(len(labels)) % 2


def as_lists(batch: Texts) -> dict[str, object]:
    """The same batch and labels without padding, as the literal model takes them."""
    labels, orders = masked_words(batch)
    lengths = batch.attention_mask.sum(dim=1).tolist()
    return {
        "texts": [ids[:length].tolist() for ids, length in zip(batch.input_ids, lengths, strict=True)],
        "segments": [kinds[:length].tolist() for kinds, length in zip(batch.token_type_ids, lengths, strict=True)],
        "words": [{place: word for place, word in enumerate(row.tolist()) if word >= 0} for row in labels],
        "orders": orders.tolist(),
        "longest": batch.input_ids.shape[1],
    }


def overfit(model: nn.Module, inputs: tuple, steps: int = 40, **targets: Tensor) -> NamedTuple:
    """What the model says of a batch, in evaluation, after some steps on it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs, **targets).loss.backward()
        optimizer.step()
    return model.eval()(*inputs, **targets)


def away_from_the_start(model: nn.Module, by: float = 0.3) -> nn.Module:
    """Moved from the initial zeros and ones, which would hide a forgotten term."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return model
