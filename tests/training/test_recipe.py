"""The parts together, as the paper trains: mixup and label smoothing in the loss, LAMB on its schedule."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from widenet_kernels.models import WideNetConfig, WideNetForImageClassification
from widenet_kernels.training import Lamb, mixup, warmup_decay

CLASSES = 5


def tiny(**overrides: object) -> WideNetForImageClassification:
    config = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 16,
        "ffn_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_classes": CLASSES,
        "label_smoothing": 0.1,
    }
    return WideNetForImageClassification(WideNetConfig(**config | overrides))


def samples(count: int) -> tuple[Tensor, Tensor]:
    """A pattern for each class, with noise on it."""
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(CLASSES, (count,))
    return patterns[labels] + 0.3 * torch.randn(count, 1, 8, 8), labels


def test_label_smoothing_is_over_all_classes_whatever_was_mixed() -> None:
    """Each probability p becomes 0.9 p + 0.1 / C, the classes that an image has nothing of among them."""
    model = tiny(aux_loss_weight=0.0).double().eval()
    images, labels = samples(12)
    images, probabilities = mixup(images.double(), labels, CLASSES)
    output = model(images, probabilities)
    loss = 0.0
    for logits, row in zip(output.logits.tolist(), probabilities.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(logit) for logit in logits))
        for logit, p in zip(logits, row, strict=True):
            loss -= (0.9 * p + 0.1 / CLASSES) * (logit - log_sum) / 12
    torch.testing.assert_close(output.loss.item(), loss, rtol=1e-12, atol=0)


def layer_by_layer(model: WideNetForImageClassification) -> list[dict[str, Any]]:
    """As the docstring of Lamb has it."""
    experts, qkv = model.encoder.ffn.experts, model.encoder.attention.qkv
    joined = {*experts.parameters(), *qkv.parameters()}
    rest = [weight for weight in model.parameters() if weight not in joined]
    return [
        {"params": experts.parameters(), "parts": experts.num_experts},
        {"params": qkv.parameters(), "parts": 3},
        {"params": rest},
    ]


def test_layers_of_a_widenet() -> None:
    """4 experts of 4 tensors, 3 projections of 2; besides stem 3, attention's output 2, router 1, norms 10, head 4."""
    model = tiny()
    groups = Lamb(layer_by_layer(model), lr=0.01).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert [group["parts"] * len(group["params"]) for group in groups] == [4 * 4, 3 * 2, 20]


@pytest.mark.parametrize("groups", [WideNetForImageClassification.parameters, layer_by_layer], ids=["whole", "layers"])
def test_tiny_widenet_learns_by_the_recipe(groups: Callable[[WideNetForImageClassification], Any]) -> None:
    steps = 60
    model = tiny()
    optimizer = Lamb(groups(model), lr=0.03)
    schedule = warmup_decay(optimizer, steps // 10, steps)
    held_out, classes = samples(200)

    def loss_and_accuracy() -> tuple[float, float]:
        with torch.no_grad():
            output = model.eval()(held_out, classes)
        return output.loss.item(), (output.logits.argmax(dim=1) == classes).double().mean().item()

    before, _ = loss_and_accuracy()
    for _ in range(steps):
        images, labels = samples(32)
        loss = model.train()(*mixup(images, labels, CLASSES)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    after, accuracy = loss_and_accuracy()
    assert after < 0.7 * before
    assert accuracy > 0.9
