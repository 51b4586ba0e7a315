import re

import pytest
import torch
from torch import Tensor

from widenet_kernels.training import mixup


def batch(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Every image constant, its value its number; every label a class of its own."""
    images = torch.arange(count, dtype=dtype).view(count, 1, 1, 1).expand(count, 2, 3, 3).contiguous()
    return images, torch.arange(count)


def test_images_and_labels_are_mixed_by_the_same_share_with_the_same_partner() -> None:
    images, labels = batch(8)
    mixed, probabilities = mixup(images, labels, 8)
    assert mixed.shape == images.shape
    assert probabilities.shape == (8, 8)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(8, dtype=torch.float64))
    assert (probabilities >= 0).all()
    assert ((probabilities > 0).sum(dim=1) <= 2).all()
    # an image's value is its number, so the mean of the classes is the value of the mixed image
    expected = probabilities @ torch.arange(8, dtype=torch.float64)
    torch.testing.assert_close(mixed, expected.view(8, 1, 1, 1).expand_as(mixed))


def test_every_sample_has_its_own_share_and_partners_are_a_permutation() -> None:
    images, labels = batch(64)
    _, probabilities = mixup(images, labels, 64)
    shares = probabilities.diagonal()
    alone = shares == 1  # met itself
    assert len(set(shares[~alone].tolist())) == int((~alone).sum()) > 50
    partners = (probabilities - torch.diag(shares)).argmax(dim=1)
    partners[alone] = labels[alone]
    assert partners.sort().values.tolist() == list(range(64))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_shares_have_the_moments_of_the_beta_distribution(alpha: float) -> None:
    """Of Beta(a, a): mean 1/2, variance s2 = 1 / (4 (2 a + 1)), fourth central moment s2^2 (3 - 6 / (2 a + 3))."""
    labels = torch.arange(200_000) % 2
    _, probabilities = mixup(labels.double(), labels, 2, alpha)
    shares = probabilities.gather(1, labels[:, None])
    centered = shares[(shares > 0) & (shares < 1)] - 0.5  # of those that met the other class
    assert 99_000 < len(centered) < 101_000
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = variance**2 * (3 - 6 / (2 * alpha + 3))
    for power, moment in ((1, 0.0), (2, variance), (3, 0.0), (4, fourth)):
        values = centered**power
        assert values.mean().item() == pytest.approx(moment, abs=5 * values.std().item() / len(values) ** 0.5)


def test_the_generator_alone_decides() -> None:
    images, labels = batch(16)
    first = mixup(images, labels, 16, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = mixup(images, labels, 16, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    other = mixup(images, labels, 16, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    drawn = mixup(images, labels, 16)
    torch.set_rng_state(before)
    assert torch.equal(mixup(images, labels, 16)[1], drawn[1])


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=["fp32", "bf16", "fp64"],
)
def test_dtypes_and_inputs_are_left_as_they_are(dtype: torch.dtype, wide: torch.dtype) -> None:
    images, labels = batch(6, dtype)
    kept = images.clone(), labels.clone()
    mixed, probabilities = mixup(images, labels, 9)
    assert (mixed.dtype, probabilities.dtype, probabilities.shape) == (dtype, wide, (6, 9))
    assert torch.equal(images, kept[0])
    assert torch.equal(labels, kept[1])


def test_batches_of_none_and_of_one() -> None:
    images, labels = batch(0)
    assert [list(tensor.shape) for tensor in mixup(images, labels, 3)] == [[0, 2, 3, 3], [0, 3]]
    image, label = torch.randn(1, 4), torch.tensor([2])
    mixed, probabilities = mixup(image, label, 3)
    torch.testing.assert_close(mixed, image)
    torch.testing.assert_close(probabilities, torch.tensor([[0.0, 0.0, 1.0]]))


def test_generator_on_another_device_than_the_images(device: str) -> None:
    images, labels = batch(16, torch.float32)
    expected = mixup(images, labels, 16, generator=torch.Generator().manual_seed(5))
    actual = mixup(images.to(device), labels.to(device), 16, generator=torch.Generator().manual_seed(5))
    assert actual[0].device.type == actual[1].device.type == device
    torch.testing.assert_close(actual[0].cpu(), expected[0])
    torch.testing.assert_close(actual[1].cpu(), expected[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"images": torch.zeros(4, 2, dtype=torch.uint8)},
            TypeError,
            "mixup: images: expected [N, ...] of a floating dtype, got torch.uint8 of shape [4, 2]",
        ),
        (
            {"images": torch.zeros(())},
            TypeError,
            "mixup: images: expected [N, ...] of a floating dtype, got torch.float32 of shape []",
        ),
        ({"labels": torch.zeros(4)}, TypeError, "mixup: labels: expected torch.int64, got torch.float32 of shape [4]"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "mixup: labels: expected [N] = [4], got torch.int64 of shape [3]",
        ),
        ({"num_classes": 0}, ValueError, "mixup: num_classes: expected at least 1, got 0"),
        ({"alpha": 0.0}, ValueError, "mixup: alpha: expected a finite number above 0, got 0.0"),
    ],
)
def test_errors(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"images": torch.zeros(4, 2), "labels": torch.zeros(4, dtype=torch.int64), "num_classes": 3}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        mixup(**good | arguments)


def test_class_that_does_not_exist() -> None:
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        mixup(torch.zeros(2, 3), torch.tensor([0, 3]), 3)
