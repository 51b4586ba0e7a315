"""WideNet and the vision transformers it is compared with: patches in, class logits out (arXiv 2107.11817)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from widenet_kernels.models.block import WideNetEncoder, WideNetOutput, init_glorot, widened
from widenet_kernels.models.config import WideNetConfig
from widenet_kernels.models.pretrained import PretrainedModel


class WideNetForImageClassification(PretrainedModel):
    """Patch embedding, the encoder, the mean over all positions or the first one, and a classifier.

    A ViT, a ViT-MoE and what lies between are configurations of it: see :class:`WideNetConfig`. As in the authors' code
    a first position of zeros, which is not trained, stands before the patches; only its position embedding tells it
    from them.
    """

    config_class = WideNetConfig
    config: WideNetConfig

    def __init__(self, config: WideNetConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.patch_embedding = nn.Conv2d(config.num_channels, dim, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(config.num_patches + 1, dim))
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = WideNetEncoder(config)
        self.representation = nn.Linear(dim, dim) if config.representation else None
        self.head = nn.Linear(dim, config.num_classes)
        nn.init.normal_(self.position_embedding, std=0.02)
        for layer in (self.patch_embedding, self.representation, self.head):
            if layer is not None:
                init_glorot(layer)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> WideNetOutput:
        """Logits, and with labels the loss: cross entropy + aux_loss_weight * aux_loss (eq. 8).

        Args:
            pixel_values: [N, num_channels, image_size, image_size].
            labels: [N] int64 classes, or [N, num_classes] probabilities (mixup).

        Raises:
            ValueError: for images of another shape.
        """
        config = self.config
        shape = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != shape:
            raise ValueError(
                "WideNetForImageClassification: pixel_values: expected [N, channels, height, width] = "
                f"[any, {', '.join(map(str, shape))}], got {list(pixel_values.shape)}"
            )
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [N, patches, D]
        x = F.pad(patches, (0, 0, 1, 0)) + self.position_embedding  # [N, L, D], the first position of zeros
        x, aux_loss, routing = self.encoder(self.dropout(x))
        pooled = x.mean(dim=1) if config.pooling == "mean" else x[:, 0]
        if self.representation is not None:
            pooled = self.representation(pooled).tanh()
        logits = self.head(pooled)
        loss = None
        if labels is not None:
            main_loss = F.cross_entropy(widened(logits), labels, label_smoothing=config.label_smoothing)
            loss = main_loss + config.aux_loss_weight * aux_loss
        return WideNetOutput(loss, logits, aux_loss, routing)
