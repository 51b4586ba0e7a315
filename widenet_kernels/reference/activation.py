"""The experts' activations and their derivatives, in plain torch.

The gated ones take z [R, 2F], gate half then value half, and return act(gate) * value [R, F].
"""

import math

import torch
from torch import Tensor

from widenet_kernels.reference.gate import math_dtype
from widenet_kernels.routing import GATED


def _plain(z: Tensor, name: str) -> Tensor:
    if name == "gelu":
        return torch.nn.functional.gelu(z)
    if name == "gelu_tanh":
        return torch.nn.functional.gelu(z, approximate="tanh")
    if name == "relu":
        return z.relu()
    return torch.nn.functional.silu(z)


def _derivative(z: Tensor, name: str) -> Tensor:
    if name == "gelu":
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        root, cubic = math.sqrt(2 / math.pi), 0.044715
        tanh = torch.tanh(root * (z + cubic * z**3))
        return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh**2) * root * (1 + 3 * cubic * z**2)
    if name == "relu":
        return (z > 0).to(z.dtype)
    sigmoid = z.sigmoid()
    return sigmoid * (1 + z * (1 - sigmoid))


def activate(z: Tensor, name: str | None) -> Tensor:
    """act(z), computed in fp32 or fp64, in the dtype of z."""
    if not name:
        return z
    wide = z.to(math_dtype(z))
    if name in GATED:
        gate, value = wide.chunk(2, dim=-1)
        return (_plain(gate, GATED[name]) * value).to(z.dtype)
    return _plain(wide, name).to(z.dtype)


def activate_backward(grad: Tensor, z: Tensor, name: str | None) -> Tensor:
    """d z from d act(z)."""
    if not name:
        return grad
    wide, grad_wide = z.to(math_dtype(z)), grad.to(math_dtype(z))
    if name in GATED:
        gate, value = wide.chunk(2, dim=-1)
        grad_gate = grad_wide * value * _derivative(gate, GATED[name])
        return torch.cat([grad_gate, grad_wide * _plain(gate, GATED[name])], dim=-1).to(z.dtype)
    return (grad_wide * _derivative(wide, name)).to(z.dtype)
