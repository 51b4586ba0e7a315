"""Every peer computes the layer that it is timed for: result and gradients, whatever the routing, dropping or not."""

import oracle
import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.benchmarks import adapters, agreement, layer, peers, run
from widenet_kernels.benchmarks.peers import PEERS, exact, gradients, named
from widenet_kernels.benchmarks.shapes import Case, Inputs
from widenet_kernels.benchmarks.timing import Unavailable

SHAPES = (
    Case("capacity", 40, 16, 24, 4, 2),
    Case("dropless, gated", 40, 16, 24, 4, 2, None, "swiglu", bias=False, normalize=True),
    Case("choices are dropped", 40, 16, 24, 4, 2, 1.0, routing="zipf"),
    Case("three choices, most on few experts", 64, 16, 24, 8, 3, 0.9, "swiglu", bias=False, routing="zipf"),
    Case("some experts without a token", 3, 16, 24, 8, 2, None),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def inputs_of(shape: Case, dtype: torch.dtype = torch.float64) -> Inputs:
    return Inputs(shape, "cpu", dtype)


def built(name: str, inputs: Inputs) -> peers.Layer:
    if not PEERS[name].installed:
        pytest.skip(f"{name} is not installed")
    return PEERS[name].build(inputs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", [name for name in PEERS if name != "torch grouped_mm"])
def test_a_peer_gives_the_layer_and_its_gradients(name, shape, dtype):
    inputs = inputs_of(shape, dtype)
    peer = built(name, inputs)
    result = named(peer, gradients(peer, inputs.x, inputs.grad)())
    assert agreement.error_by_name(result, exact(inputs, peer.normalize, backward=True)) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_grouped_mm_gives_the_layer_and_its_gradients(shape):
    inputs = inputs_of(shape, torch.float32)  # it knows no float64
    peer = PEERS["torch grouped_mm"].build(inputs)
    result = named(peer, gradients(peer, inputs.x, inputs.grad)())
    assert agreement.error_by_name(result, exact(inputs, peer.normalize, backward=True)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_ours_is_held_to_the_same(shape):
    inputs = inputs_of(shape)
    ours = layer.ours(inputs)
    result = named(ours, gradients(ours, inputs.x, inputs.grad)())
    assert set(result) == {"y", "x", "router", "w1", "w2"} | ({"b1", "b2"} if shape.bias else set())
    assert agreement.error_by_name(result, exact(inputs, shape.normalize, backward=True)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_truth_is_the_literal_loop(shape):
    inputs = inputs_of(shape)
    weight, index, _ = oracle.topk_gate(oracle.logits(inputs.x, inputs.router), shape.K, normalize=shape.normalize)
    lists = oracle.plan_routing(index, shape.E, shape.capacity)
    tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in lists.items()}
    plan = wk.RoutingPlan(**tensors, num_rows=len(lists["row_choice"]), num_experts=shape.E, k=shape.K, capacity=None)
    y = oracle.moe_ffn(inputs.x, weight, plan, *inputs.experts.values(), shape.activation)
    torch.testing.assert_close(exact(inputs, shape.normalize, backward=True)["y"], y, rtol=1e-11, atol=1e-11)


def test_the_shapes_drop_what_they_say():
    dropped = [shape.T * shape.K - inputs_of(shape).served for shape in SHAPES]
    assert [count > 0 for count in dropped] == [False, False, True, True, False]
    assert 0 in inputs_of(SHAPES[-1]).demand


def test_a_wrong_answer_is_seen():
    inputs = inputs_of(SHAPES[0])
    truth = exact(inputs, False, backward=True)
    wrong = {name: t.clone() for name, t in truth.items()}
    wrong["w1"][2, 3] *= 1.5  # one row
    assert agreement.error_by_name(wrong, truth) > 0.1
    wrong["w1"][2, 3] = float("nan")
    assert not agreement.error_by_name(wrong, truth) <= 1


@pytest.mark.parametrize("name", adapters.PEERS)
def test_a_package_that_needs_a_gpu_says_so(name):
    with pytest.raises(Unavailable, match="needs a GPU"):
        adapters.PEERS[name].build(inputs_of(SHAPES[1]))


def test_st_moe_in_half_precision():
    pytest.importorskip("st_moe_pytorch")
    inputs = inputs_of(SHAPES[0], torch.bfloat16)
    peer = PEERS["st-moe-pytorch"].build(inputs)
    result = named(peer, gradients(peer, inputs.x, inputs.grad)())
    assert agreement.error_by_name(result, exact(inputs, peer.normalize, backward=True)) < run.LARGEST_ERROR["bf16"]


def test_st_moe_needs_two_choices():
    pytest.importorskip("st_moe_pytorch")
    with pytest.raises(Unavailable, match="at least 2"):
        PEERS["st-moe-pytorch"].build(inputs_of(Case("one choice", 40, 16, 24, 4, 1)))
