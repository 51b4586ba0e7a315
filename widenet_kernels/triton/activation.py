"""The experts' activations and their derivatives, and the elementwise backward of a layer: d z, and its column sums.

The gated ones act on the two halves of z [R, 2F]: act(gate half) * value half.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from widenet_kernels.routing import GATED
from widenet_kernels.triton.tiles import find_rows, sum_dtype

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution: 1 / sqrt(2 pi)
TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): 0.5 (1 + tanh(u)) is sigmoid(2u)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(z, NAME: tl.constexpr):
    """act(z); an empty name is the identity."""
    if NAME == "gelu":
        return z * (0.5 * (1.0 + tl.erf(z * SQRT_HALF)))
    elif NAME == "gelu_tanh":
        return z * tl.sigmoid(TANH_SCALE * (z + TANH_CUBIC * z * z * z))
    elif NAME == "relu":
        return tl.where(z <= 0.0, 0.0, z)  # NaN stays NaN
    elif NAME == "silu":
        return z * tl.sigmoid(z)
    else:
        return z


@triton.jit
def derivative(z, NAME: tl.constexpr):
    """act'(z)"""
    if NAME == "gelu":
        return 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * tl.exp(-0.5 * z * z) * DENSITY_AT_0
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(TANH_SCALE * (z + TANH_CUBIC * z * z * z))
        return s + z * s * (1.0 - s) * TANH_SCALE * (1.0 + 3.0 * TANH_CUBIC * z * z)
    elif NAME == "relu":
        return tl.where(z > 0.0, 1.0, 0.0).to(z.dtype)
    else:
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))


@triton.jit
def activation_gradient(grad, z, v, NAME: tl.constexpr, GLU: tl.constexpr):
    """d z, and d v of the value half (if there is none, d z again), from the gradient of act(z) or act(z) * v."""
    if NAME == "":
        dz, dv = grad, grad
    elif GLU:
        dz, dv = grad * v * derivative(z, NAME), grad * activate(z, NAME)
    else:
        dz = grad * derivative(z, NAME)
        dv = dz
    return dz, dv


@triton.jit
def store_gradient(dz, dz_ptrs, partial_ptrs, mask, column_mask):
    """Store what is wanted (a pointer may be None) of d z and of its column sums over the tile's used rows."""
    if dz_ptrs is not None:
        tl.store(dz_ptrs, dz.to(dz_ptrs.dtype.element_ty), mask=mask)
    if partial_ptrs is not None:
        tl.store(partial_ptrs, tl.sum(tl.where(mask, dz, 0.0), axis=0), mask=column_mask)
