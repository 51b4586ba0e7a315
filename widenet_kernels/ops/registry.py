"""How an op comes to be: schema in Python, kernels from the compiled library, the reference as the fallback.

Every op is defined once per backend, in a namespace of its own with the same schema, fake and autograd. In
``widenet_kernels`` PyTorch's dispatcher picks the compiled CPU (or CUDA) kernel, else the reference;
``widenet_kernels_triton`` holds the Triton kernels, ``widenet_kernels_reference`` the reference alone.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from widenet_kernels.ops import native

NAMESPACES = {
    "native": native.NAMESPACE,
    "triton": "widenet_kernels_triton",
    "reference": "widenet_kernels_reference",
}
BACKENDS = tuple(NAMESPACES)
PUBLIC_OPS = ("topk_gate", "plan_routing", "route", "permute", "grouped_gemm", "combine", "moe_ffn")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_libraries = {name: torch.library.Library(name, "FRAGMENT") for name in NAMESPACES.values()}


def define_op(
    schema: str,
    reference: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    differentiable: bool = True,
) -> None:
    """Define an op in every namespace.

    ``backward(ops, ctx, *grads)`` gets the namespace it runs in, so that forward and backward stay on one backend.
    A differentiable op without a ``backward`` is itself a gradient: differentiating it again is an error.
    """
    name = schema.partition("(")[0]
    for backend, namespace in NAMESPACES.items():
        library = _libraries[namespace]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        kernel = _triton_twin(reference) if backend == "triton" else _without_autocast(reference)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        if not differentiable:
            continue
        if backward is None:
            formula: Callable = functools.partial(_no_double_backward, name)
        else:
            formula = functools.partial(backward, getattr(torch.ops, namespace))
        torch.library.register_autograd(f"{namespace}::{name}", formula, setup_context=setup_context, lib=library)
        op = getattr(getattr(torch.ops, namespace), name).default
        _transformable[op] = _as_function(op, setup_context, formula)


_transformable: dict[Any, Callable] = {}  # every differentiable op -> the same, as torch.func can transform it


def _as_function(op: Any, setup_context: Callable | None, backward: Callable) -> Callable:
    """What register_autograd makes of a formula does not go through torch.func; this does, and vmap calls it in turn
    for every sample."""
    members = {
        "forward": staticmethod(op),
        "setup_context": staticmethod(setup_context or (lambda ctx, inputs, output: None)),
        "backward": staticmethod(backward),
        "jvp": staticmethod(functools.partial(_no_forward_mode, op._opname)),
        "generate_vmap_rule": True,
    }
    return type(op._opname, (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]


def _without_autocast(function: Callable) -> Callable:
    """The reference computes in the dtypes it is given: the public function has already cast."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def _triton_twin(reference: Callable) -> Callable:
    """The launcher of the same name in the same stem of widenet_kernels.triton, imported when first called."""
    module = reference.__module__.replace(".reference.", ".triton.")

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        launcher = getattr(importlib.import_module(module), reference.__name__)
        tensor = next(arg for arg in args if isinstance(arg, Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            return launcher(*(_contiguous_indices(arg) for arg in args))

    return run


def _contiguous_indices(arg: Any) -> Any:
    """The launchers take floats by their strides and index tensors as the plan makes them, contiguous."""
    return arg.contiguous() if isinstance(arg, Tensor) and not arg.is_floating_point() else arg


def _no_double_backward(name: str, ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        f"widenet_kernels: {name.removesuffix('_backward')} is differentiable once; a second derivative was asked for"
    )


def _no_forward_mode(name: str, ctx: Any, *tangents: Tensor | None) -> None:
    raise RuntimeError(
        f"widenet_kernels: {name.removesuffix('_backward')} has no forward-mode derivative (jvp, jacfwd, hessian); "
        "backward-mode (grad, vjp, jacrev) works"
    )


def why_not(backend: str, op: str, device: torch.device, dtype: torch.dtype, num_experts: int = 1) -> str | None:
    """The reason why this backend cannot serve the op here, or None if it can."""
    if dtype not in FLOATS:
        return f"{dtype} is not one of {', '.join(str(d) for d in FLOATS)}"
    if backend == "native":
        if device.type != "cpu" and num_experts > native.MOST_EXPERTS_ON_GPU:
            return f"its kernels for a GPU take up to {native.MOST_EXPERTS_ON_GPU:,} experts, got {num_experts:,}"
        return native.why_not(op, device)
    if backend == "triton":
        from widenet_kernels import triton

        return triton.why_not(device)
    return None


def _ranked(device: torch.device) -> tuple[str, ...]:
    """All backends, best first: on a CPU Triton's interpreter is for checking alone."""
    return ("native", "reference", "triton") if device.type == "cpu" else BACKENDS


def available_backends(op: str, device: str | torch.device, dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """The backends that serve ``op`` on ``device`` for ``dtype``, best first.

    Args:
        op: the name of a public function that takes ``backend=``, such as ``"moe_ffn"``.
    """
    if op not in PUBLIC_OPS:
        raise ValueError(f"available_backends: op: expected one of {', '.join(PUBLIC_OPS)}, got {op!r}")
    device = torch.device(device)
    return tuple(name for name in _ranked(device) if why_not(name, op, device, dtype) is None)


def ops_for(
    op: str, backend: str | None, tensor: Tensor, dtype: torch.dtype = torch.float32, num_experts: int = 1
) -> Any:
    """The namespace whose kernels serve this call; an explicit backend never falls through to another."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{op}: backend: expected None, 'native', 'triton' or 'reference', got {backend!r}")
    few_or_more = max(num_experts, native.MOST_EXPERTS_ON_GPU)  # up to so many, the number decides nothing
    key = op, backend, tensor.device, dtype, few_or_more
    if torch.compiler.is_compiling():
        return _choose(*key)
    ops = _chosen.get(key)
    if ops is None:
        ops = _chosen[key] = _choose(*key)
    return ops


_chosen: dict[tuple, Any] = {}  # what serves a call does not change while Python runs, and to find it takes a while


def _choose(op: str, backend: str | None, device: torch.device, dtype: torch.dtype, num_experts: int) -> Any:
    if backend is None:
        backend = next(name for name in _ranked(device) if why_not(name, op, device, dtype, num_experts) is None)
    else:
        reason = why_not(backend, op, device, dtype, num_experts)
        if reason is not None:
            raise ValueError(f"{op}: backend: {backend!r} cannot serve this call: {reason}")
    return getattr(torch.ops, NAMESPACES[backend])


def call(op: Any, wants_grad: bool, *args: Any) -> Any:
    """``op(*args)``, past autograd where no gradient is wanted: its formulas are in Python, and to be asked for them
    makes a call of five microseconds one of fifteen."""
    if wants_grad or torch.compiler.is_compiling() or is_transformed():
        return run(op, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return op.default(*args)


def run(op: Any, *args: Any) -> Any:
    """``op(*args)``, also inside the transforms of torch.func."""
    return _transformable.get(op.default, op.default)(*args) if is_transformed() else op.default(*args)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
