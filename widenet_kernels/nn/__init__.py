"""Modules: the router, the experts, the layer that joins them, and the routing losses."""

from widenet_kernels.nn.experts import Experts
from widenet_kernels.nn.losses import load_balance_loss, router_z_loss
from widenet_kernels.nn.moe_layer import MoEAux, MoELayer, MoERouting
from widenet_kernels.nn.router import TopKRouter

__all__ = ["Experts", "MoEAux", "MoELayer", "MoERouting", "TopKRouter", "load_balance_loss", "router_z_loss"]
