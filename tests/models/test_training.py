"""Training over several steps: against a plain loop, over two processes, and interrupted."""

import io
import pathlib
from collections.abc import Callable

import pytest
import torch
import torch.distributed
from literal import literal_loss, literal_masked_lm_loss
from tiny import as_lists, away_from_the_start, masked_words, samples, texts, tiny, tiny_text
from torch import Tensor, nn

from widenet_kernels.models import WideNetForMaskedLM

LITERAL = {"dropout": 0.0, "attention_dropout": 0.0, "capacity_factor": 0.8, "aux_loss_weight": 0.1}
STEPS, RATE = 20, 0.05


def descend(parameters: list[Tensor], loss: Callable[[], Tensor], steps: int) -> list[float]:
    """The losses of plain gradient descent; the router's noise is that of the step."""
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        value = loss()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                parameter.sub_(RATE * gradient)
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_twenty_steps_follow_the_literal_model(kind: str) -> None:
    if kind == "images":
        model = tiny(**LITERAL).double()
        images, labels = samples(4, torch.float64)
        plain = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
        ours = descend(list(model.parameters()), lambda: model(images, labels).loss, STEPS)
        expected = descend(list(plain.values()), lambda: literal_loss(plain, model.config, images, labels)[0], STEPS)
    else:
        model = away_from_the_start(tiny_text(WideNetForMaskedLM, **LITERAL).double(), by=0.1)
        batch = texts()
        labels, orders = masked_words(batch)
        plain = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
        ours = descend(
            list(model.parameters()),
            lambda: model(*batch, labels=labels, sentence_order_labels=orders).loss,
            STEPS,
        )
        expected = descend(
            list(plain.values()), lambda: literal_masked_lm_loss(plain, model.config, **as_lists(batch))[0], STEPS
        )
    assert ours[-1] < ours[0] - 0.3
    assert ours == pytest.approx(expected, rel=1e-5)


# Two processes


def half_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    """Of one half of the batch, with that half's own noise and dropout."""
    batch = texts(lengths=(7, 3, 6), seed=10 + rank)
    labels, orders = masked_words(batch)
    torch.manual_seed(100 * step + rank)
    return model(*batch, labels=labels, sentence_order_labels=orders).loss


def in_shards(model: nn.Module) -> nn.Module:
    """By FSDP2: the experts of all blocks, their attention, and the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for part in (model.model.encoder.ffn.experts, model.model.encoder.attention, model):
        fully_shard(part, mesh=mesh)
    return model


def train_one_rank(rank: int, folder: str) -> None:
    """By DDP and by FSDP2; the parameters go into a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, parallel in (("ddp", nn.parallel.DistributedDataParallel), ("fsdp2", in_shards)):
        model = distributed_model()
        wrapped = parallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), RATE)
        for step in range(3):
            optimizer.zero_grad()
            half_loss(wrapped, step, rank).backward()
            optimizer.step()
        whole = {n: t.full_tensor() if name == "fsdp2" else t for n, t in model.state_dict().items()}
        torch.save(whole, f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def distributed_model() -> nn.Module:
    return tiny_text(WideNetForMaskedLM, capacity_factor=0.8).double()


def test_two_ranks_are_one_process_that_routes_two_halves(tmp_path: pathlib.Path) -> None:
    torch.multiprocessing.spawn(train_one_rank, args=(str(tmp_path),), nprocs=2)
    model = distributed_model()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for step in range(3):
        optimizer.zero_grad()
        ((half_loss(model, step, 0) + half_loss(model, step, 1)) / 2).backward()
        optimizer.step()
    start = distributed_model().state_dict()
    for parallel in ("ddp", "fsdp2"):
        first, second = (torch.load(tmp_path / f"{parallel}-{rank}.pt") for rank in range(2))
        for name, parameter in model.state_dict().items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], parameter, rtol=1e-12, atol=1e-12)
            assert not torch.equal(parameter, start[name])


# Interrupted


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_resumed_training_has_the_same_bits(kind: str) -> None:
    """With dropout and noise: model, optimizer and torch's generator are all there is to save."""

    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny(seed) if kind == "images" else tiny_text(WideNetForMaskedLM, seed)
        return model, torch.optim.AdamW(model.parameters(), 1e-2)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            if kind == "images":
                images, labels = samples()
                output = model(images, labels)
            else:
                batch = texts()
                labels, orders = masked_words(batch)
                output = model(*batch, labels=labels, sentence_order_labels=orders)
            output.loss.backward()
            optimizer.step()

    model, optimizer = fresh(seed=0)
    train(model, optimizer, 3)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), torch.get_rng_state()], buffer)
    train(model, optimizer, 3)

    resumed, its_optimizer = fresh(seed=1)
    buffer.seek(0)
    weights, moments, random = torch.load(buffer)
    resumed.load_state_dict(weights)
    its_optimizer.load_state_dict(moments)
    torch.set_rng_state(random)
    train(resumed, its_optimizer, 3)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
