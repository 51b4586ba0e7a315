"""What the limits compute: the products of a layer, all of them and no others, and a copy of so many bytes."""

import pytest
import torch

from widenet_kernels.benchmarks import counts, limits
from widenet_kernels.benchmarks.shapes import Case, Inputs

CASES = (
    Case("choices are dropped", 40, 16, 24, 4, 2, 0.5),
    Case("gated, some experts without a token", 3, 16, 24, 8, 2, None, "swiglu", bias=False),
)
FORWARD = ("z", "out")
FIRST_BACKWARD, SECOND_BACKWARD = ("grad_x", "grad_w1"), ("grad_hidden", "grad_w2")
EVERY = (*FORWARD, *FIRST_BACKWARD, *SECOND_BACKWARD)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def inputs(request):
    return Inputs(request.param, "cpu", torch.float32)


@pytest.fixture(params=[False, True], ids=["expert by expert", "dense"])
def gemms(request, inputs):
    """With NaN in everything that a product writes."""
    gemms = limits.Gemms(inputs, dense=request.param)
    for name in EVERY:
        getattr(gemms, name).fill_(float("nan"))
    return gemms


def expert_of_rows(gemms, inputs):
    if len(gemms.w1) == 1:
        return [0] * inputs.served
    return [expert for expert, count in enumerate(inputs.counts) for _ in range(count)]


def expected(gemms, inputs):
    """Row by row in float64; the gradients of an expert's weights are the sums over its rows."""
    wide = {name: tensor.double() for name, tensor in vars(gemms).items() if isinstance(tensor, torch.Tensor)}
    found = {name: torch.zeros_like(wide[name]) for name in EVERY}
    for row, expert in enumerate(expert_of_rows(gemms, inputs)):
        w1, w2 = wide["w1"][expert], wide["w2"][expert]
        found["z"][row] = wide["x"][row] @ w1
        found["out"][row] = wide["hidden"][row] @ w2
        found["grad_x"][row] = w1 @ wide["grad_z"][row]
        found["grad_hidden"][row] = w2 @ wide["grad_out"][row]
        found["grad_w1"][expert] += torch.outer(wide["x"][row], wide["grad_z"][row])
        found["grad_w2"][expert] += torch.outer(wide["hidden"][row], wide["grad_out"][row])
    return found


def assert_computed(gemms, inputs, names):
    """These and nothing else; an expert without rows has no product, and nothing is written for it."""
    served = sorted(set(expert_of_rows(gemms, inputs)))
    for name, truth in expected(gemms, inputs).items():
        result = getattr(gemms, name)
        if name not in names:
            assert result.isnan().all(), name
        elif name.startswith("grad_w"):
            torch.testing.assert_close(result[served].double(), truth[served], rtol=1e-5, atol=1e-4)
        else:
            torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-4)


def test_forward(gemms, inputs):
    gemms.forward()
    assert_computed(gemms, inputs, FORWARD)


def test_forward_backward(gemms, inputs):
    gemms.forward_backward()
    assert_computed(gemms, inputs, EVERY)


@pytest.mark.parametrize(
    ("one_pass", "names"),
    [("forward", ("z",)), ("backward", FIRST_BACKWARD), ("forward+backward", ("z", *FIRST_BACKWARD))],
)
def test_the_first_layer_alone(gemms, inputs, one_pass, names):
    gemms.first_layer(one_pass)
    assert_computed(gemms, inputs, names)


def test_the_products_have_the_flops_that_are_counted(gemms, inputs):
    def flops(*products):
        return sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for some in products for _, a, b in some)

    once = counts.layer_flops(inputs.case, inputs.served)
    assert flops(gemms.first, gemms.second) == once
    assert flops(gemms.first_backward, gemms.second_backward) == 2 * once


def test_a_copy_moves_so_many_bytes():
    copy = limits.copy(1000, "cpu")
    (source,) = copy.args
    source.copy_(torch.arange(source.numel()))
    target = copy()
    assert source.nbytes + target.nbytes == 1000
    assert source.data_ptr() != target.data_ptr()
    assert torch.equal(source, target)


def test_a_copy_on_another_device_moves_as_many():
    copy = limits.copy(1000, "meta")
    assert copy.args[0].nbytes + copy().nbytes == 1000


@pytest.mark.parametrize("normalize", [False, True])
def test_bytes_of_the_routings_backward(normalize):
    inputs = Inputs(Case("counted", 40, 16, 24, 4, 2, 0.5, normalize=normalize), "cpu", torch.bfloat16)
    gate = inputs.gate

    def nbytes(*tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    found = counts.routing_bytes(inputs.case, inputs.plan.num_rows, element=2)
    weights = nbytes(gate.weight, gate.weight) if normalize else nbytes(gate.weight)  # its gradient; itself
    gradients = weights + nbytes(gate.expert_index, gate.probs, gate.probs)  # the last for the gradient of probs
    assert found["topk_gate backward"] == gradients + nbytes(inputs.logits)  # as large as its gradient
    operands = nbytes(inputs.x, inputs.router)
    assert found["route backward"] == gradients + 2 * operands  # they and their gradients
