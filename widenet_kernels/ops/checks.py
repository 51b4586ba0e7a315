"""What every public function asks of its arguments, and how it says no: op, argument, what was expected, what came.

Beside the checks stands what else comes before a call: the casts of autocast, and whether a gradient is wanted.
"""

from typing import Any

import torch
from torch import Tensor

from widenet_kernels.ops.registry import FLOATS, is_transformed
from widenet_kernels.routing import RoutingPlan

MOST_ROWS = 2**31 - 1  # rows and choices are counted in int32
# asked once: not every version of torch's compiler can trace the question
AUTOCAST_DEVICES = {name for name in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(name)}


def invalid(op: str, argument: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def wrong_type(op: str, argument: str, expected: str, got: Any) -> TypeError:
    return TypeError(f"{op}: {argument}: expected {expected}, got {got}")


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"


def check_tensor(op: str, argument: str, tensor: Any, shape: tuple[int | None, ...], letters: str) -> None:
    """``shape`` gives the sizes that are known already (None: any); ``letters`` names them, such as "[T, D]"."""
    if not isinstance(tensor, Tensor):
        raise wrong_type(op, argument, f"a tensor {letters}", type(tensor).__name__)
    sizes = tensor.shape
    if sizes == shape:
        return
    if len(sizes) != len(shape):
        raise invalid(op, argument, f"a tensor {letters}", describe(tensor))
    for have, want in zip(sizes, shape, strict=True):
        if want is not None and have != want:
            expected = ", ".join("any" if size is None else str(size) for size in shape)
            raise invalid(op, argument, f"{letters} = [{expected}]", describe(tensor))


def check_float(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise wrong_type(op, argument, "fp32, bf16, fp16 or fp64", describe(tensor))


def check_like(op: str, argument: str, tensor: Tensor, first: str, like: Tensor) -> None:
    """Same device and, for the tensors that meet in one product, the same dtype as the op's first argument."""
    check_device(op, argument, tensor, first, like)
    if tensor.dtype != like.dtype:
        raise wrong_type(op, argument, f"{like.dtype} as {first}", describe(tensor))


def check_device(op: str, argument: str, tensor: Tensor, first: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise invalid(op, argument, f"a tensor on {like.device} as {first}", describe(tensor))


def check_k(op: str, k: Any, num_experts: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise wrong_type(op, "k", "an int", repr(k))
    if not 1 <= k <= num_experts:
        raise invalid(op, "k", f"1 to {num_experts}, the number of experts", k)


def check_flag(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise wrong_type(op, argument, "True or False", repr(value))


def check_plan(op: str, plan: Any, like: Tensor, first: str) -> None:
    """The kernels check the values they read from a plan, but trust its shapes and dtypes: those are checked here."""
    if not isinstance(plan, RoutingPlan):
        raise wrong_type(op, "plan", "a RoutingPlan, as plan_routing and route return it", type(plan).__name__)
    experts = (plan.num_experts,)
    check_indices(op, "plan.choice_row", plan.choice_row, (None, plan.k), like, first)
    check_indices(op, "plan.row_choice", plan.row_choice, (plan.num_rows,), like, first)
    check_indices(op, "plan.expert_begin", plan.expert_begin, experts, like, first)
    check_indices(op, "plan.expert_count", plan.expert_count, experts, like, first)
    check_indices(op, "plan.expert_demand", plan.expert_demand, experts, like, first)


def check_indices(op: str, argument: str, tensor: Any, shape: tuple[int | None, ...], like: Tensor, first: str) -> None:
    check_tensor(op, argument, tensor, shape, "as plan_routing made it")
    check_device(op, argument, tensor, first, like)
    if tensor.dtype != torch.int32:
        raise wrong_type(op, argument, "torch.int32", describe(tensor))


def check_layout(op: str, capacity: int | None, tokens: str, num_choices: int, num_experts: int, priority: str) -> None:
    """Capacity and priority of a plan, and that its choices (from the argument ``tokens``) and rows fit in int32."""
    if priority not in ("choice", "token", "score"):
        raise invalid(op, "priority", "'choice', 'token' or 'score'", repr(priority))
    if capacity is not None:
        if isinstance(capacity, bool) or not isinstance(capacity, int | torch.SymInt):
            raise wrong_type(op, "capacity", "an int, or None for dropless", repr(capacity))
        if capacity < 0:
            raise invalid(op, "capacity", "at least 0, or None for dropless", capacity)
        if capacity * num_experts > MOST_ROWS:
            raise invalid(op, "capacity", f"capacity * num_experts below 2**31 (num_experts = {num_experts})", capacity)
    if num_choices > MOST_ROWS:
        raise invalid(op, tokens, "fewer than 2**31 choices T * K", num_choices)


def autocast(device: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast the operands of a GEMM in the autocast dtype; fp64 is never cast."""
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Inside a transform of torch.func a tensor does not tell whether an outer one will ask for its gradient."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors) or is_transformed()
