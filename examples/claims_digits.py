"""Digits as a task of paper_claims.py: 360 images to learn from, 1,437 others to be judged by.

The roles of train_digits.py's split are swapped. With four fifths of the images to learn from every variant would read
99 % of the rest, and nothing could be told from that.
"""

from collections.abc import Iterator
from typing import Any

import torch
from claims_training import Batch, shuffled
from train_digits import load_split, warp

from widenet_kernels.models import WideNetConfig, WideNetForImageClassification
from widenet_kernels.training import mixup

CLASSES = 10


class DigitsTask:
    """The paper's recipe at this size: mixup and label smoothing, on images warped anew each time."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.model, self.batch = settings["model"], settings["recipe"]["batch"]
        digits = load_split()
        self.images, self.labels = digits.held_out_images, digits.held_out_labels
        judged = zip(digits.train_images.split(self.batch), digits.train_labels.split(self.batch), strict=True)
        held_out = [Batch({"pixel_values": images}, labels) for images, labels in judged]
        self.held_out = held_out[: settings["recipe"]["held_out_batches"]]

    def network(self, changes: dict[str, Any]) -> WideNetForImageClassification:
        sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_classes": CLASSES, "label_smoothing": 0.1}
        return WideNetForImageClassification(WideNetConfig(**sizes | self.model | changes))

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for index in shuffled(len(self.labels), self.batch, generator):
            images, shares = mixup(warp(self.images[index], generator), self.labels[index], CLASSES, 0.5, generator)
            yield Batch({"pixel_values": images, "labels": shares}, shares.argmax(dim=1))
