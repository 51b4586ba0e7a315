"""Lamb against a version in float64 NumPy, written from the formulas; and what an optimizer must do besides."""

import copy
import io
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from widenet_kernels.training import Lamb

SHAPES = [
    (5, 3),  # a weight
    (7,),  # a bias
    (),  # one number
    (2, 3, 4),  # experts in one tensor
    (1, 1),  # where the trust ratio makes the update as long as the weight whatever the gradient
    (0, 4),  # nothing: both norms are 0
]


class LiteralLamb:
    """Algorithm 2 of You et al. 2020 (arXiv 1904.00962, phi(x) = x) for one parameter at a time.

    With what the authors' optimizer, that of TensorFlow Addons, settles: Adam's bias corrections, epsilon outside the
    root, the decay inside the norm of the update, and a trust ratio of 1 where either norm is 0.
    """

    def __init__(self, groups: list[list[Tensor]], settings: list[dict[str, Any]], clip: float | None) -> None:
        self.weights = [[weight.detach().double().cpu().numpy().copy() for weight in group] for group in groups]
        self.moments = [[(np.zeros_like(w), np.zeros_like(w), 0) for w in group] for group in self.weights]
        self.settings, self.clip = settings, clip

    def step(self, grads: list[list[np.ndarray | None]]) -> None:
        every = [grad.ravel() for group in grads for grad in group if grad is not None]
        norm = math.sqrt(sum(float(x) ** 2 for grad in every for x in grad))
        self.clipped = self.clip is not None and norm > self.clip
        for g, (settings, group) in enumerate(zip(self.settings, grads, strict=True)):
            lr, (beta1, beta2), eps, decay = (settings[name] for name in ("lr", "betas", "eps", "weight_decay"))
            for i, grad in enumerate(group):
                if grad is None:
                    continue
                grad = grad * self.clip / norm if self.clipped else grad
                w, (m, v, t) = self.weights[g][i], self.moments[g][i]
                t = t + 1
                m = beta1 * m + (1 - beta1) * grad
                v = beta2 * v + (1 - beta2) * grad**2
                self.moments[g][i] = m, v, t
                r = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
                update = r + decay * w
                w_norm, update_norm = math.sqrt((w**2).sum()), math.sqrt((update**2).sum())
                ratio = w_norm / update_norm if w_norm > 0 and update_norm > 0 else 1.0
                self.weights[g][i] = w - lr * ratio * update


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str = "cpu") -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(device, dtype)) for shape in shapes]


def set_grads(groups: list[list[nn.Parameter]], size: float = 1.0) -> list[list[np.ndarray | None]]:
    """Random gradients for all that want one; what they are in float64."""
    for weight in (weight for group in groups for weight in group):
        noise = torch.randn(weight.shape, dtype=torch.float64) * size
        weight.grad = noise.to(weight) if weight.requires_grad else None
    return [[None if w.grad is None else w.grad.double().cpu().numpy() for w in group] for group in groups]


def assert_equals_literal(groups: list[list[nn.Parameter]], literal: LiteralLamb, tolerance: float) -> None:
    for group, expected in zip(groups, literal.weights, strict=True):
        for weight, right in zip(group, expected, strict=True):
            torch.testing.assert_close(
                weight.detach().double().cpu(), torch.as_tensor(right), rtol=tolerance, atol=tolerance
            )


# fp32: twenty steps of a few roundings each, of weights near 1
DTYPES = [pytest.param(torch.float64, 1e-12, id="fp64"), pytest.param(torch.float32, 2e-5, id="fp32")]
CLIPS = [pytest.param(None, id="no-clip"), pytest.param(1.0, id="clip"), pytest.param(1e6, id="clip-far-away")]
TWO_GROUPS = [
    {"lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1},
    {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.0},
]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_every_step_is_that_of_the_formulas(
    device: str, dtype: torch.dtype, tolerance: float, clip: float | None
) -> None:
    groups = [parameters(SHAPES, dtype, device), parameters(SHAPES[:3], dtype, device)]
    optimizer = Lamb(
        [{"params": group, **settings} for group, settings in zip(groups, TWO_GROUPS, strict=True)],
        lr=1.0,
        max_grad_norm=clip,
    )
    literal = LiteralLamb(groups, TWO_GROUPS, clip)
    for step in range(20):
        grads = set_grads(groups, size=0.01 if step % 4 == 3 else 1.0)  # now and then below the clipping norm of 1
        optimizer.step()
        literal.step(grads)
        assert literal.clipped == (clip == 1.0 and step % 4 != 3)
        assert_equals_literal(groups, literal, tolerance)


def test_one_step_by_hand() -> None:
    """m / (1 - beta1) = g and v / (1 - beta2) = g^2, so the first r is the gradients' signs."""
    weight = nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
    weight.grad = torch.tensor([0.3, 0.4], dtype=torch.float64)
    Lamb([weight], lr=0.1, eps=0.0, weight_decay=0.5).step()
    update = np.array([1 + 1.5, 1 - 2.0])
    expected = np.array([3.0, -4.0]) - 0.1 * 5 / math.hypot(*update) * update
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-14)


def test_defaults_are_those_of_the_paper() -> None:
    (group,) = Lamb(parameters([(2,)], torch.float32), lr=0.01).param_groups
    del group["params"]
    recipe = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 1.0}
    assert group == recipe | {"parts": 1}


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99999), (0.0, 0.999), (0.0, 0.0)])
def test_first_step_in_fp32_is_as_exact_as_fp32(betas: tuple[float, float]) -> None:
    """1 - 0.999 in fp32 has lost five digits; and a beta of 0 has no logarithm."""
    weight = nn.Parameter(torch.tensor([2.0, -1.0]))
    weight.grad = torch.tensor([0.75, 0.125])
    optimizer = Lamb([weight], lr=0.5, betas=betas, eps=1.0, weight_decay=3.0)  # this eps shows the size of v
    literal = LiteralLamb([[weight]], [optimizer.param_groups[0]], clip=1.0)
    optimizer.step()
    literal.step([[weight.grad.double().numpy()]])
    np.testing.assert_allclose(weight.detach().numpy(), literal.weights[0][0], rtol=3e-7)


def test_parts_of_a_parameter_are_as_parameters_of_their_own() -> None:
    """Here a weight and a bias of three, of very different sizes; beside them one that is not cut."""
    whole = parameters([(6, 2), (3,), (6,)], torch.float64)
    with torch.no_grad():
        for weight in whole:
            weight.mul_(torch.logspace(-2, 2, len(weight)).view(-1, *[1] * (weight.dim() - 1)))
    parts = [[nn.Parameter(part.clone()) for part in weight.detach().chunk(3)] for weight in whole[:2]]
    optimizer = Lamb([{"params": whole[:2], "parts": 3}, {"params": whole[2:]}], lr=0.1)
    literal = LiteralLamb([*parts, whole[2:]], [optimizer.param_groups[0]] * 3, clip=1.0)
    for _ in range(3):
        grads = set_grads([whole])[0]
        optimizer.step()
        literal.step([np.split(grads[0], 3), np.split(grads[1], 3), grads[2:]])
    expected = [[np.concatenate(literal.weights[i]) for i in range(2)] + literal.weights[2]]
    literal.weights = expected
    assert_equals_literal([whole], literal, 1e-12)


def test_norms_of_zero_give_a_trust_ratio_of_one() -> None:
    at_zero, without_update = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
    at_zero.grad, without_update.grad = torch.tensor([0.1, -0.1, 0.2, 0.3]), torch.zeros(4)
    Lamb([{"params": [at_zero]}, {"params": [without_update], "weight_decay": 0.0}], lr=0.5).step()
    torch.testing.assert_close(at_zero.data, torch.tensor([-0.5, 0.5, -0.5, -0.5]), rtol=1e-4, atol=0)
    assert torch.equal(without_update.data, torch.ones(4))


def test_clipping_is_of_all_groups_together_and_leaves_the_gradients() -> None:
    """Clipped by itself, each of the two would keep its direction and length: epsilon shows what came of them."""
    groups = [[nn.Parameter(torch.tensor([1.0]))], [nn.Parameter(torch.tensor([1.0]))]]
    optimizer = Lamb([{"params": group} for group in groups], lr=0.1, eps=1.0, weight_decay=1.0)
    literal = LiteralLamb(groups, [optimizer.param_groups[0]] * 2, clip=1.0)
    groups[0][0].grad, groups[1][0].grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    moments = [optimizer.state[group[0]]["exp_avg"].item() for group in groups]
    assert moments == pytest.approx([0.1 * 3 / 5, 0.1 * 4 / 5])
    literal.step([[np.array([3.0])], [np.array([4.0])]])
    assert_equals_literal(groups, literal, 1e-6)
    assert (groups[0][0].grad.item(), groups[1][0].grad.item()) == (3.0, 4.0)


def test_clipping_that_is_not_needed_changes_no_bit() -> None:
    results = []
    for clip in (None, 1e3):
        torch.manual_seed(0)
        groups = [parameters(SHAPES, torch.float32)]
        optimizer = Lamb(groups[0], lr=0.1, max_grad_norm=clip)
        for _ in range(3):
            set_grads(groups)
            optimizer.step()
        results.append(groups[0])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_parameters_without_a_gradient_are_left_alone_and_count_their_own_steps() -> None:
    weights = parameters([(3,), (3,), (3,)], torch.float64)
    weights[1].requires_grad_(False)
    before = [weight.detach().clone() for weight in weights]
    optimizer = Lamb(weights, lr=0.1)
    literal = LiteralLamb([weights], [optimizer.param_groups[0]], clip=1.0)
    for step in range(4):
        grads = set_grads([weights])
        if step < 2:
            weights[2].grad = grads[0][2] = None
        optimizer.step()
        literal.step(grads)
        assert torch.equal(weights[1], before[1])
        assert torch.equal(weights[2], before[2]) == (step < 2)
        assert_equals_literal([weights], literal, 1e-12)
    assert weights[1] not in optimizer.state
    assert [optimizer.state[weights[i]]["step"].item() for i in (0, 2)] == [4, 2]


def test_step_without_any_gradient_does_nothing() -> None:
    weights = parameters([(3,)], torch.float32)
    before = weights[0].detach().clone()
    Lamb(weights, lr=0.1).step()
    assert torch.equal(weights[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_narrow_parameters_have_wide_moments_and_are_rounded_once(dtype: torch.dtype) -> None:
    weights = parameters([(64, 3), (5,)], dtype)
    optimizer = Lamb(weights, lr=0.05)
    literal = LiteralLamb([weights], [optimizer.param_groups[0]], clip=1.0)
    for _ in range(3):
        literal.weights = [[weight.detach().double().numpy() for weight in weights]]  # as they have been rounded
        grads = set_grads([weights])
        optimizer.step()
        literal.step(grads)
        for weight, right, moments in zip(weights, literal.weights[0], literal.moments[0], strict=True):
            error = np.abs(weight.detach().double().numpy() / right - 1).max()
            assert error <= 0.501 * torch.finfo(dtype).eps  # half an ulp, and a little for the fp32 before it
            state = optimizer.state[weight]
            assert {value.dtype for value in state.values()} == {torch.float32}
            np.testing.assert_allclose(state["exp_avg"], moments[0], rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(state["exp_avg_sq"], moments[1], rtol=1e-4, atol=1e-9)


def test_different_dtypes_in_one_group() -> None:
    weights = parameters([(3,), (4,)], torch.float64) + parameters([(3,), (4,)], torch.float32)
    optimizer = Lamb(weights, lr=0.1)
    literal = LiteralLamb([weights], [optimizer.param_groups[0]], clip=1.0)
    for _ in range(3):
        grads = set_grads([weights])
        optimizer.step()
        literal.step(grads)
    assert_equals_literal([weights], literal, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_resumed_from_a_checkpoint_it_goes_on_to_the_same_bits(dtype: torch.dtype) -> None:
    def steps(optimizer: Lamb, weights: list[nn.Parameter], count: int) -> None:
        for _ in range(count):
            set_grads([weights])
            optimizer.step()

    weights = parameters(SHAPES, dtype)
    optimizer = Lamb([{"params": weights[:2]}, {"params": weights[2:], "weight_decay": 0.0}], lr=0.1)
    steps(optimizer, weights, 3)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), weights, torch.get_rng_state()), file)
    steps(optimizer, weights, 3)

    file.seek(0)
    state, resumed_weights, random = torch.load(file, weights_only=False)
    resumed = Lamb([{"params": resumed_weights[:2]}, {"params": resumed_weights[2:]}], lr=9.0, max_grad_norm=7.0)
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["max_grad_norm"] == 1.0
    torch.set_rng_state(random)
    steps(resumed, resumed_weights, 3)
    assert all(torch.equal(one, other) for one, other in zip(weights, resumed_weights, strict=True))
    for one, other in zip(weights, resumed_weights, strict=True):
        for name, value in optimizer.state[one].items():
            assert value.dtype == resumed.state[other][name].dtype
            assert torch.equal(value, resumed.state[other][name]), name


def test_a_copy_steps_as_well() -> None:
    weights = parameters([(3,)], torch.float32)
    optimizer = Lamb(weights, lr=0.1, max_grad_norm=0.5)
    twin = copy.deepcopy(optimizer)
    twin_weight = twin.param_groups[0]["params"][0]
    set_grads([weights])
    twin_weight.grad = weights[0].grad
    optimizer.step()
    twin.step()
    assert torch.equal(twin_weight, weights[0])


def test_closure_computes_the_gradients() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = Lamb([weight], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert weight.item() < 2.0


def test_learning_rate_may_be_a_tensor() -> None:
    results = []
    for lr in (0.25, torch.tensor(0.25)):
        torch.manual_seed(0)
        groups = [parameters([(3,), (2, 2)], torch.float32)]
        set_grads(groups)
        Lamb(groups[0], lr=lr).step()
        results.append(groups[0])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_step_reads_nothing_back() -> None:
    """Tensors on the device meta have no values: to ask for one is an error there."""
    groups = [parameters(SHAPES, torch.float32, "meta"), parameters(SHAPES, torch.bfloat16, "meta")]
    for weight in groups[0] + groups[1]:
        weight.grad = torch.empty_like(weight)
    with pytest.raises(RuntimeError, match="meta"):
        groups[0][0].sum().item()
    optimizer = Lamb([{"params": group} for group in groups], lr=torch.tensor(0.1, device="meta"))
    for _ in range(2):
        optimizer.step()
    assert all(state["step"].device.type == "meta" for state in optimizer.state.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_in_a_cuda_graph_is_the_step() -> None:
    weights = parameters(SHAPES[:4], torch.float32, "cuda")
    twins = [nn.Parameter(weight.detach().clone()) for weight in weights]
    optimizer, plain = Lamb(weights, lr=torch.tensor(0.1, device="cuda")), Lamb(twins, lr=0.1)
    set_grads([weights])
    for weight, twin in zip(weights, twins, strict=True):
        twin.grad = weight.grad
    optimizer.step()  # makes the state
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        plain.step()
    torch.testing.assert_close(weights, twins, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Lamb: lr: expected a finite number >= 0, got -1.0"),
        ({"lr": math.nan}, "Lamb: lr: expected a finite number >= 0, got nan"),
        ({"betas": (0.9, 1.0)}, "Lamb: betas: expected two numbers, each at least 0 and below 1, got (0.9, 1.0)"),
        ({"eps": -1e-6}, "Lamb: eps: expected a finite number >= 0, got -1e-06"),
        ({"weight_decay": math.inf}, "Lamb: weight_decay: expected a finite number >= 0, got inf"),
        ({"max_grad_norm": 0.0}, "Lamb: max_grad_norm: expected a finite number above 0, or None, got 0.0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Lamb(parameters([(2,)], torch.float32), **{"lr": 0.1} | options)


def test_group_with_a_clipping_norm_of_its_own() -> None:
    optimizer = Lamb(parameters([(2,)], torch.float32), lr=0.1)
    message = "Lamb: max_grad_norm: expected 1.0, one for all groups, got 2.0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        optimizer.add_param_group({"params": parameters([(2,)], torch.float32), "max_grad_norm": 2.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("parts", [0, 4, 6])
def test_parts_that_parameters_cannot_be_cut_into(parts: int) -> None:
    message = f"Lamb: parts: expected a divisor of the parameters' first dimensions [6, 3], got {parts}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Lamb([{"params": parameters([(6, 2), (3,)], torch.float32), "parts": parts}], lr=0.1)


def test_sparse_and_complex_gradients_are_refused_before_anything_changes() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    number = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    number.grad = torch.ones_like(number)
    for refused, got in (
        (table.weight, "torch.sparse_coo, torch.float32 of shape [4, 2]"),
        (number, "torch.strided, torch.complex64 of shape [2]"),
    ):
        dense = nn.Parameter(torch.ones(2))
        dense.grad = torch.ones(2)
        message = f"Lamb: grad: expected a dense tensor of real numbers, got {got}"
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            Lamb([dense, refused], lr=0.1).step()
        assert torch.equal(dense.data, torch.ones(2))
