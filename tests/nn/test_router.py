"""TopKRouter: route with a weight of its own and noise in training."""

import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_same_bits

OP = "route"


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("priority", ["choice", "token", "score"])
def test_evaluation_is_route(priority, normalize, device, backend):
    shape = inputs.ORDINARY
    router = wk.TopKRouter(8, 4, 2, normalize=normalize).to(device).eval()
    x, mask = inputs.make_x(shape, device=device), inputs.make_mask(shape.T, device=device)
    options = {"priority": priority, "mask": mask, "backend": backend}
    gate, plan, logits = router(x, 6, **options)
    expected = wk.route(x, router.weight, 2, 6, normalize=normalize, **options)
    for ours, exact in zip((*gate, *plan[:5], logits), (*expected[0], *expected[1][:5], expected[2]), strict=True):
        assert_same_bits(ours, exact)
    assert plan[5:] == expected[1][5:]


def test_parameters():
    router = wk.TopKRouter(8, 4)
    assert {name: list(p.shape) for name, p in router.named_parameters()} == {"weight": [4, 8]}
    assert router.k == 2
    assert "dim=8, num_experts=4, k=2, noise_std=0.25" in repr(router)


@pytest.mark.parametrize(("noise_std", "expected"), [(None, 0.25), (1.5, 1.5)], ids=["1/E", "given"])
def test_noise_in_training(noise_std, expected, device, backend):
    """With a weight of zero, log(probs) is the noise up to a constant per token."""
    router = wk.TopKRouter(8, 4, noise_std=noise_std).to(device)
    torch.nn.init.zeros_(router.weight)
    gate, _, logits = router(torch.ones(20_000, 8, device=device), backend=backend)
    assert not logits.any()  # the noise is not in the logits
    noise = gate.probs.double().log()
    noise = noise - noise.mean(dim=1, keepdim=True)
    assert float(noise.detach().square().mean() * 4 / 3) == pytest.approx(expected**2, rel=0.03)


def test_noise_follows_torchs_generator(device, backend):
    router = wk.TopKRouter(8, 4).to(device)
    x = inputs.make_x(inputs.ORDINARY, device=device)

    def probs(seed):
        torch.manual_seed(seed)
        return router(x, backend=backend)[0].probs

    assert_same_bits(probs(1), probs(1))
    assert not torch.equal(probs(1), probs(2))


@pytest.mark.parametrize("case", ["evaluation", "noise_std=0"])
def test_no_noise(case, device, backend):
    router = wk.TopKRouter(8, 4, noise_std=0 if case == "noise_std=0" else None).to(device)
    router.train(case != "evaluation")
    x = inputs.make_x(inputs.ORDINARY, device=device)
    state = torch.get_rng_state()
    assert_same_bits(router(x, backend=backend)[0].probs, wk.route(x, router.weight, backend=backend)[0].probs)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients(device, backend):
    router = wk.TopKRouter(8, 4).to(device)
    x = inputs.make_x(inputs.ORDINARY, device=device).requires_grad_()
    gate, _, _ = router(x, backend=backend)
    gate.weight.sum().backward()
    assert router.weight.grad.any()
    assert x.grad.any()


@pytest.mark.parametrize("k", [0, 5])
def test_errors(k):
    with pytest.raises(ValueError, match=rf"^TopKRouter: k: expected 1 to 4, .*, got {k}$"):
        wk.TopKRouter(8, 4, k)
