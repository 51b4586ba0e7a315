"""torch.compile(fullgraph=True): the same numbers as eager, and no graph per length."""

import pytest
import torch
from calls import OurCalls
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_same_bits


def make_layer(device, backend, **options):
    torch.manual_seed(0)
    return wk.MoELayer(8, 12, 4, noise_std=0, backend=backend, **options).to(device)


def step(run, layer, x):
    """y, the losses and every gradient of one forward and backward."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y, aux = run(x)
    (y.square().sum() + aux.balance_loss + aux.z_loss).backward()
    return {"y": y.detach(), **aux._asdict(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}


def assert_close(ours, expected):
    for name, exact in expected.items():
        torch.testing.assert_close(ours[name], exact, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("capacity_factor", [1.2, None], ids=["capacity", "dropless"])
def test_layer_under_inductor(capacity_factor, device, backend):
    layer = make_layer(device, backend, capacity_factor=capacity_factor)
    x = inputs.make_x(inputs.ORDINARY, device=device)
    assert_close(step(torch.compile(layer, fullgraph=True), layer, x), step(layer, layer, x))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("options", [{"priority": "score", "normalize": True}, {"bias": False}], ids=str)
def test_layer_with_mask_and_options(options, activation, device, backend):
    layer = make_layer(device, backend, activation=activation, **options)
    x = inputs.make_x(inputs.ORDINARY, device=device).view(2, 8, 8)
    mask = inputs.make_mask(16, device=device).view(2, 8)
    compiled = torch.compile(lambda x: layer(x, mask), fullgraph=True, backend="aot_eager")
    assert_close(step(compiled, layer, x), step(lambda x: layer(x, mask), layer, x))


@pytest.mark.parametrize("capacity_factor", [1.2, None], ids=["capacity", "dropless"])
def test_two_graphs_at_most_over_five_lengths(capacity_factor, device, backend):
    layer = make_layer(device, backend, capacity_factor=capacity_factor)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (24, 17, 40, 9, 31):
        x = inputs.normal(tokens, 8, seed=tokens, device=device)
        assert_close(step(compiled, layer, x), step(layer, layer, x))
    assert counter.frame_count <= 2


def test_graphs_follow_training_and_evaluation(device, backend):
    layer = make_layer(device, backend, capacity_factor=0.5, eval_capacity_factor=2.0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs.make_x(inputs.ORDINARY, device=device)
    for training in (True, False):
        layer.train(training)
        assert_close(step(compiled, layer, x), step(layer, layer, x))
        assert int(layer(x)[1].expert_count.max()) <= (4 if training else 16)


def test_noise_is_drawn_inside_the_graph(device, backend):
    layer = wk.MoELayer(8, 12, 4, noise_std=1.0, backend=backend).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs.make_x(inputs.ORDINARY, device=device)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_under_autocast(dtype, device, backend):
    layer = make_layer(device, backend)

    def run(x):
        with torch.autocast(device, dtype):
            return layer(x)

    x = inputs.make_x(inputs.ORDINARY, device=device)
    ours, eager = step(torch.compile(run, fullgraph=True, backend="aot_eager"), layer, x), step(run, layer, x)
    assert ours["y"].dtype == dtype
    assert_close(ours, eager)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_grad_buffers(compiler, device, backend):
    """Three uses of the same experts add into the same buffers, on top of what was there."""
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    weight = inputs.make_gate_weight(shape, device=device)
    experts = [t.requires_grad_() for t in inputs.make_experts(shape, device=device)]

    def three_uses(x, buffers):
        for _ in range(3):
            x = wk.moe_ffn(x, weight, plan, *experts, grad_buffers=wk.GradBuffers(*buffers), backend=backend)
        return x

    def run(function):
        x = inputs.make_x(shape, device=device).requires_grad_()
        buffers = [torch.ones_like(t, requires_grad=False) for t in experts]
        y = function(x, buffers)
        y.square().sum().backward()
        assert all(t.grad is None for t in experts)
        return [y.detach(), x.grad, *buffers]

    compiled = torch.compile(three_uses, fullgraph=True, backend=compiler)
    for ours, expected in zip(run(compiled), run(three_uses), strict=True):
        assert_same_bits(ours, expected)


def test_accumulate_grads_around_a_compiled_layer(device, backend):
    layer = make_layer(device, backend)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs.make_x(inputs.ORDINARY, device=device)
    expected = step(layer, layer, x)
    layer.zero_grad()
    for _ in range(2):  # the buffers are new ones each time
        layer.zero_grad()
        with layer.experts.accumulate_grads():
            y, aux = compiled(x)
            (y.square().sum() + aux.balance_loss + aux.z_loss).backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], msg=lambda text, n=name: f"{n}: {text}")
    assert_close(step(compiled, layer, x), expected)


@pytest.mark.parametrize("outside", ["checkpoint", "compile"])
def test_checkpointing(outside, device, backend):
    """Around the compiled layer and inside the graph, with noise, which is drawn again the same.

    On a GPU torch gives what it draws again generators of their own seeds, unless it is told to fall back.
    """
    layer = wk.MoELayer(8, 12, 4, noise_std=1.0, backend=backend).to(device)
    x = inputs.make_x(inputs.ORDINARY, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    if outside == "compile":
        run = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    else:
        run = lambda x: checkpoint(compiled, x, use_reentrant=False)  # noqa: E731
    results = []
    for function in (compiled, run):
        with torch._inductor.config.patch(fallback_random=True):
            step(function, layer, x)  # compiling may draw too
            torch.manual_seed(1)
            results.append(step(function, layer, x))
    assert_close(results[1], results[0])


def test_frozen_experts_in_a_graph(device, backend):
    layer = make_layer(device, backend)
    layer.experts.requires_grad_(False)
    x = inputs.make_x(inputs.ORDINARY, device=device).requires_grad_()
    y, aux = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    with OurCalls() as ours:
        (y.square().sum() + aux.balance_loss).backward()
    assert ours.asked == [("moe_ffn_backward", {"x", "weight"}), ("route_backward", {"x", "router_weight"})]


@pytest.mark.parametrize("outside", ["ddp", "compile"])
def test_ddp(outside, process_group, device, backend):
    """Torch cannot trace DDP's own forward as one graph, but what it wraps."""
    layer = make_layer(device, backend)
    x = inputs.make_x(inputs.ORDINARY, device=device)
    expected = step(layer, layer, x)
    if outside == "ddp":
        model = DistributedDataParallel(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    else:
        model = torch.compile(DistributedDataParallel(layer), backend="aot_eager")
    assert_close(step(model, layer, x), expected)


@pytest.mark.parametrize("capacity_factor", [1.2, None], ids=["capacity", "dropless"])
def test_exported_for_every_length(capacity_factor, device, backend):
    layer = make_layer(device, backend, capacity_factor=capacity_factor).eval()
    x = inputs.make_x(inputs.ORDINARY, device=device)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    for tokens in (16, 5, 40):
        x = inputs.normal(tokens, 8, seed=tokens, device=device)
        (ours, aux), (expected, _) = exported(x), layer(x)
        torch.testing.assert_close(ours, expected)
        assert aux.expert_count.shape == (4,)
