"""Element counts that overflow 32 bits: every kernel's last programs, on tensors that take no memory.

The interpreter of these tests stops at an integer that overflows and at an address outside the tensors; here the
kernels must also get to the far end of each tensor.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

from widenet_kernels.triton import activation, combine, gate, grouped_gemm, moe, permute, plan, route  # noqa: E402

pytestmark = pytest.mark.interpreted
HALF = torch.float16


@pytest.fixture
def last():
    import interpreted

    with interpreted.last_programs(4) as far:
        yield far


def meta(*shape, dtype=HALF):
    return torch.empty(*shape, dtype=dtype, device="meta")


def index(*values):
    return torch.tensor(values, dtype=torch.int32)


def far_row_choice(num_rows, num_choices):
    """Row r serves choice r mod the number of choices, the last rows the last choices."""
    return (torch.arange(num_rows) - num_rows + num_choices).remainder(num_choices).to(torch.int32)


def assert_reached(far, *tensors):
    """To the last element of each, which is one that 32 bits cannot count."""
    for tensor in tensors:
        assert tensor.numel() > 2**31
        assert far.elements(tensor) == tensor.numel()


ROWS = 2**21 + 5
TOKENS, K = 2**20 + 3, 2


def test_permute(last):
    x, choice_row, row_choice = meta(TOKENS, 4096), meta(TOKENS, K, dtype=torch.int32), far_row_choice(ROWS, TOKENS * K)
    assert_reached(last, x, permute.permute(x, choice_row, row_choice))


def test_combine(last):
    choice_row = (torch.arange(TOKENS * K) - TOKENS * K + ROWS).clamp(min=-1).to(torch.int32).view(TOKENS, K)
    rows, weight = meta(ROWS, 4096), torch.ones(TOKENS, K)
    assert_reached(last, rows, combine.combine(rows, weight, choice_row, far_row_choice(ROWS, TOKENS * K)))
    grad_rows = meta(ROWS, 4096)
    assert_reached(last, grad_rows, permute.permute_backward(grad_rows, choice_row))


def test_combine_backward(last):
    every = torch.arange(ROWS, dtype=torch.int32)
    grad, rows, weight = meta(ROWS, 4096), meta(ROWS, 4096), torch.ones(ROWS, 1)
    grad_rows, _ = combine.combine_backward(grad, rows, weight, every[:, None], every, True, True)
    assert_reached(last, grad, rows, grad_rows)


# Few experts, the last with few rows: what one program sums over stays short.
BEGIN, COUNT = index(0, 1024, ROWS - 69), index(1000, ROWS - 69 - 1024, 69)


@pytest.mark.parametrize("act", ["gelu", "swiglu"])
def test_multiply(last, act):
    width = 2 * 4096 if act == "swiglu" else 4096
    a, weight, bias = meta(ROWS, 1040), meta(3, 1040, width), meta(3, width)
    assert_reached(last, a, *grouped_gemm.multiply(a, weight, bias, BEGIN, COUNT, ROWS, act, save=True, clear=True))


def test_weights(last):
    """One expert's weight alone is too large for 32 bits, in either layout."""
    a, begin, count = meta(40, 2**13), index(0, 33), index(33, 7)
    weight = meta(2, 2**13, 2**19)
    grouped_gemm.multiply(a, weight, None, begin, count, 40)
    assert_reached(last, weight)
    turned = meta(2, 2**19, 2**13)
    grouped_gemm.multiply(a, turned.transpose(1, 2), None, begin, count, 40)
    assert_reached(last, turned)


@pytest.mark.parametrize("add", [False, True])
def test_weight_gradient(last, add):
    a, b, out = meta(ROWS, 4096), meta(ROWS, 2**18), meta(3, 4096, 2**18, dtype=torch.float32)
    grouped_gemm.weight_gradient(a, b, out, BEGIN, COUNT, ROWS, add=add)
    assert_reached(last, a, b, out)


@pytest.mark.parametrize("act", ["gelu", "swiglu", ""])
def test_activation_backward(last, act):
    """The column sums of the slots are as many as 32 bits cannot count as well."""
    hidden = 2**17 + 2**12
    width = 2 * hidden if act == "swiglu" else hidden
    grad, z = meta(ROWS, hidden), meta(ROWS, width)
    weights = activation.RowWeights(torch.ones(TOKENS, K), far_row_choice(ROWS, TOKENS * K)) if act else None
    out = activation.activation_backward(grad, z, BEGIN, COUNT, act, True, True, weights, bool(act), bool(act))
    assert_reached(last, grad, *([out.dz, z, out.scaled] if act else []))
    assert last.elements(out.partial) == out.partial.numel() > 2**31
    assert not act or last.elements(out.dots) == out.dots.numel()


def test_output_backward(last):
    row_choice, choice_row = far_row_choice(ROWS, TOKENS * K), torch.zeros(TOKENS, K, dtype=torch.int32)
    dim = 2**16 + 2**12
    dy, b2, dots = meta(ROWS, dim), meta(3, dim), meta(1100, ROWS, dtype=torch.float32)
    grad_b2 = meta(3, dim, dtype=torch.float32)
    moe.output_backward(dy, torch.ones(TOKENS, K), choice_row, row_choice, BEGIN, COUNT, b2, dots, grad_b2, True)
    assert_reached(last, dy, dots)
    assert last.elements(grad_b2) == grad_b2.numel()


def test_gate(last):
    logits, noise = meta(2**21 + 3, 1024), meta(2**21 + 3, 1024)
    weight, expert_index, probs = gate.topk_gate(logits, 4, noise, True)
    assert_reached(last, logits, noise, probs)
    assert last.elements(weight) == weight.numel()
    grad = gate.topk_gate_backward(weight, probs, weight, expert_index, probs, True)
    assert_reached(last, grad)


def test_route(last, monkeypatch):
    """But for what loops over all tokens: the plan and the gradient of the router's weight."""
    monkeypatch.setattr(route, "plan_routing", lambda *arguments: ())
    x, router_weight, mask = meta(2**21 + 3, 1040), meta(1024, 1040), meta(2**21 + 3, dtype=torch.bool)
    noise = meta(2**21 + 3, 1024)
    weight, expert_index, probs, logits = route.route(x, router_weight, 2, 1, noise, False, "choice", mask)
    assert_reached(last, x, probs, logits, noise)
    args = (weight, probs, logits, x, router_weight, weight, expert_index, probs, False, True, False)
    grad_x, _ = route.route_backward(*args)
    assert_reached(last, grad_x)


def test_router_weight_gradient(last):
    """Rows of x far apart, and a gradient of 2^32 elements."""
    x, router_weight = meta(40 * 2**28).as_strided((40, 2**22), (2**28, 1)), meta(1024, 2**22)
    gate = (meta(40, 2), meta(40, 2, dtype=torch.int32), meta(40, 1024))
    asked = {"need_x": False, "need_router_weight": True}
    _, grad = route.route_backward(gate[0], None, None, x, router_weight, *gate, False, **asked)
    assert_reached(last, grad)


def test_plan():
    """As many rows as there may be."""
    import interpreted

    capacity = 2**30 - 1
    with interpreted.last_programs(1) as last:
        _, row_choice, *_ = plan.plan_routing(meta(2, 1, dtype=torch.int32), 2, capacity, "choice", None)
        assert row_choice.numel() == 2**31 - 2
        assert last.elements(row_choice) == row_choice.numel()


def test_strides(last):
    """Rows far apart, in inputs of a few elements."""
    x = meta(40 * 2**28).as_strided((40, 16), (2**28, 2**23))
    rows = permute.permute(x, meta(40, 1, dtype=torch.int32), torch.arange(40, dtype=torch.int32))
    assert last.elements(x) == 39 * 2**28 + 15 * 2**23 + 1
    assert last.elements(rows) == rows.numel()
