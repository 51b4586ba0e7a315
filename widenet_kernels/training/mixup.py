"""mixup: training on weighted means of two images and of their labels (Zhang et al. 2018, arXiv 1710.09412)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def mixup(
    images: Tensor, labels: Tensor, num_classes: int, alpha: float = 0.5, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Every image and its label mixed with those of a partner from the same batch.

        image = share * image + (1 - share) * partner's,  share ~ Beta(alpha, alpha)

    and so for the labels. As in the code of WideNet's authors (Xue et al. 2021, arXiv 2107.11817: "mixup 0.5") every
    image has a share of its own and all are mixed; their partners come from a second stream of the data, here from a
    random permutation of the batch, in which an image may meet itself.

    Args:
        images: [N, ...] of a floating dtype; left as they are.
        labels: [N] int64 classes.
        num_classes: C.
        alpha: above 0; the smaller, the closer the shares to 0 and 1.
        generator: where the random numbers come from, on its own device; None: torch's default for the images' device.

    Returns:
        The mixed images, [N, ...] in their dtype, and probabilities [N, C], whose rows sum to 1, in fp32 (fp64 for fp64
        images): the ``labels`` of :class:`~widenet_kernels.models.WideNetForImageClassification`, which also smooths
        them over all classes where its config says so.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: by torch, for classes below 0 or from C on.
    """
    if not images.is_floating_point() or images.dim() == 0:
        raise TypeError(f"mixup: images: expected [N, ...] of a floating dtype, got {describe(images)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"mixup: labels: expected torch.int64, got {describe(labels)}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"mixup: labels: expected [N] = [{len(images)}], got {describe(labels)}")
    if num_classes < 1:  # -1 would have torch look for the largest label, and wait for the device
        raise ValueError(f"mixup: num_classes: expected at least 1, got {num_classes!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"mixup: alpha: expected a finite number above 0, got {alpha!r}")

    count, device = len(images), images.device
    source = device if generator is None else generator.device
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    # a Dirichlet distribution of two is a Beta distribution; torch.distributions has it, but takes no generator
    shares = torch._sample_dirichlet(torch.full((count, 2), alpha, dtype=dtype, device=source), generator)[:, 0]
    partner = torch.randperm(count, generator=generator, device=source).to(device)
    shares = shares.to(device)

    def mix(values: Tensor) -> Tensor:
        share = shares.view(count, *[1] * (values.dim() - 1))
        return share * values + (1 - share) * values[partner]

    return mix(images).to(images.dtype), mix(F.one_hot(labels, num_classes))


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"
