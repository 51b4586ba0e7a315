"""Experts: moe_ffn with weights of its own, the composed path, and gradients that are accumulated over many uses."""

import eager
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import widenet_kernels as wk
from widenet_kernels.routing import ACTIVATIONS
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_float64, assert_same_bits

SHAPE = inputs.ORDINARY


def make(device, **options):
    torch.manual_seed(0)
    experts = wk.Experts(SHAPE.E, SHAPE.D, SHAPE.F, **options).double().to(device)
    for bias in (experts.b1, experts.b2):
        if bias is not None:
            torch.nn.init.normal_(bias)
    x = inputs.make_x(SHAPE, dtype=torch.float64, device=device)
    weight = inputs.make_gate_weight(SHAPE, dtype=torch.float64, device=device)
    return experts, x, weight, inputs.make_plan(SHAPE, device=device)


def weights(experts):
    return experts.w1, experts.b1, experts.w2, experts.b2


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward(activation, bias, device, backend):
    experts, x, weight, plan = make(device, activation=activation, bias=bias)
    y = experts(x, weight, plan, backend=backend)
    assert_float64(y, eager.moe_ffn(x, weight, plan, *weights(experts), activation))


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
def test_parameters(gated):
    experts = wk.Experts(4, 8, 12, "swiglu" if gated else "gelu")
    width = 24 if gated else 12
    shapes = {"w1": [4, 8, width], "b1": [4, width], "w2": [4, 12, 8], "b2": [4, 8]}
    assert {name: list(p.shape) for name, p in experts.named_parameters()} == shapes
    assert set(dict(wk.Experts(4, 8, 12, bias=False).named_parameters())) == {"w1", "w2"}
    assert "num_experts=4, dim=8, ffn_dim=12" in repr(experts)


@pytest.mark.parametrize("output_activation", ["gelu", "relu", "silu", "gelu_tanh"])
def test_an_activation_behind_the_second_layer(output_activation, device, backend):
    experts, x, weight, plan = make(device, output_activation=output_activation)
    hidden = eager.grouped_gemm(eager.permute(x, plan), experts.w1, plan, experts.b1, "gelu")
    expected = eager.combine(eager.grouped_gemm(hidden, experts.w2, plan, experts.b2, output_activation), weight, plan)
    y = experts(x, weight, plan, backend=backend)
    assert_float64(y, expected)
    ours = torch.autograd.grad(y.square().sum(), list(experts.parameters()))
    for result, exact in zip(
        ours, torch.autograd.grad(expected.square().sum(), list(experts.parameters())), strict=True
    ):
        assert_float64(result, exact)


def test_dropout_is_inside_the_expert_and_only_in_training(device, backend):
    experts, x, weight, plan = make(device, dropout=0.5)
    expected = eager.moe_ffn(x, weight, plan, *weights(experts))
    assert not torch.equal(experts(x, weight, plan, backend=backend), experts(x, weight, plan, backend=backend))
    mean = sum(experts(x, weight, plan, backend=backend).detach() for _ in range(20))
    assert mean.isfinite().all()
    assert_float64(experts.eval()(x, weight, plan, backend=backend), expected)
    experts.train().dropout.p = 1.0
    assert not experts(x, weight, plan, backend=backend).any()


def gradients(experts):
    return {name: p.grad for name, p in experts.named_parameters()}


def three_uses(experts, x, weight, plan, backend):
    for _ in range(3):
        x = experts(x, weight, plan, backend=backend)
    return x.square().sum()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("existing", [False, True], ids=["no-grad", "grad"])
def test_accumulate_grads_equals_ordinary_gradients(existing, bias, device, backend):
    """Over three uses of the same experts, in fp32 buffers, and on top of a gradient that is there already."""
    experts, x, weight, plan = make(device, bias=bias)
    experts, x = experts.float(), x.float().requires_grad_()
    three_uses(experts, x, weight, plan, backend).backward()
    expected, expected_x = {n: g.clone() for n, g in gradients(experts).items()}, x.grad.clone()

    x.grad = None
    for parameter in experts.parameters():
        parameter.grad = torch.ones_like(parameter) if existing else None
    before = gradients(experts)
    with experts.accumulate_grads():
        three_uses(experts, x, weight, plan, backend).backward()
        assert all(gradients(experts)[name] is grad for name, grad in before.items())  # untouched until it ends
    assert_same_bits(x.grad, expected_x)
    for name, grad in gradients(experts).items():
        torch.testing.assert_close(grad - float(existing), expected[name], rtol=1e-4, atol=1e-5)


def test_accumulate_grads_over_several_backwards_and_again(device, backend):
    experts, x, weight, plan = make(device)
    three_uses(experts, x, weight, plan, backend).backward()
    expected = {name: grad.clone() for name, grad in gradients(experts).items()}
    experts.zero_grad()
    with experts.accumulate_grads():
        for _ in range(2):
            three_uses(experts, x, weight, plan, backend).backward()
    with experts.accumulate_grads():
        three_uses(experts, x, weight, plan, backend).backward()
    for name, grad in gradients(experts).items():
        torch.testing.assert_close(grad, 3 * expected[name], rtol=1e-5, atol=1e-5)
        assert grad.dtype == torch.float64  # that of the parameter, through fp32 buffers


def test_accumulate_grads_of_half_parameters_sums_in_fp32(device, backend):
    """256 + 1 is 256 in bf16: in fp32 buffers the small gradients of many uses add up."""
    experts = wk.Experts(1, 1, 1, "relu").to(torch.bfloat16).to(device)
    for parameter in experts.parameters():
        torch.nn.init.ones_(parameter)
    plan = wk.plan_routing(torch.zeros(1, 1, dtype=torch.int32, device=device), 1, 1)
    x, weight = torch.ones(1, 1, dtype=torch.bfloat16, device=device), torch.ones(1, 1, device=device)
    with experts.accumulate_grads():
        for scale in (256.0, *[1.0] * 8):
            (experts(x, weight, plan, backend=backend) * scale).sum().backward()
    assert experts.b2.grad.dtype == torch.bfloat16
    assert experts.b2.grad.item() == 264.0


def test_unused_experts_get_zero_gradients(device):
    experts, *_ = make(device)
    with experts.accumulate_grads():
        pass
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    experts.w1.grad.fill_(3.0)
    with experts.accumulate_grads():
        pass
    assert (experts.w1.grad == 3).all()


@pytest.mark.parametrize("frozen", ["w1", "b1", "w2", "b2"])
def test_frozen_parameters_stay_without_gradient(frozen, device, backend):
    experts, x, weight, plan = make(device)
    three_uses(experts, x, weight, plan, backend).backward()
    expected = gradients(experts)
    experts.zero_grad()
    getattr(experts, frozen).requires_grad_(False)
    with experts.accumulate_grads():
        three_uses(experts, x, weight, plan, backend).backward()
    for name, grad in gradients(experts).items():
        if name == frozen:
            assert grad is None
        else:
            torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-5)


def test_all_parameters_frozen(device, backend):
    experts, x, weight, plan = make(device)
    experts.requires_grad_(False)
    x.requires_grad_()
    with experts.accumulate_grads():
        three_uses(experts, x, weight, plan, backend).backward()
    assert all(grad is None for grad in gradients(experts).values())
    assert x.grad.any()


def test_entering_twice_raises_and_the_first_goes_on(device, backend):
    experts, x, weight, plan = make(device)
    with experts.accumulate_grads():
        with (
            pytest.raises(RuntimeError, match=r"^Experts.accumulate_grads: already active"),
            experts.accumulate_grads(),
        ):
            pass
        three_uses(experts, x, weight, plan, backend).backward()
        assert experts.w1.grad is None
    assert experts.w1.grad.any()


def test_an_exception_inside_leaves_no_buffers(device, backend):
    experts, x, weight, plan = make(device)

    def fail():
        with experts.accumulate_grads():
            three_uses(experts, x, weight, plan, backend).backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(grad is None for grad in gradients(experts).values())
    three_uses(experts, x, weight, plan, backend).backward()  # ordinary again
    assert experts.w1.grad.any()
    with experts.accumulate_grads():
        pass


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"output_activation": "gelu"}], ids=str)
def test_accumulate_grads_does_not_go_with_the_composed_path(options, device, backend):
    experts, x, weight, plan = make(device, **options)
    with experts.accumulate_grads(), pytest.raises(RuntimeError, match=r"^Experts: accumulate_grads .*dropout"):
        experts(x, weight, plan, backend=backend)


class Model(torch.nn.Module):
    def __init__(self, experts, weight, plan, backend):
        super().__init__()
        self.experts, self.weight, self.plan, self.backend = experts, weight, plan, backend

    def forward(self, x):
        return self.experts(x, self.weight, self.plan, backend=self.backend)


def test_ddp_works_and_refuses_accumulate_grads(process_group, device, backend):
    experts, x, weight, plan = make(device)
    model = DistributedDataParallel(Model(experts, weight, plan, backend))
    with experts.accumulate_grads(), pytest.raises(RuntimeError, match=r"^Experts.accumulate_grads: DDP would miss"):
        model(x)
    experts.zero_grad()
    model(x).square().sum().backward()
    ours = gradients(experts)
    plain, *_ = make(device)
    plain(x, weight, plan, backend=backend).square().sum().backward()
    for name, grad in gradients(plain).items():
        assert_float64(ours[name], grad)


def test_fsdp_parameters_are_refused(process_group, device):
    """FSDP2 turns the parameters into DTensors, FSDP1 marks them as flattened."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    experts, *_ = make(device)
    mesh = init_device_mesh(device, (1,))
    experts.w1 = torch.nn.Parameter(distribute_tensor(experts.w1.detach(), mesh))
    with pytest.raises(RuntimeError, match=r"^Experts.accumulate_grads: FSDP holds the parameters"):
        experts.accumulate_grads().__enter__()
    experts, *_ = make(device)
    experts.w2._fsdp_flattened = True
    with pytest.raises(RuntimeError, match=r"^Experts.accumulate_grads: FSDP holds the parameters"):
        experts.accumulate_grads().__enter__()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"activation": "tanhish"}, "activation: expected one of gelu,.*got 'tanhish'"),
        ({"activation": None}, "activation: expected one of gelu,.*got None"),
        ({"output_activation": "swiglu"}, "output_activation: expected None or one of gelu,.*silu, got 'swiglu'"),
    ],
    ids=str,
)
def test_errors(options, named):
    with pytest.raises(ValueError, match=f"^Experts: {named}"):
        wk.Experts(4, 8, 12, **options)


def test_backward_after_accumulate_grads_has_ended_raises(backend):
    experts = wk.Experts(3, 4, 5)
    plan = wk.plan_routing(torch.tensor([[0, 1], [2, 0]], dtype=torch.int32), 3)
    with experts.accumulate_grads():
        y = experts(torch.randn(2, 4), torch.rand(2, 2), plan, backend=backend)
    with pytest.raises(RuntimeError, match="after accumulate_grads had ended"):
        y.sum().backward()


def test_grads_do_not_share_memory_with_the_buffers(backend):
    experts = wk.Experts(3, 4, 5)
    plan = wk.plan_routing(torch.tensor([[0, 1], [2, 0]], dtype=torch.int32), 3)
    with experts.accumulate_grads():
        buffers = experts._grad_buffers
        experts(torch.randn(2, 4), torch.rand(2, 2), plan, backend=backend).sum().backward()
    for parameter, buffer in zip(experts.parameters(), buffers, strict=True):
        assert parameter.grad.data_ptr() != buffer.data_ptr()
