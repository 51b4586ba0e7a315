"""topk_gate: ranking, weights, probabilities and their gradients."""

import math

import eager
import oracle
import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import (
    assert_as_good_as,
    assert_float64,
    assert_gradcheck,
    assert_op_as_good_as,
    assert_same_bits,
)

OP = "topk_gate"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("noisy", [False, True], ids=["quiet", "noisy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", inputs.SHAPES, ids=str)
def test_forward(shape, dtype, noisy, normalize, device, backend):
    logits = inputs.make_logits(shape, dtype=dtype, device=device)
    noise = inputs.normal(shape.T, shape.E, seed=7, device=device) if noisy else None
    gate = wk.topk_gate(logits, shape.K, noise=noise, normalize=normalize, backend=backend)
    cpu_noise = None if noise is None else noise.cpu()
    weight, index, probs = oracle.topk_gate(logits.cpu(), shape.K, cpu_noise, normalize)
    assert_same_bits(gate.expert_index.cpu(), index)
    if dtype == torch.float64:
        assert_float64(gate.weight.cpu(), weight, "weight")
        assert_float64(gate.probs.cpu(), probs, "probs")
    else:
        plain_weight, plain_probs = eager.topk_gate(logits, gate.expert_index, noise, normalize)
        assert_as_good_as(gate.weight.cpu(), plain_weight.cpu(), weight, "weight")
        assert_as_good_as(gate.probs.cpu(), plain_probs.cpu(), probs, "probs")


@pytest.mark.parametrize("num_experts", [1500, 4096])
def test_very_many_experts(num_experts, device, backend):
    logits = inputs.normal(3, num_experts, seed=8, device=device)
    if (device, backend) == ("cuda", "native"):
        with pytest.raises(ValueError, match=rf"up to 1,024 experts, got {num_experts:,}"):
            wk.topk_gate(logits, 20, backend=backend)
        backend = None  # which takes another
    gate = wk.topk_gate(logits, 20, normalize=True, backend=backend)
    weight, index, probs = oracle.topk_gate(logits.cpu(), 20, None, True)
    assert_same_bits(gate.expert_index.cpu(), index)
    plain_weight, plain_probs = eager.topk_gate(logits, gate.expert_index, None, True)
    assert_as_good_as(gate.weight.cpu(), plain_weight.cpu(), weight, "weight")
    assert_as_good_as(gate.probs.cpu(), plain_probs.cpu(), probs, "probs")


def assert_gradient(shape, dtype, pick, normalize, device, backend):
    """``pick(weight, probs)`` is the tensor that the gradient comes through."""
    logits = inputs.make_logits(shape, dtype=dtype, device=device)
    noise = inputs.normal(shape.T, shape.E, seed=7, dtype=dtype, device=device)
    index = wk.topk_gate(logits, shape.K, noise=noise, backend=backend).expert_index

    def op(logits):
        gate = wk.topk_gate(logits, shape.K, noise=noise, normalize=normalize, backend=backend)
        return pick(gate.weight, gate.probs)

    def plain(logits):
        return pick(*eager.topk_gate(logits, index, noise, normalize))

    assert_op_as_good_as(op, plain, {"logits": logits})


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", inputs.SHAPES, ids=str)
def test_gradient(shape, dtype, normalize, device, backend):
    assert_gradient(shape, dtype, lambda *both: torch.cat(both, dim=1), normalize, device, backend)


@pytest.mark.parametrize("through", [0, 1], ids=["weight", "probs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_through_one_output_alone(dtype, through, device, backend):
    assert_gradient(inputs.ORDINARY, dtype, lambda *both: both[through], True, device, backend)


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
def test_gradcheck(normalize, device, backend):
    logits = inputs.normal(5, 4, seed=1, dtype=torch.float64, device=device).requires_grad_()
    noise = inputs.normal(5, 4, seed=2, dtype=torch.float64, device=device)

    def weight_and_probs(leaf):
        gate = wk.topk_gate(leaf, 2, noise=noise, normalize=normalize, backend=backend)
        return gate.weight, gate.probs

    assert_gradcheck(weight_and_probs, logits)


TIES = {
    "all equal": ([0.5, 0.5, 0.5, 0.5], [0, 1, 2, 3]),
    "two equal": ([0.0, 2.0, 2.0, 1.0], [1, 2, 3, 0]),
    "minus zero is zero": ([-0.0, 0.0, -0.0, 0.0], [0, 1, 2, 3]),
    "minus zero behind zero": ([-1.0, -0.0, 0.0, -0.0], [1, 2, 3, 0]),
    "equal probabilities, different logits": ([-200.0, 100.0, -199.0, -198.0], [1, 3, 2, 0]),
    "neighbours in fp32": ([1.0, 1.0 + 2**-23, 1.0, 1.0], [1, 0, 2, 3]),
    "subnormal": ([0.0, 1e-45, -1e-45, -0.0], [1, 0, 3, 2]),
}


@pytest.mark.parametrize(("row", "expected"), TIES.values(), ids=TIES)
def test_ties_go_to_the_lower_expert(row, expected, device, backend):
    logits = torch.tensor([row, row[::-1]], device=device)
    gate = wk.topk_gate(logits, 4, backend=backend)
    assert gate.expert_index[0].tolist() == expected
    assert_same_bits(gate.expert_index.cpu(), oracle.topk_gate(logits.cpu(), 4)[1])


STRANGE = {
    "nan": ([NAN, 1.0, 2.0, 0.0], [2, 1, 3, 0]),
    "all nan": ([NAN] * 4, [0, 1, 2, 3]),
    "negative nan": ([-NAN, 1.0, NAN, 2.0], [3, 1, 0, 2]),
    "nan ranks below -inf": ([NAN, -INF, NAN, -INF], [1, 3, 0, 2]),
    "all -inf": ([-INF] * 4, [0, 1, 2, 3]),
    "inf": ([0.0, INF, 1.0, INF], [1, 3, 2, 0]),
    "inf and nan": ([-INF, INF, NAN, 0.0], [1, 3, 0, 2]),
    "-inf among finite ones": ([-INF, 0.0, 1.0, -INF], [2, 1, 0, 3]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize(("row", "expected"), STRANGE.values(), ids=STRANGE)
def test_nan_and_infinite_logits(row, expected, k, dtype, device, backend):
    fine = [1.0, 0.0, 3.0, 2.0]
    logits = torch.tensor([row, fine], dtype=dtype, device=device)
    gate = wk.topk_gate(logits, k, backend=backend)
    assert gate.expert_index.tolist() == [expected[:k], [2, 3, 0, 1][:k]]
    weight, _, probs = oracle.topk_gate(logits.cpu(), k)
    torch.testing.assert_close(gate.weight.cpu().double(), weight, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(gate.probs.cpu().double(), probs, rtol=1e-6, atol=0, equal_nan=True)
    if any(math.isnan(v) for v in row):
        assert gate.weight[0].isnan().all()
        assert gate.probs[0].isnan().all()


def test_ranking_uses_fp32_for_half_logits_with_noise(device, backend):
    """256 + 0.5 is 256 in bf16: the noise must decide all the same."""
    logits = torch.full((1, 3), 256.0, dtype=torch.bfloat16, device=device)
    noise = torch.tensor([[0.0, 0.25, 0.5]], device=device)
    assert wk.topk_gate(logits, 3, noise=noise, backend=backend).expert_index.tolist() == [[2, 1, 0]]


def test_float64_logits_rank_in_float64(device, backend):
    logits = torch.tensor([[1.0, 1.0 + 2**-40]], dtype=torch.float64, device=device)
    assert wk.topk_gate(logits, 2, backend=backend).expert_index.tolist() == [[1, 0]]


def test_weight_is_the_raw_probability(device, backend):
    gate = wk.topk_gate(inputs.make_logits(inputs.ORDINARY, device=device), 2, backend=backend)
    assert_same_bits(gate.weight, gate.probs.gather(1, gate.expert_index.long()))
    assert (gate.weight.sum(-1) < 1).all()


def test_normalized_weights_sum_to_one(device, backend):
    gate = wk.topk_gate(inputs.make_logits(inputs.ORDINARY, device=device), 3, normalize=True, backend=backend)
    torch.testing.assert_close(gate.weight.sum(-1), torch.ones(16, device=device))


def test_noise_is_a_constant_for_autograd(device, backend):
    logits = inputs.make_logits(inputs.ORDINARY, device=device).requires_grad_()
    noise = torch.randn_like(logits, requires_grad=True)
    gate = wk.topk_gate(logits, 2, noise=noise, backend=backend)
    (gate.weight.sum() + gate.probs.square().sum()).backward()
    assert noise.grad is None
    assert logits.grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, device, backend):
    logits = inputs.make_logits(inputs.ORDINARY, dtype=dtype, device=device).requires_grad_()
    gate = wk.topk_gate(logits, 2, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (gate.weight.dtype, gate.expert_index.dtype, gate.probs.dtype) == (wide, torch.int32, wide)
    gate.weight.sum().backward()
    assert logits.grad.dtype == dtype
    assert not gate.expert_index.requires_grad


@pytest.mark.parametrize("noise_dtype", DTYPES, ids=str)
def test_noise_of_any_float_dtype(noise_dtype, device, backend):
    logits = inputs.make_logits(inputs.ORDINARY, device=device)
    noise = inputs.normal(16, 4, seed=3, dtype=noise_dtype, device=device)
    gate = wk.topk_gate(logits, 2, noise=noise, backend=backend)
    assert gate.probs.dtype == torch.float32
    assert_same_bits(gate.expert_index.cpu(), oracle.topk_gate(logits.cpu(), 2, noise.cpu())[1])


def test_strided_logits_noise_and_gradients(device, backend):
    shape = inputs.ORDINARY
    base = inputs.make_logits(shape, device=device)
    noise = inputs.normal(shape.T, shape.E, seed=3, device=device)
    grad_probs = inputs.normal(1, shape.E, seed=4, device=device)

    def run(logits, noise, grad_weight, grad_probs):
        logits = logits.detach().requires_grad_()
        gate = wk.topk_gate(logits, 2, noise=noise, normalize=True, backend=backend)
        grad = torch.autograd.grad((gate.weight, gate.probs), logits, (grad_weight, grad_probs))
        return *gate, *grad

    plain = run(base, noise, torch.ones(shape.T, 2, device=device), grad_probs.repeat(shape.T, 1))
    strided = run(
        base.t().contiguous().t(),
        torch.stack([noise, noise], -1)[..., 0],
        torch.ones((), device=device).expand(shape.T, 2),
        grad_probs.expand(shape.T, -1),
    )
    for a, b in zip(strided, plain, strict=True):
        assert_same_bits(a, b)
