"""How many kernels one layer launches, and that nothing of torch's runs between them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

import widenet_kernels as wk  # noqa: E402
from widenet_kernels.testing import inputs  # noqa: E402

pytestmark = pytest.mark.interpreted

# What allocates or only looks: no kernel on a GPU.
NO_KERNEL = {
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "detach",
    "view",
    "transpose",
    "select",
    "slice",
    "alias",
}


class Launches(TorchDispatchMode):
    """The names of our kernels and of the ops of torch that compute, in order."""

    def __init__(self, monkeypatch):
        super().__init__()
        from triton.runtime.interpreter import GridExecutor

        self.names = []
        run = GridExecutor.__call__

        def noted(executor, *arguments, **named):
            self.names.append(executor.fn.__name__)
            return run(executor, *arguments, **named)

        monkeypatch.setattr(GridExecutor, "__call__", noted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        ours = function.namespace.startswith("widenet_kernels")
        if not ours and function._schema.name.partition("::")[2] not in NO_KERNEL:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def of_torch(names):
    return [name for name in names if not name.endswith("_kernel")]


def differentiable(shape, activation, bias):
    experts = inputs.make_experts(shape, activation, bias=bias)
    return [None if t is None else t.requires_grad_() for t in (inputs.make_x(shape), *experts)]


@pytest.fixture
def launches(monkeypatch):
    torch.use_deterministic_algorithms(False)  # which fill what torch.empty gives
    return Launches(monkeypatch)


@pytest.mark.parametrize("priority", ["choice", "token", "score"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_from_logits_to_y(launches, activation, priority):
    shape = inputs.ORDINARY
    x, *experts = differentiable(shape, activation, bias=True)
    logits, grad = inputs.make_logits(shape).requires_grad_(), torch.ones(shape.T, shape.D)
    with launches:
        gate = wk.topk_gate(logits, shape.K, backend="triton")
        score = gate.weight if priority == "score" else None
        plan = wk.plan_routing(gate.expert_index, shape.E, shape.C, priority=priority, weight=score, backend="triton")
        y = wk.moe_ffn(x, gate.weight, plan, *experts, activation, backend="triton")
        forward = list(launches.names)
        torch.autograd.grad(y, [logits, x, *experts], grad)
    sorting = {"aten.neg.default", "aten.argsort.stable", "aten.sort.stable"} if priority == "score" else set()
    assert set(of_torch(launches.names)) <= sorting
    ours = [name for name in launches.names if name.endswith("_kernel")]
    assert len(forward) - len(of_torch(forward)) == 7
    assert len(ours) == 19


def test_from_x_to_y(launches):
    """The router as well: route stands in for the gate's two kernels, and adds two of its own backward."""
    shape = inputs.DROPLESS
    x, *experts = differentiable(shape, "gelu", bias=True)
    router_weight, grad = inputs.normal(shape.E, shape.D, seed=1).requires_grad_(), torch.ones(shape.T, shape.D)
    with launches:
        gate, plan, _ = wk.route(x, router_weight, shape.K, backend="triton")
        y = wk.moe_ffn(x, gate.weight, plan, *experts, backend="triton")
        assert not of_torch(launches.names)
        assert len(launches.names) == 7
        torch.autograd.grad(y, [x, router_weight, *experts], grad)
    assert of_torch(launches.names) == ["aten.add.Tensor"]  # autograd's sum of the two gradients of x
    assert len(launches.names) - 1 == 21


def test_frozen_experts_cost_no_kernel(launches):
    """Only what leads to x: d hidden, d z, rows and their sum."""
    shape = inputs.ORDINARY
    x, *experts = [t.detach() for t in differentiable(shape, "gelu", bias=True)]
    plan, weight = inputs.make_plan(shape), inputs.make_gate_weight(shape)
    y = wk.moe_ffn(x.requires_grad_(), weight, plan, *experts, backend="triton")
    grad = torch.ones_like(y)
    launches.names.clear()
    with launches:
        torch.autograd.grad(y, [x], grad)
    assert launches.names == [
        "_permute_kernel",
        "_multiply_kernel",
        "_activation_backward_kernel",
        "_multiply_kernel",
        "_gather_sum_kernel",
    ]


def test_grad_buffers_cost_no_kernel(launches):
    """Added to where they are computed: as many as without."""
    shape = inputs.ORDINARY
    x, *experts = differentiable(shape, "swiglu", bias=True)
    plan, weight = inputs.make_plan(shape), inputs.make_gate_weight(shape).requires_grad_()
    counts = []
    for buffers in (None, wk.GradBuffers(*(torch.zeros_like(t) for t in experts))):
        y = wk.moe_ffn(x, weight, plan, *experts, "swiglu", grad_buffers=buffers, backend="triton")
        grad, wanted = torch.ones_like(y), [x, weight] if buffers else [x, weight, *experts]
        launches.names.clear()
        with launches:
            torch.autograd.grad(y, wanted, grad)
        assert not of_torch(launches.names)
        counts.append(len(launches.names))
    assert counts == [11, 11]
