"""The balance losses of a widened model: in the loss once, with their gradient; who adds them; several forwards."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from dense_models import (
    OPTIONS,
    WEIGHT,
    Encoder,
    assert_equal_gradients,
    balance_losses,
    batch,
    checkpointed,
    dense,
    gradients,
    loss_of,
    main_loss,
    random,
    settle,
    widened,
)
from torch import Tensor, nn

from widenet_kernels.integrations import moe_losses, widen
from widenet_kernels.testing.numerics import assert_float64


@pytest.mark.parametrize("options", [{}, {"share": True}, {"capacity_factor": 0.8}, {"k": 1}], ids=str)
def test_loss_and_gradients_are_those_of_an_explicit_sum(kind: str, options: dict[str, Any]) -> None:
    model = widened(kind, **options)
    given = batch(kind)
    plain = copy.deepcopy(model)
    losses = balance_losses(plain)
    output = plain(**given)
    assert len(losses) == 3
    expected = main_loss(kind, output, given) + WEIGHT * (losses[0] + losses[1] + losses[2])
    loss = loss_of(kind, model, given)
    assert_float64(loss, expected)
    assert_float64(moe_losses(model), WEIGHT * sum(losses[1:], losses[0]))
    got, wanted = gradients(model, loss), gradients(plain, expected)
    assert_equal_gradients(got, wanted)
    without = gradients(plain, main_loss(kind, plain(**given), given))
    routers = [name for name in got if name.endswith("router.weight")]
    assert any((got[name] - without[name]).abs().max() > 1e-3 for name in routers)  # the term is seen


# Where the loss is


def test_without_labels_nothing_is_added() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    model = widened("bert")
    given = batch("bert")
    labels = given.pop("labels")
    output = model(**given)
    assert output.loss is None
    assert moe_losses(model) > 0
    without = model(**given, return_dict=False)
    assert torch.equal(without[0], output.logits)
    loss, scores = model(**given, labels=labels, return_dict=False)
    assert torch.equal(loss, model(**given, labels=labels).loss)
    assert torch.equal(scores, output.logits)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BertModel", False),
        ("BertForMaskedLM", True),
        ("BertForPreTraining", True),
        ("BertForQuestionAnswering", True),
        ("BertForSequenceClassification", True),
    ],
)
def test_who_adds_it_for_transformers(name: str, expected: bool) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = dense("bert").config
    model = getattr(transformers, name)(config)
    assert widen(model, **OPTIONS).loss_in_output is expected
    assert widen(getattr(transformers, name)(config), **OPTIONS, loss_in_output=False).loss_in_output is False


class Output(NamedTuple):
    logits: Tensor
    loss: Tensor | None


class Plain:
    def __init__(self, loss: Tensor | None) -> None:
        self.loss = loss


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda scores, loss: Output(scores, loss), lambda output: output.loss),
        (lambda scores, loss: Plain(loss), lambda output: output.loss),
        (lambda scores, loss: {"loss": loss, "scores": scores}, lambda output: output["loss"]),
        (lambda scores, loss: (scores,) if loss is None else (loss, scores), lambda output: output[0]),
    ],
    ids=["named", "attribute", "dict", "tuple"],
)
def test_outputs_with_a_loss(pack: Callable, unpack: Callable) -> None:
    class WithLoss(Encoder):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            scores = super().forward(x)
            return pack(scores, None if labels is None else (scores - labels).square().mean())

    model = settle(WithLoss())
    assert not widen(copy.deepcopy(model), **OPTIONS).loss_in_output  # it cannot know
    assert widen(model, **OPTIONS, loss_in_output=True).loss_in_output
    losses = balance_losses(model)
    x, labels = random(3, 7, 12), random(3, 7, 5)
    loss = unpack(model(x, labels))
    expected = (Encoder.forward(model, x) - labels).square().mean() + WEIGHT * sum(losses[:3])
    assert_float64(loss, expected)
    without = unpack(model(x))
    assert without is None or without.dim() == 3


def test_an_output_with_no_place_for_a_loss() -> None:
    model = dense("encoder")
    widen(model, **OPTIONS, loss_in_output=True)
    with pytest.raises(TypeError, match=r"^widen: loss_in_output: expected an output with a loss, got Tensor"):
        model(**batch("encoder"))


def test_errors_of_moe_losses() -> None:
    model = dense("encoder")
    with pytest.raises(ValueError, match=r"^moe_losses: model: expected one that widen has changed"):
        moe_losses(model)
    widen(model, **OPTIONS)
    model.encoder.layers[0](random(3, 7, 12))
    with pytest.raises(RuntimeError, match=r"^moe_losses: expected a forward of the model before, got none"):
        moe_losses(model)


def test_parts_widened_by_themselves_are_summed() -> None:
    model = settle(nn.ModuleList([dense("encoder"), dense("encoder")]))
    for part in model:
        widen(part, **OPTIONS)
    losses = balance_losses(model)
    for part in model:
        part(**batch("encoder"))
    assert_float64(moe_losses(model), WEIGHT * sum(losses[1:], losses[0]))


def test_a_forward_past_every_widened_block_adds_nothing() -> None:
    model = dense("encoder")
    widen(model, **OPTIONS)
    model.encoder.forward = lambda x, src_key_padding_mask: x  # as where layers are dropped
    model(**batch("encoder"))
    assert moe_losses(model) == 0


def test_data_parallel_is_refused() -> None:
    model = dense("encoder")
    widen(model, **OPTIONS)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"^widen: torch.nn.DataParallel is not served; expected Distributed"):
        replica(**batch("encoder"))


# Several forwards


def test_a_forward_starts_afresh() -> None:
    model = widened("encoder")
    given, other = batch("encoder"), batch("encoder", seed=2)
    model(**other)
    model.encoder(other["x"])  # a part counts nothing
    first = moe_losses(model).item()
    model(**given)
    assert moe_losses(model).item() != first
    model(**other)
    assert moe_losses(model).item() == first


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_several_forwards_before_one_backward(reentrant: bool | None) -> None:
    """Each with its own padding and its own part of the loss."""
    model = widened("encoder")
    lengths, factors = ((7, 3, 5), (2, 7, 6)), (1.0, -2.5)
    batches = [batch("encoder", seed, those) for seed, those in enumerate(lengths)]
    expected: dict[str, Tensor] = {}
    for given, factor in zip(batches, factors, strict=True):
        for name, gradient in gradients(model, factor * loss_of("encoder", model, given)).items():
            expected[name] = expected.get(name, 0) + gradient
    if reentrant is not None:
        checkpointed(model, reentrant)
        batches = [given | {"x": given["x"].requires_grad_()} for given in batches]
    total = sum(factor * loss_of("encoder", model, given) for given, factor in zip(batches, factors, strict=True))
    assert_equal_gradients(gradients(model, total), expected)


def test_accumulated_by_transformers_trainer() -> None:
    """Which passes the number of all labels and divides by nothing: two halves make the whole."""
    pytest.importorskip("transformers", minversion="5.0")
    model = widened("vit")
    given = batch("vit")
    halves = [{name: value[part] for name, value in given.items()} for part in (slice(2), slice(2, 3))]
    terms = []
    for half in halves:
        loss = model(**half, num_items_in_batch=torch.tensor(3)).loss
        terms.append(moe_losses(model))
        assert_float64(
            loss - terms[-1], nn.functional.cross_entropy(model(**half).logits, half["labels"], reduction="sum") / 3
        )
    alone = []
    for half in halves:
        model(**half)
        alone.append(moe_losses(model))
    together = (2 * alone[0] + alone[1]) / 3
    torch.testing.assert_close(terms[0] + terms[1], together, rtol=1e-6, atol=0)  # the shares are fp32
