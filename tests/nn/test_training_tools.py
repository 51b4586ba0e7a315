"""What people run around a layer: mixed precision, activation checkpointing, data parallelism, copies and files."""

import contextlib
import copy
import functools
import io
import pickle

import pytest
import torch
from calls import OurCalls
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import widenet_kernels as wk
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_same_bits


def make(device, backend, **options):
    torch.manual_seed(0)
    return wk.MoELayer(8, 12, 4, backend=backend, **options).to(device)


def tokens(device, seed=3):
    return inputs.make_x(inputs.ORDINARY, seed=seed, device=device)


def step(run, layer, x):
    """y, the losses and every gradient of one forward and backward; the noise is the same each time."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    y, aux = run(x)
    (y.square().sum() + aux.balance_loss + aux.z_loss).backward()
    return {"y": y.detach(), **aux._asdict(), "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}


def assert_same(ours, expected):
    for name, exact in expected.items():
        assert_same_bits(ours[name].detach(), exact.detach(), name)


# GradScaler


def scaled_step(layer, x, scaler, optimizer, size=1.0):
    """One step on the loss ``size`` * y under fp16 autocast, up to where gradients are looked at."""
    optimizer.zero_grad()
    with torch.autocast(x.device.type, torch.float16):
        y, _ = layer(x)
    scaler.scale((size * y.float()).sum()).backward()
    scaler.unscale_(optimizer)


def test_scaled_gradients_do_not_vanish_in_fp16(device, backend):
    """The gradient of y is below the smallest fp16 number, unless it is scaled; then it is that of float64."""
    x, size = tokens(device), 1e-9
    results = []
    for enabled in (False, True):
        layer = make(device, backend, noise_std=0)
        optimizer = torch.optim.SGD(layer.parameters(), 1.0)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**20, enabled=enabled)
        scaled_step(layer, x, scaler, optimizer, size)
        results.append([p.grad for p in layer.experts.parameters()])
    exact = make(device, backend, noise_std=0).double()
    (size * exact(x.double())[0]).sum().backward()
    for vanished, scaled, parameter in zip(*results, exact.experts.parameters(), strict=True):
        assert not vanished.any()
        # several roundings to 11 bits, one behind the other, of terms that partly cancel
        bound = 16 * torch.finfo(torch.float16).eps * float(parameter.grad.abs().max())
        torch.testing.assert_close(scaled.double(), parameter.grad, rtol=0, atol=bound)


def test_a_step_with_an_overflow_is_skipped(device, backend):
    """And the scale falls until none is left; the step is then made with finite gradients."""
    layer, x = make(device, backend), tokens(device)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**30, backoff_factor=2.0**-7)
    start = copy.deepcopy(layer.state_dict())
    scales = []
    for _ in range(5):
        scales.append(scaler.get_scale())
        scaled_step(layer, x, scaler, optimizer)
        finite = all(p.grad.isfinite().all() for p in layer.parameters())
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(t, start[name]) for name, t in layer.state_dict().items())
        assert unchanged == (not finite)
        if finite:
            break
    assert finite
    assert len(scales) > 1


# Activation checkpointing


def flat(layer, x):
    """What a reentrant checkpoint can return: tensors alone, not one in another."""
    y, aux = layer(x)
    return y, *aux


def checkpointed(layer, **options):
    def run(x):
        y, *aux = checkpoint(flat, layer, x, **options)
        return y, wk.MoEAux(*aux)

    return run


def keep_plans(layer):
    """Every plan that the router makes from now on."""
    plans = []
    layer.router.register_forward_hook(lambda module, arguments, out: plans.append(out[1]))
    return plans


@pytest.mark.parametrize("capacity_factor", [0.8, None], ids=["capacity", "dropless"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["plain", "reentrant"])
def test_checkpointing_changes_no_bit(use_reentrant, capacity_factor, device, backend):
    """With the router's noise, which is drawn again: the tokens go the same ways when recomputed."""
    layer, x = make(device, backend, capacity_factor=capacity_factor, noise_std=1.0), tokens(device)
    expected = step(layer, layer, x)
    plans = keep_plans(layer)
    assert_same(step(checkpointed(layer, use_reentrant=use_reentrant), layer, x), expected)
    first, again = plans
    for one, two in zip(first[:5], again[:5], strict=True):
        assert_same_bits(one, two)


def test_checkpointing_needs_the_state_of_the_generator(device, backend):
    """``preserve_rng_state=False`` is for what draws nothing: with other noise the tokens go elsewhere."""
    layer, x = make(device, backend, noise_std=1.0), tokens(device)
    plans = keep_plans(layer)
    step(checkpointed(layer, use_reentrant=False, preserve_rng_state=False), layer, x)
    first, again = plans
    assert not torch.equal(first.choice_row, again.choice_row)


def test_a_reentrant_checkpoint_leaves_nested_tensors_without_gradient(device, backend):
    """Torch's rule: of (y, aux) only y goes on, so the losses in aux are to be returned beside it."""
    layer, x = make(device, backend), tokens(device).requires_grad_()
    y, aux = checkpoint(layer, x, use_reentrant=True)
    assert y.requires_grad
    assert not aux.balance_loss.requires_grad
    y, aux = checkpoint(layer, x, use_reentrant=False)
    assert aux.balance_loss.requires_grad


def test_checkpointing_under_autocast(device, backend):
    layer, x = make(device, backend), tokens(device)

    def under_autocast(run):
        def both(x):
            with torch.autocast(device, torch.bfloat16):
                return run(x)

        return both

    expected = step(under_autocast(layer), layer, x)
    assert expected["y"].dtype == torch.bfloat16
    assert_same(step(under_autocast(checkpointed(layer, use_reentrant=False)), layer, x), expected)


def test_checkpointing_inside_accumulate_grads(device, backend):
    """The recomputed forward does not count twice."""
    layer, x = make(device, backend), tokens(device)
    expected = step(layer, layer, x)
    layer.zero_grad()
    with layer.experts.accumulate_grads():
        ours = step(checkpointed(layer, use_reentrant=False), layer, x)
    ours |= {name: p.grad for name, p in layer.named_parameters()}
    for name, exact in expected.items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_selective_checkpointing_keeps_the_ops_it_is_told_to(device, backend):
    layer, x = make(device, backend, noise_std=1.0), tokens(device)
    expected = step(layer, layer, x)

    def policy(context, op, *arguments, **options):
        kept = op.name().startswith("widenet_kernels")
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with OurCalls() as ours:
        assert_same(step(checkpointed(layer, use_reentrant=False, context_fn=contexts), layer, x), expected)
    assert sorted(ours.ops) == ["moe_ffn", "moe_ffn_backward", "route", "route_backward"]
    with OurCalls() as ours:
        step(checkpointed(layer, use_reentrant=False), layer, x)
    assert sorted(ours.ops) == ["moe_ffn", "moe_ffn", "moe_ffn_backward", "route", "route", "route_backward"]


# Data parallelism


def avoid_the_last_expert(layer, x):
    """Tokens and router such that nobody asks for it."""
    with torch.no_grad():
        layer.router.weight[-1] = -100
    return x.abs()


@pytest.mark.parametrize(
    "options",
    [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("case", ["an expert without tokens", "no tokens"])
def test_ddp_with_experts_that_serve_nobody(case, options, process_group, device, backend):
    """An expert is a slice of one parameter: whom nobody asks gets a gradient of zero, and DDP waits for nothing."""
    layer, x = make(device, backend, noise_std=0), tokens(device)
    x = x[:0] if case == "no tokens" else avoid_the_last_expert(layer, x)
    expected = step(layer, layer, x)
    model = DistributedDataParallel(layer, **options)
    for _ in range(2):
        ours = step(model, layer, x)
        assert_same(ours, expected)
        assert int(ours["expert_count"][-1]) == 0
        assert not ours["experts.w1"][-1].any()


def test_ddp_without_synchronisation(process_group, device, backend):
    """Gradients of two batches, the first under no_sync, are their sum."""
    layer = make(device, backend, noise_std=0)
    batches = tokens(device, seed=3), tokens(device, seed=4)
    first, second = ({n: g.clone() for n, g in step(layer, layer, x).items()} for x in batches)
    layer.zero_grad()
    model = DistributedDataParallel(layer)
    for x, context in zip(batches, (model.no_sync(), contextlib.nullcontext()), strict=True):
        with context:
            y, aux = model(x)
            (y.square().sum() + aux.balance_loss + aux.z_loss).backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, first[name] + second[name])


@pytest.mark.filterwarnings("ignore:.*returned a view")  # which nobody changes in place here
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_fsdp2_on_the_cpu(half, process_group, backend):
    """The experts sharded by themselves, and the layer with what is left: the bits of the plain layer, in bf16 too,
    where the experts leave the gate weights they are given in fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layer, x = make("cpu", backend, noise_std=0), tokens("cpu").bfloat16().float()
    plain = copy.deepcopy(layer)
    dtype = torch.bfloat16 if half else torch.float32
    expected = step(plain.to(dtype), plain, x.to(dtype))
    policy = functools.partial(MixedPrecisionPolicy, param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (1,))
    fully_shard(layer.experts, mesh=mesh, mp_policy=policy(cast_forward_inputs=False))
    fully_shard(layer, mesh=mesh, mp_policy=policy())
    ours = step(layer, layer, x)
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == torch.float32
        assert_same_bits(ours[name].full_tensor().to(dtype), expected[name], name)


# Copies and files


def test_copies_share_what_the_originals_shared(device, backend):
    first = make(device, backend)
    second = wk.MoELayer(8, 12, 4, router=first.router, experts=first.experts, backend=backend)
    copies = copy.deepcopy(torch.nn.ModuleList([first, second]))
    assert copies[0].experts is copies[1].experts
    assert copies[0].router is copies[1].router
    assert copies[0].experts is not first.experts
    before = {name: p.clone() for name, p in first.named_parameters()}
    with torch.no_grad():
        for parameter in copies.parameters():
            parameter.zero_()
    assert_same(dict(first.named_parameters()), before)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_layer_read_from_a_file_is_the_layer(how, device, backend):
    layer, x = make(device, backend, normalize=True, capacity_factor=None, priority="score"), tokens(device)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert repr(other) == repr(layer)
    assert_same(step(other, other, x), step(layer, layer, x))


def test_what_a_layer_returns_can_be_sent(device, backend):
    """To another process, say: named tuples of tensors and ints stay what they are."""
    layer = make(device, backend)
    with torch.no_grad():
        routing = layer.route(tokens(device))
    other = pickle.loads(pickle.dumps(routing))
    assert type(other.plan) is wk.RoutingPlan
    assert type(other.aux) is wk.MoEAux
    assert other.plan[5:] == routing.plan[5:]
    for one, two in zip(other.plan[:5], routing.plan[:5], strict=True):
        assert_same_bits(one, two)


@pytest.mark.parametrize("how", ["copied", "assigned", "from meta"])
def test_a_state_dict_makes_the_same_layer(how, device, backend):
    layer, x = make(device, backend), tokens(device)
    torch.manual_seed(5)
    with torch.device("meta" if how == "from meta" else device):
        other = wk.MoELayer(8, 12, 4, backend=backend)
    other.load_state_dict(layer.state_dict(), assign=how != "copied")
    assert_same(step(other, other, x), step(layer, layer, x))
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.w1"):
        other.load_state_dict({name: t for name, t in layer.state_dict().items() if name != "experts.w1"})
    with pytest.raises(RuntimeError, match=r"size mismatch for experts\.w1"):
        wk.MoELayer(8, 13, 4).load_state_dict(layer.state_dict())


def test_an_average_of_weights(device, backend):
    """torch's AveragedModel copies the layer and averages what the copies' names hold."""
    layer = make(device, backend)
    average = torch.optim.swa_utils.AveragedModel(layer)
    average.update_parameters(layer)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(3)
    average.update_parameters(layer)
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter, 2 * before[name])
