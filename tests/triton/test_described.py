"""The second form of the products, by tensor descriptors: the same bits, and only where a descriptor is possible."""

import pytest
import torch

triton = pytest.importorskip("triton")

import widenet_kernels as wk  # noqa: E402
from widenet_kernels.testing import inputs  # noqa: E402
from widenet_kernels.testing.numerics import assert_same_bits, value_and_grads  # noqa: E402
from widenet_kernels.triton import grouped_gemm  # noqa: E402
from widenet_kernels.triton.tiles import choose_tile  # noqa: E402

pytestmark = pytest.mark.interpreted


@pytest.fixture
def noted(monkeypatch):
    """Every tile described; the list of how the operands of each product were."""
    forms = []

    def choose(problem, target):
        return choose_tile(problem, target)._replace(described=True)

    def description(*operands):
        forms.append(describe(*operands))
        return forms[-1]

    describe = grouped_gemm.description
    monkeypatch.setattr(grouped_gemm, "choose_tile", choose)
    monkeypatch.setattr(grouped_gemm, "description", description)
    return forms


def layer(shape, dtype, activation, transposed):
    """Two layers and their gradients, the weights [E, N, M] in memory if ``transposed``."""
    w1, b1, w2, b2 = inputs.make_experts(shape, activation, dtype=dtype)
    if transposed:
        w1, w2 = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w1, w2))
    plan = inputs.make_plan(shape)

    def call(rows, w1, b1, w2, b2):
        hidden = wk.grouped_gemm(rows, w1, plan, b1, activation, backend="triton")
        return wk.grouped_gemm(hidden, w2, plan, b2, backend="triton")

    rows = inputs.normal(shape.E * shape.C, shape.D, seed=6, dtype=dtype)
    rows[inputs.unused_rows(plan)] = float("nan")
    return call, {"rows": rows, "w1": w1, "b1": b1, "w2": w2, "b2": b2}


@pytest.mark.parametrize("transposed", [False, True], ids=["kn", "nk"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_same_bits_as_by_pointers(dtype, activation, transposed, noted, monkeypatch):
    described = []
    from_tensor = grouped_gemm.TensorDescriptor.from_tensor
    monkeypatch.setattr(
        grouped_gemm.TensorDescriptor, "from_tensor", lambda *of: described.append(of[0].shape) or from_tensor(*of)
    )
    call, arguments = layer(inputs.WIDE, dtype, activation, transposed)
    found = value_and_grads(call, arguments)
    assert noted == (["nk", "nk", "kn", "kn"] if transposed else ["kn", "kn", "nk", "nk"])
    assert len(described) == 12, "two operands of four products and of two weight gradients"
    described.clear()
    monkeypatch.setattr(grouped_gemm, "can_be_described", lambda tensor: False)
    for name, expected in value_and_grads(call, arguments).items():
        assert_same_bits(found[name], expected)
    assert not described


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_odd_strides_go_by_pointers(dtype, noted):
    call, arguments = layer(inputs.ODD, dtype, "gelu", False)
    value_and_grads(call, arguments)
    assert set(noted) == {""}


def test_what_can_be_described():
    a, weight = torch.empty(9, 16), torch.empty(3, 16, 8)
    transposed = torch.empty(3, 8, 16).transpose(1, 2)
    assert grouped_gemm.description(a, weight, 8) == "kn"
    assert grouped_gemm.description(a, transposed, 8) == "nk"
    assert grouped_gemm.description(torch.empty(9, 20)[:, :16], weight, 8) == "kn"
    for rows in (
        torch.empty(0, 16),  # nothing
        torch.empty(9, 17)[:, :16],  # rows 68 bytes apart
        torch.empty(9, 32)[:, 1:17],  # starts at byte 4
        torch.empty(16, 9).t(),  # columns
        torch.empty(1, 16).expand(9, 16),  # one row for all
    ):
        assert grouped_gemm.description(rows, weight, 8) == ""
    assert grouped_gemm.description(a, torch.empty(3, 16, 16)[:, :, ::2], 8) == ""
    assert grouped_gemm.description(a, torch.empty(1, 16, 8).expand(3, 16, 8), 8) == ""
    assert grouped_gemm.description(a, weight, 6) == ""  # the gated half starts at byte 24
