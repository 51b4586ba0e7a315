"""The curves of the activations on a dense grid: how far off each level is, against float64 without cancellation."""

import math

import mpmath
import pytest
import torch
from native import DTYPES

from widenet_kernels.testing.numerics import assert_same_bits

NAMES = ("gelu", "gelu_tanh", "relu", "silu")
ROOT, CUBIC = math.sqrt(2 / math.pi), 0.044715
STRANGE = (math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39)


def exact(z, name):
    """Value and derivative in float64; the tails have all their digits."""
    if name == "relu":
        return z.clamp(min=0), (z > 0).double()
    if name == "gelu":
        phi = 0.5 * torch.special.erfc(-z * math.sqrt(0.5))
        return z * phi, phi + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    inner = z if name == "silu" else 2 * ROOT * (z + CUBIC * z**3)
    slope = torch.ones_like(z) if name == "silu" else 2 * ROOT * (1 + 3 * CUBIC * z**2)
    s = torch.sigmoid(inner)
    return z * s, s + z * s * torch.sigmoid(-inner) * slope


def literal(z, name):
    """Value and derivative of the definition, with 50 digits."""
    with mpmath.workdps(50):
        curves = {
            "gelu": lambda x: x * mpmath.ncdf(x),
            "gelu_tanh": lambda x: x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + CUBIC * x**3))),
            "relu": lambda x: max(x, mpmath.mpf(0)),
            "silu": lambda x: x / (1 + mpmath.exp(-x)),
        }
        point = mpmath.mpf(z)
        return float(curves[name](point)), float(mpmath.diff(curves[name], point))


@pytest.mark.parametrize("name", NAMES)
def test_exact_is_the_definition(name):
    z = torch.linspace(-12, 12, 97, dtype=torch.float64) + 0.01
    for got, want in zip(exact(z, name), zip(*(literal(v, name) for v in z.tolist()), strict=True), strict=True):
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def grid():
    """[-40, 40], ever denser around 0, down to subnormals; as floats."""
    even = torch.linspace(-40, 40, 160_001)
    tiny = torch.logspace(-45, 0, 4_000, dtype=torch.float64).float()
    return torch.cat([even, tiny, -tiny])[None]


def curve(kernels, z, name):
    value = kernels.activation(z, name)[1]
    derivative = kernels.activation_backward(z, torch.ones_like(z), name, outputs=["grad_z"])[0]
    return value, derivative


# Largest error of the value, as a share of |z|, and of the derivative, in units of 2**-24 (half an ulp of 1). Measured
# over the grid and all levels: gelu 3.33 and 3.59, gelu_tanh 2.15 and 3.19, silu 2.31 and 3.09. Where it comes from:
# the exponential is good to 2 ulp; a quotient, a product and a sum behind it round once each, and so does the product
# with z. In gelu, t and the polynomial in t (fitted to 4e-9) round too, in gelu_tanh the polynomial inside tanh.
FLOAT32 = {"gelu": (3.5, 4), "gelu_tanh": (2.5, 3.5), "relu": (0, 0), "silu": (2.5, 3.5)}


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_within_a_few_roundings(kernels, name):
    z = grid()
    value, derivative = (out.double() for out in curve(kernels, z, name))
    exact_value, exact_derivative = exact(z.double(), name)
    most_value, most_derivative = FLOAT32[name]
    # Below 2**-126 the product z Phi(z) is subnormal and rounds to a multiple of 2**-149.
    allowed = most_value * 2**-24 * z.double().abs() + 2**-150
    assert ((value - exact_value).abs() <= allowed).all()
    assert ((derivative - exact_derivative).abs() <= most_derivative * 2**-24).all()


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_tails_keep_their_relative_precision(kernels, name):
    """Down to where the exponential stops, at e^-87: what is rounded in the exponent u is worth u 2**-24 each time.

    Measured: 2.0 roundings in gelu's z^2 / 2, 2.4 in gelu_tanh's cubic, 1.0 in silu, whose exponent is z itself.
    """
    z = torch.linspace(-87, -1, 20_001)
    u = {"gelu": z**2 / 2, "gelu_tanh": -2 * ROOT * (z + CUBIC * z**3), "silu": -z}[name]
    z, u = z[u < 87][None], u[u < 87].double()
    value, exact_value = curve(kernels, z, name)[0].double(), exact(z.double(), name)[0]
    assert ((value - exact_value).abs() <= 2.5 * 2**-24 * (u + 2) * exact_value.abs()).all()


@pytest.mark.parametrize("name", NAMES)
def test_float64(kernels, name):
    z = grid().double()
    for out, want in zip(curve(kernels, z, name), exact(z, name), strict=True):
        torch.testing.assert_close(out, want, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_halves_are_rounded_floats(kernels, name, dtype):
    """Every finite half: the float32 result, rounded once."""
    z = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    z = z[z.isfinite()][None]
    for half, wide in zip(curve(kernels, z, name), curve(kernels, z.float(), name), strict=True):
        assert_same_bits(half, wide.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_strange_values(kernels, name, dtype):
    """Infinities and NaN as in torch; zeros and subnormals give z / 2 (relu: z or 0) and slope 1/2, signs included."""
    z = torch.tensor([STRANGE], dtype=dtype)
    value, derivative = curve(kernels, z, name)
    function = {"silu": torch.nn.functional.silu, "relu": torch.relu}.get(name)
    if function is None:
        torch_value = torch.nn.functional.gelu(z.double(), approximate="tanh" if name == "gelu_tanh" else "none")
    else:
        torch_value = function(z.double())
    assert_same_bits(value[:, :3].double(), torch_value[:, :3])
    small, small_slope = z[:, 3:].double(), derivative[:, 3:].double()
    expected = small.clamp(min=0) if name == "relu" else small / 2
    smallest = {torch.float16: 2**-24, torch.bfloat16: 2**-133, torch.float32: 2**-149, torch.float64: 0}[dtype]
    torch.testing.assert_close(value[:, 3:].double(), expected, rtol=1e-7, atol=smallest / 2)
    assert_same_bits(small_slope, (small > 0).double() if name == "relu" else torch.full_like(small, 0.5))
    assert (value[0, 3:5].signbit() == z[0, 3:5].signbit()).all()
