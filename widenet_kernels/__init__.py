"""Mixture-of-experts routing for PyTorch: gate, plan, permute, grouped GEMM and combine as autograd-compatible ops."""

__version__ = "0.1.0"

from widenet_kernels.nn import Experts, MoEAux, MoELayer, MoERouting, TopKRouter, load_balance_loss, router_z_loss
from widenet_kernels.ops.combine import combine
from widenet_kernels.ops.gate import topk_gate
from widenet_kernels.ops.grouped_gemm import grouped_gemm
from widenet_kernels.ops.moe import GradBuffers, moe_ffn
from widenet_kernels.ops.native import build_info, empty_cache, load_library
from widenet_kernels.ops.permute import permute
from widenet_kernels.ops.plan import plan_routing
from widenet_kernels.ops.registry import available_backends
from widenet_kernels.ops.route import route
from widenet_kernels.routing import Gate, RoutingPlan, expert_capacity

load_library()
del load_library

__all__ = [
    "Experts",
    "Gate",
    "GradBuffers",
    "MoEAux",
    "MoELayer",
    "MoERouting",
    "RoutingPlan",
    "TopKRouter",
    "available_backends",
    "build_info",
    "combine",
    "empty_cache",
    "expert_capacity",
    "grouped_gemm",
    "load_balance_loss",
    "moe_ffn",
    "permute",
    "plan_routing",
    "route",
    "router_z_loss",
    "topk_gate",
]
