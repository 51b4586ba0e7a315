"""Frozen parameters: the backward makes what leads to the gradients that are asked for, and nothing else.

What an op is told to compute is seen here; that it computes no more than it is told, in tests/test_products.py (the CPU
kernels), tests/reference/test_backward.py and tests/triton/test_launches.py.
"""

import eager
import pytest
import torch
from calls import OurCalls
from torch import nn

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_float64, assert_same_bits

EXPERTS = {"w1", "b1", "w2", "b2"}
# What trains, whether x wants a gradient -> what the backward of moe_ffn and of route have to give (None: not called).
STYLES = {
    "everything": ({"router_weight", *EXPERTS}, True, {"x", "weight", *EXPERTS}, {"x", "router_weight"}),
    "the first layer of a network": ({"router_weight", *EXPERTS}, False, {"weight", *EXPERTS}, {"router_weight"}),
    "frozen experts": ({"router_weight"}, True, {"x", "weight"}, {"x", "router_weight"}),
    "the router alone": ({"router_weight"}, False, {"weight"}, {"router_weight"}),
    "frozen router": (EXPERTS, True, {"x", "weight", *EXPERTS}, {"x"}),
    "the experts alone": (EXPERTS, False, EXPERTS, None),
    "biases": ({"b1", "b2"}, False, {"b1", "b2"}, None),
    "the second layer": ({"w2"}, True, {"x", "weight", "w2"}, {"x"}),
    "something below": (set(), True, {"x", "weight"}, {"x"}),
}


def make(device, backend, training=()):
    torch.manual_seed(0)
    layer = wk.MoELayer(8, 12, 4, noise_std=0, backend=backend).to(device)
    parameters = {"router_weight": layer.router.weight, **dict(layer.experts.named_parameters())}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in training)
    return layer, parameters


@pytest.mark.parametrize("style", STYLES)
def test_the_backward_is_asked_for_what_trains(style, device, backend):
    """And what it gives has the bits that it has when everything trains."""
    training, with_x, of_moe, of_route = STYLES[style]
    everything, all_parameters = make(device, backend, {"router_weight", *EXPERTS})
    whole = inputs.make_x(inputs.ORDINARY, device=device).requires_grad_()
    y, aux = everything(whole)
    (y.square().sum() + aux.balance_loss + aux.z_loss).backward()

    layer, parameters = make(device, backend, training)
    x = whole.detach().requires_grad_(with_x)
    y, aux = layer(x)
    with OurCalls() as ours:
        (y.square().sum() + aux.balance_loss + aux.z_loss).backward()
    expected = [("moe_ffn_backward", of_moe)] + ([] if of_route is None else [("route_backward", of_route)])
    assert ours.asked == expected
    for name, parameter in parameters.items():
        if name in training:
            assert_same_bits(parameter.grad, all_parameters[name].grad, name)
        else:
            assert parameter.grad is None
    if with_x:
        assert_same_bits(x.grad, whole.grad)


def test_a_layer_where_nothing_trains_keeps_nothing(device, backend):
    layer, _ = make(device, backend)
    y, aux = layer(inputs.make_x(inputs.ORDINARY, device=device))
    assert not any(t.requires_grad for t in (y, aux.balance_loss, aux.z_loss))


@pytest.mark.parametrize("option", [{"dropout": 0.5}, {"output_activation": "gelu"}], ids=str)
def test_frozen_experts_of_the_composed_path(option, device, backend):
    experts = wk.Experts(4, 8, 12, **option).to(device).requires_grad_(False)
    x = inputs.make_x(inputs.ORDINARY, device=device).requires_grad_()
    plan, weight = (make(inputs.ORDINARY, device=device) for make in (inputs.make_plan, inputs.make_gate_weight))
    y = experts(x, weight, plan, backend=backend)
    with OurCalls() as ours:
        y.sum().backward()
    assert ours.asked == [
        ("combine_backward", {"rows"}),
        ("grouped_gemm_backward", {"rows"}),
        ("grouped_gemm_backward", {"rows"}),
        ("permute_backward", set()),
    ]


class LoraExperts(wk.Experts):
    """Each weight is w + down up, of which only the two low-rank factors train (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, num_experts, dim, ffn_dim, rank):
        super().__init__(num_experts, dim, ffn_dim)
        self.requires_grad_(False)
        sizes = {"down1": (dim, rank), "up1": (rank, ffn_dim), "down2": (ffn_dim, rank), "up2": (rank, dim)}
        self.lora = nn.ParameterDict({n: nn.Parameter(torch.randn(num_experts, *s)) for n, s in sizes.items()})

    def forward(self, x, weight, plan, *, backend=None):
        def linear(rows, w, bias, down, up):
            low = wk.grouped_gemm(rows, down, plan, backend=backend)
            low = wk.grouped_gemm(low, up, plan, backend=backend)
            return wk.grouped_gemm(rows, w, plan, bias, backend=backend) + low

        rows = wk.permute(x, plan, backend=backend)
        hidden = linear(rows, self.w1, self.b1, self.lora.down1, self.lora.up1)
        out = linear(nn.functional.gelu(hidden), self.w2, self.b2, self.lora.down2, self.lora.up2)
        return wk.combine(out, weight, plan, backend=backend)


@pytest.mark.parametrize("with_x", [False, True], ids=["x-frozen", "x"])
def test_lora_makes_no_gradient_of_a_frozen_weight(with_x, device, backend):
    shape = inputs.ORDINARY
    torch.manual_seed(0)
    experts = LoraExperts(shape.E, shape.D, shape.F, rank=2).double().to(device)
    double = {"dtype": torch.float64, "device": device}
    x, weight = inputs.make_x(shape, **double).requires_grad_(with_x), inputs.make_gate_weight(shape, **double)
    plan = inputs.make_plan(shape, device=device)

    y = experts(x, weight, plan, backend=backend)
    lora = experts.lora
    sums = experts.w1 + lora.down1 @ lora.up1, experts.b1, experts.w2 + lora.down2 @ lora.up2, experts.b2
    expected = eager.moe_ffn(x, weight, plan, *sums)
    assert_float64(y, expected)

    leaves = [*lora.values(), *([x] if with_x else [])]
    exact = torch.autograd.grad(expected.square().sum(), leaves)
    with OurCalls() as ours:
        gradients = torch.autograd.grad(y.square().sum(), leaves)
    for one, two in zip(gradients, exact, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)  # in other orders, of larger terms
    products = [needed for name, needed in ours.asked if name == "grouped_gemm_backward"]
    through_w2, through_w1 = [{"rows"}], [{"rows"}] if with_x else []
    low_rank = [{"rows", "weight"}] * 3 + [{"rows", "weight"} if with_x else {"weight"}]
    assert sorted(products, key=sorted) == sorted(through_w2 + through_w1 + low_rank, key=sorted)
