"""The training step of a WideNet for images: forward, loss, backward and the optimizer's step."""

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from widenet_kernels.models import WideNetConfig, WideNetForImageClassification

from . import counts, limits
from .agreement import relative_error
from .layer import OURS
from .results import Section
from .shapes import WIDENET, Inputs
from .timing import Call, Contender

CONFIGS = {"b": WideNetConfig.base, "l": WideNetConfig.large, "h": WideNetConfig.huge}


def sections(inputs: Inputs) -> Iterator[Section]:
    """For the shapes that are a WideNet's; others have no model."""
    for (size, images), case in WIDENET.items():
        if case.name == inputs.case.name:
            config = CONFIGS[size](dropout=0.0, noise_std=0.0)  # so that all compute the same
            yield Section("train_step", case, "forward+backward", contenders(config, images, inputs), limits.GEMMS)


def contenders(config: WideNetConfig, images: int, inputs: Inputs) -> list[Contender]:
    flops = counts.model_flops(config, images)
    truth = functools.cache(lambda: [Step(config, images, inputs, "reference")()])
    products = 3 * config.num_layers * counts.layer_flops(inputs.case, inputs.served)
    alone = functools.partial(experts_alone, config, inputs)
    return [
        Contender(limits.GEMMS, "limit", alone, flops=products, work=products),
        Contender(
            OURS, "ours", functools.partial(Step, config, images, inputs, None),
            lambda loss: relative_error(loss, truth()), flops=flops,
        ),
        Contender(
            "reference", "peer", functools.partial(Step, config, images, inputs, "reference"), flops=flops, work=flops
        ),
    ]  # fmt: skip


def experts_alone(config: WideNetConfig, inputs: Inputs) -> Call:
    """The experts' products of every block, without attention, router and optimizer."""
    gemms = limits.Gemms(inputs)

    def call() -> None:
        for _ in range(config.num_layers):
            gemms.forward_backward()

    return call


class Step:
    """One step after the other on the same images; the first gives the loss of the fresh network."""

    def __init__(self, config: WideNetConfig, images: int, inputs: Inputs, backend: str | None) -> None:
        torch.manual_seed(0)
        self.model = WideNetForImageClassification(replace(config, backend=backend)).to(inputs.device, inputs.dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        size = (images, config.num_channels, config.image_size, config.image_size)
        self.pixels = torch.randn(size, device=inputs.device).to(inputs.dtype)
        self.labels = torch.arange(images, device=inputs.device) % config.num_classes

    def __call__(self) -> Tensor:
        """[1]: the loss before the step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.pixels, labels=self.labels).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach().view(1)
