"""What people run around a model: activation checkpointing, GradScaler, torch.func, copies and files, frozen parts."""

import copy
import pickle

import pytest
import torch
from calls import OurCalls
from tiny import STILL, masked_words, samples, texts, tiny, tiny_text
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from widenet_kernels.models import WideNetForMaskedLM
from widenet_kernels.models.block import Block

FORMS = {
    "widenet": {},
    "vit-moe": {"share_blocks": False, "moe_layers": 2, "dense_ffn_size": 16},
    "shared-norms": {"share_norms": True},
    "groups": {"num_layers": 4, "routing_groups": 2},
    "authors": {"authors": True},
}


def loss_of(model: nn.Module) -> Tensor:
    if not isinstance(model, WideNetForMaskedLM):
        return model(*samples()).loss
    batch = texts()
    labels, orders = masked_words(batch)
    return model(*batch, labels=labels, sentence_order_labels=orders).loss


def gradients(model: nn.Module) -> list[Tensor]:
    """With the same dropout and noise each time."""
    torch.manual_seed(7)
    model.zero_grad()
    loss_of(model).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(one, two) for one, two in zip(ours, expected, strict=True))


@pytest.mark.parametrize("form", [*FORMS, "text", "text-groups"])
def test_checkpointing_every_block_changes_no_bit(form: str) -> None:
    """With dropout and the router's noise, which are drawn again; the names of the parameters stay."""
    if form.startswith("text"):
        model = tiny_text(WideNetForMaskedLM, **(FORMS["groups"] if form == "text-groups" else {}))
    else:
        model = tiny(**FORMS[form])
    expected, names = gradients(model), list(model.state_dict())
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    assert_same(gradients(model), expected)
    assert_same(gradients(model), expected)  # nothing of the first time is left
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_training_in_fp16_with_a_scaler(kind: str) -> None:
    """From a scale that overflows at first; the losses fall as in fp32."""
    losses = {}
    for half in (False, True):
        model = tiny(**STILL) if kind == "images" else tiny_text(WideNetForMaskedLM, **STILL)
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4, enabled=half)
        losses[half] = []
        skipped = 0
        while len(losses[half]) < 8:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = loss_of(model)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            if scaler.get_scale() < before:
                skipped += 1
            else:
                losses[half].append(loss.item())
        assert (skipped > 0) == half
    assert losses[True][-1] < losses[True][0]
    # each forward rounds to 11 bits, and what the steps differ by grows from step to step
    torch.testing.assert_close(losses[True], losses[False], rtol=0.01, atol=0)


def test_gradients_by_torch_func() -> None:
    model = tiny()
    expected = gradients(model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.manual_seed(7)
    ours = torch.func.grad(lambda p: torch.func.functional_call(model, p, samples()).loss)(parameters)
    assert_same(list(ours.values()), expected)


@pytest.mark.filterwarnings("ignore:.*performance drop")  # image by image, as torch says
def test_gradients_of_every_image() -> None:
    """vmap of grad is a loop over images, each routed by itself."""
    model = tiny(**STILL)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (image[None], label[None])).loss

    images, labels = samples()
    ours = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        for name, exact in torch.func.grad(loss)(parameters, image, label).items():
            torch.testing.assert_close(ours[name][number], exact, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("form", FORMS)
def test_copies(form: str, how: str) -> None:
    """They compute the same and share within themselves what the model shares, but nothing with it."""
    model = tiny(**FORMS[form])
    expected = gradients(model)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert other.config == model.config
    assert_same(gradients(other), expected)
    addresses = {parameter.data_ptr() for parameter in model.parameters()}
    assert not addresses & {parameter.data_ptr() for parameter in other.parameters()}


def test_a_frozen_body_has_no_backward() -> None:
    """Where the head alone trains, no op of ours runs backward, and the gradients are those of training everything."""
    model = tiny(**STILL)
    gradients(model)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.zero_grad()
    loss = loss_of(model)
    with OurCalls() as ours:
        loss.backward()
    assert ours.ops == []
    for name, parameter in model.named_parameters():
        if name.startswith("head."):
            assert torch.equal(parameter.grad, expected[name])
        else:
            assert parameter.grad is None
