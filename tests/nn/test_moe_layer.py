"""MoELayer: router, experts and losses joined; what it computes, what it keeps (nothing), what it may share."""

import copy

import oracle
import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_float64, assert_gradcheck, assert_same_bits

ACTIVATIONS = {
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU("tanh"),
    "relu": torch.nn.ReLU(),
    "silu": torch.nn.SiLU(),
}


def make(device, backend, *, dim=8, ffn_dim=12, num_experts=4, **options):
    torch.manual_seed(0)
    layer = wk.MoELayer(dim, ffn_dim, num_experts, **{"noise_std": 0.0, "backend": backend, **options})
    for name, parameter in layer.named_parameters():
        if name.endswith(("b1", "b2")):
            torch.nn.init.normal_(parameter)
    return layer.double().to(device)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("priority", ["choice", "token", "score"])
@pytest.mark.parametrize("capacity_factor", [0.6, 1.2, None], ids=["tight", "paper", "dropless"])
def test_oracle(capacity_factor, priority, masked, device, backend):
    layer = make(device, backend, capacity_factor=capacity_factor, priority=priority)
    x = inputs.normal(3, 7, 8, seed=3, dtype=torch.float64, device=device)
    mask = inputs.make_mask(21, device=device).view(3, 7) if masked else None
    y, aux = layer(x, mask)

    tokens = x.reshape(-1, 8).cpu()
    weight, index, probs = oracle.topk_gate(logits := oracle.logits(tokens, layer.router.weight.detach().cpu()), 2)
    valid = None if mask is None else mask.reshape(-1).cpu()
    if masked:
        weight[~valid], index[~valid] = 0.0, -1
    capacity = None if capacity_factor is None else wk.expert_capacity(21, 4, 2, capacity_factor)
    places = oracle.plan_routing(index, 4, capacity, priority, weight)
    plan = wk.RoutingPlan(*map(torch.tensor, places.values()), len(places["row_choice"]), 4, 2, capacity)
    experts = [t.detach().cpu() for t in layer.experts.parameters()]
    expected = oracle.moe_ffn(tokens, weight, plan, *experts)

    assert y.shape == x.shape
    assert_float64(y.detach().reshape(-1, 8).cpu(), expected)
    if masked:
        assert not y[~mask].any()
    assert aux.expert_demand.tolist() == places["expert_demand"]
    assert aux.expert_count.tolist() == places["expert_count"]
    share = 1 - sum(places["expert_count"]) / sum(places["expert_demand"])
    assert float(aux.dropped_share) == pytest.approx(share, abs=1e-6)
    assert (share > 0) == (capacity_factor == 0.6) or capacity_factor == 1.2
    assert float(aux.balance_loss.detach()) == pytest.approx(oracle.load_balance_loss(probs, index, valid), rel=1e-12)
    assert float(aux.z_loss.detach()) == pytest.approx(oracle.router_z_loss(logits, valid), rel=1e-12)


@pytest.mark.parametrize("capacity_factor", [0.8, None], ids=["capacity", "dropless"])
@pytest.mark.parametrize("options", [{}, {"normalize": True, "activation": "swiglu", "bias": False}], ids=str)
def test_gradcheck(options, capacity_factor, device, backend):
    layer = make(device, backend, dim=3, ffn_dim=2, num_experts=3, capacity_factor=capacity_factor, **options)
    x = inputs.normal(5, 3, seed=3, dtype=torch.float64, device=device).requires_grad_()
    mask = torch.tensor([True, True, False, True, True], device=device)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        y, aux = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, mask))
        return y, aux.balance_loss, aux.z_loss

    assert_gradcheck(run, (x, *values))


@pytest.mark.parametrize("size", [(0, 8), (2, 0, 8), (8,), (1, 8), (2, 3, 4, 8)], ids=str)
def test_any_leading_dimensions(size, device, backend):
    layer = make(device, backend)
    x = inputs.normal(*size, seed=3, dtype=torch.float64, device=device).requires_grad_()
    y, aux = layer(x)
    assert y.shape == x.shape
    (y.sum() + aux.balance_loss + aux.z_loss).backward()
    assert x.grad.shape == x.shape
    assert x.grad.isfinite().all()
    flat, _ = layer(x.detach().reshape(-1, 8))
    assert_same_bits(flat.view(x.shape), y)
    if x.numel() == 0:
        assert aux.dropped_share.item() == 0.0
        assert not any(p.grad.any() for p in layer.parameters())


def test_every_token_masked(device, backend):
    layer = make(device, backend)
    x = inputs.normal(5, 8, seed=3, dtype=torch.float64, device=device).requires_grad_()
    y, aux = layer(x, torch.zeros(5, dtype=torch.bool, device=device))
    (y.sum() + aux.balance_loss + aux.z_loss).backward()
    assert not y.any()
    assert (aux.balance_loss.item(), aux.z_loss.item(), aux.dropped_share.item()) == (0.0, 0.0, 0.0)
    assert not x.grad.any()
    assert not aux.expert_demand.any()


def test_masked_tokens_take_no_capacity(device, backend):
    """The valid tokens are served as if they were alone with the same capacity."""
    layer = make(device, backend, capacity_factor=None)
    x = inputs.normal(12, 8, seed=3, dtype=torch.float64, device=device)
    mask = inputs.make_mask(12, device=device)
    y, aux = layer(x, mask)
    alone, aux_alone = layer(x[mask])
    assert_float64(y[mask], alone)
    assert aux.expert_count.tolist() == aux_alone.expert_count.tolist()
    assert aux.balance_loss.item() == pytest.approx(aux_alone.balance_loss.item(), rel=1e-12)


def test_evaluation_capacity(device, backend):
    x = inputs.normal(64, 8, seed=3, dtype=torch.float64, device=device)
    for evaluation, most in ((2.0, 64), (None, 8)):
        layer = make(device, backend, capacity_factor=0.25, eval_capacity_factor=evaluation)
        assert int(layer(x)[1].expert_count.max()) == 8
        count = layer.eval()(x)[1].expert_count
        assert (int(count.max()) > 8) == (evaluation is not None)
        assert int(count.max()) <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, device, backend):
    layer = make(device, backend).to(dtype)
    x = inputs.normal(9, 8, seed=3, dtype=dtype, device=device).requires_grad_()
    y, aux = layer(x)
    assert (y.dtype, aux.balance_loss.dtype, aux.z_loss.dtype) == (dtype, torch.float32, torch.float32)
    assert aux.expert_demand.dtype == aux.expert_count.dtype == torch.int32
    y.sum().backward()
    assert {p.grad.dtype for p in (*layer.parameters(), x)} == {dtype}


def test_keeps_nothing_between_calls(device, backend):
    layer = make(device, backend)
    before = {name: dict(module.__dict__) for name, module in layer.named_modules()}
    x = inputs.normal(9, 8, seed=3, dtype=torch.float64, device=device)
    first, _ = layer(x)
    layer(inputs.normal(30, 8, seed=4, dtype=torch.float64, device=device))
    assert_same_bits(layer(x)[0], first)
    for name, module in layer.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[key] is value for key, value in before[name].items()), name
    assert not list(layer.buffers())


def test_layers_share_router_and_experts(device, backend):
    first = make(device, backend)
    second = wk.MoELayer(8, 12, 4, router=first.router, experts=first.experts, backend=backend)
    assert second.router is first.router
    assert second.experts is first.experts
    x = inputs.normal(9, 8, seed=3, dtype=torch.float64, device=device)
    assert_same_bits(second(x)[0], first(x)[0])
    assert len({id(p) for layer in (first, second) for p in layer.parameters()}) == 5


def test_state_dict_and_copy(device, backend):
    layer = make(device, backend)
    assert set(layer.state_dict()) == {"router.weight", *(f"experts.{name}" for name in ("w1", "b1", "w2", "b2"))}
    x = inputs.normal(9, 8, seed=3, dtype=torch.float64, device=device)
    assert_same_bits(copy.deepcopy(layer)(x)[0], layer(x)[0])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_from_dense_computes_what_the_dense_network_did(activation, bias, device, backend):
    linear1, linear2 = (torch.nn.Linear(*size, bias=bias).double().to(device) for size in ((8, 12), (12, 8)))
    layer = wk.MoELayer.from_dense(linear1, linear2, 4, activation, noise_std=0, backend=backend)
    x = inputs.normal(3, 7, 8, seed=3, dtype=torch.float64, device=device)
    y, aux = layer(x)
    assert_float64(y, linear2(ACTIVATIONS[activation](linear1(x))))
    assert aux.dropped_share.item() == 0
    assert layer.experts.w1.device == linear1.weight.device
    for p in layer.experts.parameters():
        assert p.requires_grad
    assert (layer.experts.b1 is None) == (not bias)
    linear1.weight.data.zero_()  # a copy
    assert layer.experts.w1.any()


@pytest.mark.parametrize(("activation", "gated_by"), [("swiglu", "silu"), ("geglu", "gelu")])
def test_from_dense_with_a_gate(activation, gated_by, device, backend):
    gate, value = (torch.nn.Linear(8, 12).double().to(device) for _ in range(2))
    joined, linear2 = (torch.nn.Linear(*size).double().to(device) for size in ((8, 24), (12, 8)))
    joined.load_state_dict({name: torch.cat([t, getattr(value, name)]) for name, t in gate.state_dict().items()})
    layer = wk.MoELayer.from_dense(joined, linear2, 4, activation, noise_std=0, backend=backend)
    x = inputs.normal(3, 7, 8, seed=3, dtype=torch.float64, device=device)
    assert layer.experts.ffn_dim == 12
    assert_float64(layer(x)[0], linear2(ACTIVATIONS[gated_by](gate(x)) * value(x)))


def test_accumulate_grads_through_layers_that_share_experts(device, backend):
    first = make(device, backend).float()
    second = wk.MoELayer(8, 12, 4, router=first.router, experts=first.experts, backend=backend)
    x = inputs.normal(20, 8, seed=3, device=device)

    def loss():
        y, aux = first(x)
        z, aux2 = second(y)
        return z.square().sum() + aux.balance_loss + aux2.balance_loss

    loss().backward()
    expected = {name: p.grad.clone() for name, p in first.named_parameters()}
    first.zero_grad()
    with first.experts.accumulate_grads():
        loss().backward()
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_errors():
    linear = torch.nn.Linear
    with pytest.raises(ValueError, match=r"^MoELayer: router: expected dim 8 and 4 experts, got dim 8 and 5 experts"):
        wk.MoELayer(8, 12, 4, router=wk.TopKRouter(8, 5))
    with pytest.raises(ValueError, match=r"^MoELayer: experts: expected dim 8 and 4 experts, got dim 9 and 4 experts"):
        wk.MoELayer(8, 12, 4, experts=wk.Experts(4, 9, 12))
    with pytest.raises(
        ValueError, match=r"^MoELayer.from_dense: linear2: expected Linear\(12, 8\).*got Linear\(12, 9\)"
    ):
        wk.MoELayer.from_dense(linear(8, 12), linear(12, 9), 4)
    with pytest.raises(
        ValueError, match=r"^MoELayer.from_dense: linear2: expected a bias in both layers or in neither"
    ):
        wk.MoELayer.from_dense(linear(8, 12), linear(12, 8, bias=False), 4)
    with pytest.raises(ValueError, match=r"^TopKRouter: k: expected 1 to 4"):
        wk.MoELayer(8, 12, 4, k=5)
    with pytest.raises(ValueError, match=r"^route: x: expected .*, got 'abacus'|^route: backend: expected .*'abacus'"):
        wk.MoELayer(8, 12, 4, backend="abacus")(torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"^MoELayer: x: expected \[\.\.\., 8\], got \[2, 9\]"):
        wk.MoELayer(8, 12, 4)(torch.zeros(2, 9))


def test_nan_in_a_masked_token_reaches_no_other_token_and_no_gradient(backend):
    layer = wk.MoELayer(6, 5, 3, backend=backend)
    x, mask = torch.randn(7, 6), torch.arange(7) != 4
    x[4] = float("nan")
    x.requires_grad_()
    y, aux = layer(x, mask)
    assert y.isfinite().all()
    assert not y[4].any()
    (y.square().sum() + aux.balance_loss + aux.z_loss).backward()
    for name, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad.isfinite().all(), name
    assert not x.grad[4].any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda layer: layer(torch.tensor(1.0)), ["x", "[..., 8]", "[]"]),
        (lambda layer: layer(torch.zeros(2, 7)), ["x", "[..., 8]", "[2, 7]"]),
        (lambda layer: layer(torch.zeros(2, 5, 8), torch.ones(5, 2, dtype=torch.bool)), ["mask", "[2, 5]", "[5, 2]"]),
        (lambda layer: wk.MoELayer(8, 12, 4, priority="luck"), ["priority", "'score'", "'luck'"]),
    ],
    ids=["scalar", "wrong-dim", "transposed-mask", "priority"],
)
def test_errors_of_the_layer(call, words):
    with pytest.raises(ValueError, match="MoELayer") as error:
        call(make("cpu", None))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("option", ["router", "experts"])
def test_from_dense_makes_its_own_parts(option):
    linear1, linear2 = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)
    with pytest.raises(ValueError, match=f"from_dense: {option}"):
        wk.MoELayer.from_dense(linear1, linear2, 4, **{option: getattr(make("cpu", None), option)})


def test_from_dense_with_a_gate_needs_two_halves():
    linear1, linear2 = torch.nn.Linear(8, 11), torch.nn.Linear(12, 8)
    with pytest.raises(ValueError, match=r"from_dense: linear1: expected an even number .* swiglu: .*, got 11"):
        wk.MoELayer.from_dense(linear1, linear2, 4, activation="swiglu")
    with pytest.raises(ValueError, match=r"expected Linear\(13, 8\) behind Linear\(8, 26\), got Linear\(12, 8\)"):
        wk.MoELayer.from_dense(torch.nn.Linear(8, 26), linear2, 4, activation="swiglu")


def test_meta_device():
    layer = make("meta", None).float()
    y, aux = layer(torch.randn(2, 3, 8, device="meta"))
    assert y.shape == (2, 3, 8)
    assert aux.expert_count.shape == (4,)


def test_a_routing_serves_more_than_once(device, backend):
    """route and then forward is forward; other tokens go the ways of the first, with their weights."""
    layer = make(device, backend, capacity_factor=0.8)
    x, other = (inputs.normal(3, 7, 8, seed=seed, dtype=torch.float64, device=device) for seed in (3, 4))
    mask = inputs.make_mask(21, device=device).view(3, 7)
    y, aux = layer(x, mask)
    routing = layer.route(x, mask)
    again, same = layer(x, routing=routing)
    assert_same_bits(again, y)
    for one, two in zip(same, aux, strict=True):
        assert_same_bits(one, two)
    z, kept = layer(other, routing=routing)
    assert kept is routing.aux
    assert_same_bits(z.view(21, 8), layer.experts(other.view(21, 8), routing.weight, routing.plan, backend=backend))
    assert not z[~mask].any()


def test_errors_of_a_routing():
    layer = make("cpu", None)
    x = torch.zeros(3, 7, 8, dtype=torch.float64)
    routing = layer.route(x)
    with pytest.raises(ValueError, match="MoELayer: mask: expected None with a routing"):
        layer(x, torch.ones(3, 7, dtype=torch.bool), routing=routing)
    with pytest.raises(ValueError, match=r"^moe_ffn: .*got \[20, 8\]|^moe_ffn: .*20"):
        layer(x.view(21, 8)[1:], routing=routing)
