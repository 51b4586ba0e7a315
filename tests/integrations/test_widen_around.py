"""What people run around a widened model: checkpointing, copies, evaluation, autocast, compile, two processes."""

import copy
import pathlib
import pickle

import pytest
import torch
import torch.distributed
from dense_models import (
    OPTIONS,
    assert_equal_gradients,
    batch,
    checkpointed,
    dense,
    gradients,
    layers_of,
    loss_of,
    settle,
    widened,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from widenet_kernels.integrations import moe_losses, widen
from widenet_kernels.testing.numerics import assert_float64

# Checkpointing


def calls_of(model: nn.Module) -> list[nn.Module]:
    """Fills with the MoE layers that are called from now on, to the end or not."""
    called: list[nn.Module] = []
    for layer in layers_of(model):
        layer.register_forward_pre_hook(lambda layer, _: called.append(layer))
    return called


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
@pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
def test_checkpointing_counts_once(reentrant: bool, share: bool) -> None:
    model = widened("encoder", share=share, noise_std=0.3).train()
    given = batch("encoder")
    torch.manual_seed(0)  # for the routers' noise, which is the same when a layer runs again
    loss = 5 * loss_of("encoder", model, given)
    expected = gradients(model, loss)
    checkpointed(model, reentrant)
    given["x"].requires_grad_()
    for _ in range(2):
        torch.manual_seed(0)
        again = 5 * loss_of("encoder", model, given)
        assert torch.equal(again, loss)
        assert_equal_gradients(gradients(model, again), expected)
    called = calls_of(model)
    again = loss_of("encoder", model, given)
    forward = len(called)
    again.backward()
    assert len(called) == 2 * forward  # they did run again


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
@pytest.mark.parametrize("kind", ["vit", "bert", "llama"])
def test_checkpointing_of_transformers(kind: str, reentrant: bool) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    model = widened(kind).train()
    given = batch(kind)
    expected = gradients(model, loss_of(kind, model, given))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if kind == "vit":  # reentrant checkpointing needs an input with a gradient
        model.vit.embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_())
    called = calls_of(model)
    assert_equal_gradients(gradients(model, loss_of(kind, model, given)), expected)
    assert len(called) == 6


def test_a_part_after_reentrant_checkpointing_gets_its_own_gradient_alone() -> None:
    model = widened("encoder").train()
    given = batch("encoder")
    layer = model.encoder.layers[0]
    expected = torch.autograd.grad(layer(given["x"]).square().sum(), layer.linear1.layer.router.weight)[0]
    checkpointed(model, True)
    given["x"].requires_grad_()
    gradients(model, loss_of("encoder", model, given))
    got = torch.autograd.grad(layer(given["x"]).square().sum(), layer.linear1.layer.router.weight)[0]
    assert_float64(got, expected)


def test_a_loss_without_the_term_gets_no_gradient_of_an_earlier_one() -> None:
    model = widened("encoder").train()
    given = batch("encoder")
    expected = gradients(model, model(**given).square().mean())
    checkpointed(model, True)
    given["x"].requires_grad_()
    gradients(model, loss_of("encoder", model, given))
    assert_equal_gradients(gradients(model, model(**given).square().mean()), expected)


def test_networks_checkpointed_by_themselves() -> None:
    """The attention does not run again; the mask is that of its last call."""
    model = widened("encoder").train()
    given = batch("encoder")
    expected = gradients(model, loss_of("encoder", model, given))
    for layer in model.encoder.layers:
        forward = layer.linear1.forward
        layer.linear1.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    assert_equal_gradients(gradients(model, loss_of("encoder", model, given)), expected)


# What people run around a model


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_their_own_ways(kind: str, how: str) -> None:
    model = widened(kind, share=True)
    given = batch(kind)
    loss, term = loss_of(kind, model, given), moe_losses(model)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with pytest.raises(RuntimeError, match="expected a forward"):
        moe_losses(other)
    again = loss_of(kind, other, given)
    assert torch.equal(again, loss)
    loss_of(kind, settle(other), batch(kind, seed=2))
    assert not torch.equal(moe_losses(other), term)
    assert torch.equal(moe_losses(model), term)


def test_state_dict_round_trip(kind: str) -> None:
    model = widened(kind)
    other = dense(kind)
    widen(other, **OPTIONS)
    other.load_state_dict(model.state_dict())
    given = batch(kind)
    assert torch.equal(loss_of(kind, other, given), loss_of(kind, model, given))


def test_functional_call() -> None:
    model, other = widened("encoder"), settle(widened("encoder"))
    given = batch("encoder")
    expected = other(**given)
    term = moe_losses(other)
    output = torch.func.functional_call(model, dict(other.named_parameters()), kwargs=given)
    assert torch.equal(output, expected)
    assert torch.equal(moe_losses(model), term)


def test_evaluation(kind: str) -> None:
    model = widened(kind)
    given = batch(kind)
    loss = loss_of(kind, model, given)
    with torch.no_grad():
        quiet = loss_of(kind, model, given)
    assert torch.equal(quiet, loss)
    assert not quiet.requires_grad
    assert not moe_losses(model).requires_grad


def test_a_frozen_model_stays_frozen() -> None:
    model = widened("encoder").requires_grad_(False)
    assert not loss_of("encoder", model, batch("encoder")).requires_grad


def test_autocast_and_a_scaled_loss() -> None:
    """What scales the loss scales the term."""
    pytest.importorskip("transformers", minversion="5.0")
    model = widened("bert").float().train()
    given = batch("bert")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**given).loss
    assert loss.dtype == torch.float32
    once = gradients(model, loss)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**given).loss
    for name, gradient in gradients(model, 1024 * loss).items():
        assert torch.equal(gradient, 1024 * once[name]), name  # a power of two rounds nothing


def test_compiled_in_one_graph_for_every_length() -> None:
    model = widened("encoder", {"num_layers": 2}, share=True).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)

    def check(length: int) -> None:
        given = {name: value[:, :length].clone() for name, value in batch("encoder").items()}
        loss = loss_of("encoder", model, given)
        again = loss_of("encoder", compiled, given)
        assert_float64(again, loss)
        assert_equal_gradients(gradients(model, again), gradients(model, loss))

    check(7)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(7)
        check(5)


def test_compiled_bert() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    model = widened("bert", {"num_hidden_layers": 1}).train()
    given = batch("bert")
    loss = model(**given).loss
    expected = gradients(model, loss)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        again = compiled(**given).loss
        assert_float64(again, loss)
        assert_equal_gradients(gradients(model, again), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpoint", "reentrant"])
def test_compiled_with_checkpointing(reentrant: bool) -> None:
    model = widened("encoder").train()
    given = batch("encoder")
    loss = loss_of("encoder", model, given)
    expected = gradients(model, loss)
    checkpointed(model, reentrant)
    given["x"].requires_grad_()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        again = loss_of("encoder", compiled, given)
        assert_float64(again, loss)
        assert_equal_gradients(gradients(model, again), expected)


# Several processes


def test_what_is_distributed_already_is_refused(tmp_path: pathlib.Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.parallel.DistributedDataParallel(dense("encoder")))
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ValueError, match=r"^widen: model: expected .* afterwards, .* got a Sequential that has it"):
        widen(model, **OPTIONS)
    assert not layers_of(model)


def distributed_model() -> nn.Module:
    return widened("encoder", share=True).train()


def train_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(distributed_model())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(2):
        optimizer.zero_grad()
        loss_of("encoder", model, batch("encoder", seed=10 * step + rank)).backward()
        optimizer.step()
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one_process_with_two_halves(tmp_path: pathlib.Path) -> None:
    torch.multiprocessing.spawn(train_one_rank, args=(str(tmp_path),), nprocs=2)
    model = distributed_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            (loss_of("encoder", model, batch("encoder", seed=10 * step + rank)) / 2).backward()
        optimizer.step()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    start = distributed_model().state_dict()
    for name, parameter in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter, rtol=1e-12, atol=1e-12)
        assert not torch.equal(parameter, start[name])
