"""Rules that hold for every op alike: same bits, no aliasing, no writes to inputs, one derivative, frozen inputs, and
what torch.func may do with it."""

import itertools

import pytest
import torch
from calls import OurCalls
from torch.autograd import forward_ad

import widenet_kernels as wk
from widenet_kernels.ops.registry import NAMESPACES
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_same_bits


def cases(shape, device, backend, dtype=torch.float32):
    """For each public op: a function of its differentiable inputs, and those inputs."""
    plan = inputs.make_plan(shape, device=device)
    w1, b1, w2, b2 = inputs.make_experts(shape, dtype=dtype, device=device)
    rows = inputs.normal(plan.num_rows, shape.D, seed=6, dtype=dtype, device=device)
    x = inputs.make_x(shape, dtype=dtype, device=device)
    weight = inputs.make_gate_weight(shape, device=device)
    logits = inputs.make_logits(shape, dtype=dtype, device=device)
    index = inputs.make_expert_index(shape, device=device)
    router_weight = inputs.normal(shape.E, shape.D, seed=10, dtype=dtype, device=device)
    on = {"backend": backend}

    def routed(x, router_weight):
        gate, plan, logits = wk.route(x, router_weight, shape.K, shape.C, normalize=True, priority="score", **on)
        return *gate, *plan[:5], logits

    def planned(weight):
        return wk.plan_routing(index, shape.E, shape.C, priority="score", weight=weight, **on)[:5]

    return {
        "topk_gate": (lambda z: tuple(wk.topk_gate(z, shape.K, normalize=True, **on)), [logits]),
        "plan_routing": (planned, [weight]),
        "route": (routed, [x, router_weight]),
        "permute": (lambda x: (wk.permute(x, plan, **on),), [x]),
        "grouped_gemm": (lambda r, w, b: (wk.grouped_gemm(r, w, plan, b, "gelu", **on),), [rows, w1, b1]),
        "grouped_gemm-linear": (lambda r, w: (wk.grouped_gemm(r, w, plan, **on),), [rows, w1]),
        "combine": (lambda r, w: (wk.combine(r, w, plan, **on),), [rows, weight]),
        "moe_ffn": (lambda x, w, *e: (wk.moe_ffn(x, w, plan, *e, **on),), [x, weight, w1, b1, w2, b2]),
    }


OPS = tuple(cases(inputs.ORDINARY, "cpu", "reference"))
DIFFERENTIABLE = tuple(name for name in OPS if name != "plan_routing")


def forward_and_backward(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    wanted = [t for t in out if t.requires_grad]
    grads = [inputs.normal(*t.shape, seed=20 + i, dtype=t.dtype, device=t.device) for i, t in enumerate(wanted)]
    return [*out, *(torch.autograd.grad(wanted, leaves, grads) if wanted else ())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_same_bits_twice(op, dtype, device, backend, several_threads):
    torch.use_deterministic_algorithms(False)
    shape = inputs.WIDE if op.startswith(("grouped_gemm", "moe_ffn")) else inputs.MANY_TOKENS
    function, tensors = cases(shape, device, backend, dtype)[op]
    first = forward_and_backward(function, tensors)
    for _ in range(2):
        for a, b in zip(forward_and_backward(function, tensors), first, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [op for op in OPS if op.startswith(("grouped_gemm", "moe_ffn"))])
def test_same_bits_twice_of_small_experts(op, dtype, device, backend, several_threads):
    function, tensors = cases(inputs.SMALL_EXPERTS, device, backend, dtype)[op]
    first = forward_and_backward(function, tensors)
    for a, b in zip(forward_and_backward(function, tensors), first, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["topk_gate", "plan_routing", "permute", "combine"])
def test_same_bits_for_any_number_of_threads(op, dtype, device, backend):
    torch.use_deterministic_algorithms(False)
    function, tensors = cases(inputs.MANY_TOKENS, device, backend, dtype)[op]
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(forward_and_backward(function, tensors))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("shape", [inputs.ORDINARY, inputs.DROPLESS, inputs.IDENTITY], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_outputs_share_no_storage(op, shape, device, backend):
    """Also where rows are the tokens in their order, and a copy could be saved; gradients neither."""
    function, tensors = cases(shape, device, backend)[op]
    leaves = [t.detach().requires_grad_() for t in tensors]
    everything = [*function(*leaves), *leaves, *inputs.make_plan(shape, device=device)[:5]]
    assert_no_shared_storage(everything)
    assert_no_shared_storage([*forward_and_backward(function, tensors), *tensors])


def assert_no_shared_storage(tensors):
    for a, b in itertools.combinations([t for t in tensors if t.numel()], 2):
        assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_not_written(op, device, backend):
    function, tensors = cases(inputs.ORDINARY, device, backend)[op]
    copies, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    first = forward_and_backward(function, tensors)
    for tensor, copy, version in zip(tensors, copies, versions, strict=True):
        assert_same_bits(tensor, copy)
        assert tensor._version == version
    for a, b in zip(forward_and_backward(function, tensors), first, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_incoming_gradients_are_not_written(op, device, backend):
    function, tensors = cases(inputs.ORDINARY, device, backend)[op]
    leaves = [t.detach().requires_grad_() for t in tensors]
    wanted = [t for t in function(*leaves) if t.requires_grad]
    grads = [torch.ones_like(t) for t in wanted]
    torch.autograd.grad(wanted, leaves, grads)
    assert all((g == 1).all() for g in grads)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_double_backward_is_a_clear_error(op, device, backend):
    function, tensors = cases(inputs.ORDINARY, device, backend)[op]
    leaves = [t.detach().requires_grad_() for t in tensors]
    loss = sum(t.square().sum() for t in function(*leaves) if t.requires_grad)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"widenet_kernels: {op.partition('-')[0]} is differentiable once"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@pytest.mark.filterwarnings("ignore:.*performance drop")  # in jacrev, which is vmap of vjp
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradients_by_torch_func(op, device, backend):
    """vjp, grad and jacrev give autograd's bits; once, as there."""
    function, tensors = cases(inputs.ORDINARY, device, backend)[op]

    def loss(*tensors):
        return sum(t.square().sum() for t in function(*tensors) if t.is_floating_point())

    leaves = [t.detach().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    everything = tuple(range(len(tensors)))
    value, vjp = torch.func.vjp(loss, *tensors)
    by_grad, by_jacrev = (f(loss, everything)(*tensors) for f in (torch.func.grad, torch.func.jacrev))
    for ours in (vjp(torch.ones_like(value)), by_grad, by_jacrev):
        for a, b in zip(ours, expected, strict=True):
            assert_same_bits(a, b)
    with pytest.raises(RuntimeError, match=rf"widenet_kernels: {op.partition('-')[0]} is differentiable once"):
        torch.func.grad(lambda *t: torch.func.grad(loss)(*t).square().sum())(*tensors)


@pytest.mark.filterwarnings("ignore:.*performance drop")  # sample by sample, as torch says
@pytest.mark.parametrize("op", OPS)
def test_vmap_is_a_loop_over_samples(op, device, backend):
    """Of the results, and of every gradient: by vmap of grad, by grad of vmap and by autograd through vmap."""
    function, tensors = cases(inputs.ORDINARY, device, backend)[op]
    batches = [torch.stack([t, 0.5 * t.flip(0)]) for t in tensors]
    samples = list(zip(*(batch.unbind() for batch in batches), strict=True))
    results = torch.vmap(function)(*batches)
    for ours, *expected in zip(results, *(function(*sample) for sample in samples), strict=True):
        assert_same_bits(ours, torch.stack(expected))
    if op not in DIFFERENTIABLE:
        return

    def loss(*tensors):
        return sum(t.square().sum() for t in function(*tensors) if t.is_floating_point())

    grad = torch.func.grad(loss, tuple(range(len(tensors))))
    expected = [torch.stack(grads) for grads in zip(*(grad(*sample) for sample in samples), strict=True)]
    leaves = [batch.detach().requires_grad_() for batch in batches]
    for gradients in (
        torch.vmap(grad)(*batches),
        torch.func.grad(lambda *b: torch.vmap(loss)(*b).sum(), tuple(range(len(tensors))))(*batches),
        torch.autograd.grad(torch.vmap(loss)(*leaves).sum(), leaves),
    ):
        for a, b in zip(gradients, expected, strict=True):
            assert_same_bits(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by torch, where it prepares jvp
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_forward_mode_is_a_clear_error(op, device, backend):
    """Without one the tangent would count as zero."""
    function, tensors = cases(inputs.ORDINARY, device, backend)[op]
    message = rf"^widenet_kernels: {op.partition('-')[0]} has no forward-mode derivative"
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(function, tuple(tensors), tuple(tensors))
    with pytest.raises(RuntimeError, match=message):
        torch.func.hessian(lambda *t: function(*t)[0].square().sum())(*tensors)
    for requires_grad in (False, True):
        leaves = [t.detach().requires_grad_(requires_grad) for t in tensors]
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
            function(*(forward_ad.make_dual(t, t.detach()) for t in leaves))
    with forward_ad.dual_level():  # of something else
        for a, b in zip(function(*tensors), function(*tensors), strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_no_gradient_without_a_call_for_it(op, device, backend):
    function, tensors = cases(inputs.ORDINARY, device, backend)[op]
    assert not any(t.requires_grad for t in function(*tensors))
    with torch.no_grad():
        assert not any(t.requires_grad for t in function(*[t.detach().requires_grad_() for t in tensors]))


@pytest.mark.parametrize(
    ("op", "names"),
    {
        "route": ["x", "router_weight"],
        "grouped_gemm": ["rows", "weight", "bias"],
        "combine": ["rows", "weight"],
        "moe_ffn": ["x", "weight", "w1", "b1", "w2", "b2"],
    }.items(),
    ids=["route", "grouped_gemm", "combine", "moe_ffn"],
)
def test_no_gradient_work_for_frozen_inputs(op, names, device, backend):
    """The backward op is told what is needed, and gives the rest back without elements."""
    function, tensors = cases(inputs.ORDINARY, device, backend)[op]
    for wanted in range(len(names)):
        leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        loss = sum(t.sum() for t in function(*leaves) if t.requires_grad)
        with OurCalls() as ours:
            loss.backward()
        call = ours.the(f"{op}_backward").arguments
        assert [call[f"need_{name}"] for name in names] == [i == wanted for i in range(len(names))]
        call = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        namespace = getattr(torch.ops, NAMESPACES[backend])
        with torch.no_grad():
            out = getattr(namespace, f"{op}_backward")(*call.values())
        assert [t.numel() > 0 for t in out] == [i == wanted for i in range(len(names))]
        assert leaves[wanted].grad is not None


@pytest.mark.parametrize("op", ["grouped_gemm", "moe_ffn"])
def test_the_pre_activation_is_kept_for_gradients_alone(op, device, backend):
    function, tensors = cases(inputs.ORDINARY, device, backend)[op]
    num_rows = inputs.make_plan(inputs.ORDINARY, device=device).num_rows
    for wanted, rows in ((False, 0), (True, num_rows)):
        with OurCalls() as ours:
            function(*[t.detach().requires_grad_(wanted) for t in tensors])
        assert ours.the(op).result[1].shape == (rows, inputs.ORDINARY.F)
