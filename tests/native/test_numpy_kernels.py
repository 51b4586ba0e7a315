"""Every raw kernel, at every level of vector instructions, against the reference in torch.

Integers and data movement bit for bit, the rest by the tolerance policy against the same computation in float64.
"""

import pytest
import torch
from native import DTYPES, math_dtype

from widenet_kernels.reference.activation import activate, activate_backward
from widenet_kernels.reference.combine import combine_backward, gather_sum
from widenet_kernels.reference.gate import topk_gate, topk_gate_backward
from widenet_kernels.reference.grouped_gemm import rows_of_experts
from widenet_kernels.reference.permute import permute
from widenet_kernels.routing import ACTIVATIONS, GATED
from widenet_kernels.testing import inputs
from widenet_kernels.testing.numerics import assert_as_good_as, assert_float64, assert_same_bits, largest_error

SHAPES = (*inputs.SHAPES, inputs.MANY_TOKENS)
# Rows and columns: none, one, about a chunk of rows (32), about a tile of columns (256), more than one of each.
SIZES = ((0, 5), (1, 1), (3, 0), (32, 16), (33, 13), (65, 257), (70, 600))
CHUNK = 32

FEW = (inputs.ORDINARY, inputs.DROPLESS, inputs.MANY_TOKENS)

of_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
of_few_shapes = pytest.mark.parametrize("shape", FEW, ids=str)
# ``wide``: a router weight or gate weight in float64, whatever the rest is.
of_shape_and_math = pytest.mark.parametrize(
    ("shape", "wide"),
    [pytest.param(s, wide, id=f"{s}{'-float64' * wide}") for wide in (False, True) for s in (FEW if wide else SHAPES)],
)
of_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
of_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
with_or_without = pytest.mark.parametrize("given", [True, False], ids=["all", "few"])  # of the optional arguments


def assert_good(out, plain, exact, what="result"):
    """By the policy; ``plain`` is torch in the same dtype."""
    if out.dtype == torch.float64:
        assert_float64(out, exact, what)
    else:
        assert_as_good_as(out, plain, exact, what)


def chunk_sums(rows):
    """[chunks, width]: the sums over each 32 rows."""
    parts = rows.split(CHUNK) if rows.shape[0] else ()
    return torch.stack([part.sum(dim=0) for part in parts]) if parts else rows.new_zeros(0, rows.shape[1])


def make_rows(shape, dtype):
    num_rows = shape.T * shape.K if shape.C is None else shape.E * shape.C
    return inputs.normal(num_rows, shape.D, seed=6, dtype=dtype)


@with_or_without
@of_dtype
@of_shape
def test_gate(kernels, shape, dtype, given):
    math = math_dtype(dtype)
    logits = inputs.make_logits(shape, dtype=dtype)
    noise = inputs.normal(shape.T, shape.E, seed=7, dtype=math) if given else None
    weight, index, probs = kernels.gate(logits, shape.K, noise=noise, normalize=given)
    z = logits.to(math) if noise is None else logits.to(math) + noise
    exact_weight, _, exact_probs = topk_gate(z.double(), shape.K, None, given)
    plain_weight, plain_index, plain_probs = topk_gate(logits, shape.K, noise, given)
    assert_same_bits(index, plain_index, "expert_index")
    assert_good(weight, plain_weight, exact_weight, "weight")
    assert_good(probs, plain_probs, exact_probs, "probs")

    mask = inputs.make_mask(shape.T)
    masked_weight, masked_index, masked_probs = kernels.gate(logits, shape.K, noise=noise, mask=mask, normalize=given)
    assert_same_bits(masked_weight, torch.where(mask[:, None], weight, 0), "masked weight")
    assert_same_bits(masked_index, torch.where(mask[:, None], index, -1), "masked expert_index")
    assert_same_bits(masked_probs, probs, "masked probs")


def check_gate_backward(kernels, shape, dtype, normalize, absent=None):
    weight, index, probs = topk_gate(inputs.make_logits(shape, dtype=dtype), shape.K, None, normalize)
    index = torch.where(inputs.make_mask(shape.T)[:, None], index, -1)
    grads = [inputs.normal(*t.shape, seed=seed, dtype=dtype) for seed, t in enumerate((weight, probs, probs))]
    if absent is not None:
        grads[absent] = None

    def reference_in(dtype):
        wide = [None if grad is None else grad.to(dtype) for grad in grads]
        grad = topk_gate_backward(*wide[:2], weight.to(dtype), index, probs.to(dtype), normalize)
        return grad if wide[2] is None else grad + wide[2]

    grad = kernels.gate_backward(*grads, weight, index, probs, normalize=normalize)
    assert_good(grad, reference_in(dtype), reference_in(torch.float64))


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@of_shape
def test_gate_backward(kernels, shape, dtype, normalize):
    check_gate_backward(kernels, shape, dtype, normalize)


@pytest.mark.parametrize("absent", [0, 1, 2], ids=["no-weight", "no-probs", "no-logits"])
@of_few_shapes
def test_gate_backward_without_some_gradient(kernels, shape, absent):
    check_gate_backward(kernels, shape, torch.float32, True, absent)


@of_dtype
@of_shape_and_math
def test_route(kernels, shape, dtype, wide):
    math = torch.float64 if wide else math_dtype(dtype)
    x, router_weight = inputs.make_x(shape, dtype=dtype), inputs.normal(shape.E, shape.D, seed=8, dtype=math)
    grad = inputs.normal(shape.T, shape.E, seed=9, dtype=math)
    for name, out, expected in (
        ("logits", kernels.route(x, router_weight), lambda x, w, g: x @ w.t()),
        ("grad_x", kernels.route_backward_x(grad, x, router_weight), lambda x, w, g: g @ w),
        ("grad_router_weight", kernels.route_backward_weight(grad, x, router_weight), lambda x, w, g: g.t() @ x),
    ):
        dtype_of_out = dtype if name == "grad_x" else math
        assert out.dtype == dtype_of_out
        plain = expected(x.to(math), router_weight, grad).to(dtype_of_out)
        assert_good(out, plain, expected(x.double(), router_weight.double(), grad.double()), name)


@of_dtype
@of_shape
def test_permute(kernels, shape, dtype):
    plan, x = inputs.make_plan(shape), inputs.make_x(shape, dtype=dtype)
    rows = kernels.permute(x, plan.row_choice, shape.K)
    assert_same_bits(rows, permute(x, plan.choice_row, plan.row_choice))
    assert not rows[inputs.unused_rows(plan)].any()


def bias_of_rows(bias, plan):
    out = bias.new_zeros(plan.num_rows, bias.shape[1])
    for expert, mine in enumerate(rows_of_experts(plan.expert_begin, plan.expert_count, plan.num_rows)):
        out = torch.where(mine, bias[expert], out)
    return out


@with_or_without
@of_dtype
@of_shape_and_math
def test_combine(kernels, shape, dtype, given, wide):
    plan, math = inputs.make_plan(shape), torch.float64 if wide else math_dtype(dtype)
    rows = inputs.poisoned(make_rows(shape, dtype), inputs.unused_rows(plan))
    weight = inputs.make_gate_weight(shape, dtype=math)
    poisoned = inputs.poisoned(weight, inputs.dropped_choices(plan))
    biased, named = rows, {}
    if given:
        bias = inputs.normal(shape.E, shape.D, seed=5, dtype=dtype)
        biased, named = bias_of_rows(bias, plan), {"bias": bias, "expert_begin": plan.expert_begin}

        def expected(dtype):
            total = torch.where(inputs.unused_rows(plan)[:, None], 0, rows).to(dtype) + biased.to(dtype)
            return gather_sum(total, weight.to(math if dtype != torch.float64 else dtype), plan.choice_row)
    else:

        def expected(dtype):
            return gather_sum(rows.to(dtype), weight.to(math if dtype != torch.float64 else dtype), plan.choice_row)

    y = kernels.combine(rows, poisoned, plan.choice_row, **named)
    assert_good(y, expected(dtype), expected(torch.float64))
    assert not y[inputs.dropped_choices(plan).all(dim=1)].any()


@of_dtype
@of_shape
def test_combine_without_weight(kernels, shape, dtype):
    """Permute's backward."""
    plan, rows = inputs.make_plan(shape), make_rows(shape, dtype)
    y = kernels.combine(rows, None, plan.choice_row)
    exact = gather_sum(rows.double(), None, plan.choice_row)
    assert_good(y, gather_sum(rows, None, plan.choice_row), exact)


@of_dtype
@of_shape_and_math
def test_combine_backward(kernels, shape, dtype, wide):
    plan, math = inputs.make_plan(shape), torch.float64 if wide else math_dtype(dtype)
    rows, grad = make_rows(shape, dtype), inputs.normal(shape.T, shape.D, seed=5, dtype=dtype)
    weight = inputs.make_gate_weight(shape, dtype=math)
    poisoned = inputs.poisoned(rows, inputs.unused_rows(plan))
    ours = kernels.combine_backward(grad, poisoned, weight, plan.choice_row, plan.row_choice)
    plain = combine_backward(grad, rows, weight, plan.choice_row, plan.row_choice, True, True)
    exact = combine_backward(
        grad.double(), rows.double(), weight.double(), plan.choice_row, plan.row_choice, True, True
    )
    for name, *results in zip(("grad_rows", "grad_weight"), ours, plain, exact, strict=True):
        assert_good(*results, name)
        alone = kernels.combine_backward(grad, poisoned, weight, plan.choice_row, plan.row_choice, outputs=[name])
        assert_same_bits(*(out for out in alone if out is not None), results[0], f"{name} alone")
    assert not ours[0][inputs.unused_rows(plan)].any()
    assert not ours[1][inputs.dropped_choices(plan)].any()


@with_or_without
@pytest.mark.parametrize("name", [None, *ACTIVATIONS])
@of_dtype
@of_size
def test_activation(kernels, size, dtype, name, given):
    rows, width = size[0], size[1] * (2 if name in GATED else 1)
    z = 3 * inputs.normal(rows, width, seed=1, dtype=dtype)
    bias = inputs.normal(width, seed=2, dtype=dtype) if given else None
    biased, out = kernels.activation(z, name, bias=bias)
    assert_same_bits(biased, z + bias if given else z, "z + bias")
    if name is None:
        assert out is None
        return
    assert_good(out, activate(biased, name), activate(biased.double(), name))
    if name not in GATED:
        for array in kernels.activation(z, name, bias=bias, in_place=True):
            assert_same_bits(array, out, "in place")


@with_or_without
@pytest.mark.parametrize("name", ACTIVATIONS)
@of_dtype
@of_size
def test_activation_backward(kernels, size, dtype, name, given):
    math = math_dtype(dtype)

    def draw(seed):
        z = 3 * inputs.normal(size[0], size[1] * (2 if name in GATED else 1), seed=seed, dtype=dtype)
        row_weight = inputs.normal(size[0], seed=seed + 2, dtype=math) if given else None
        return z, inputs.normal(*size, seed=seed + 1, dtype=dtype), row_weight

    def expected(drawn, dtype):
        z, grad, row_weight = (None if t is None else t.to(dtype) for t in drawn)
        w = torch.ones(size[0], 1, dtype=dtype) if row_weight is None else row_weight[:, None]
        grad_z, h = activate_backward(w * grad, z, name), activate(z, name)
        return grad_z, w * h, (grad * h).sum(dim=1), chunk_sums(grad_z)

    names, dtypes = ("grad_z", "scaled", "dot", "column_sums"), (dtype, dtype, math, math)
    z, grad, row_weight = draw(0)
    ours = kernels.activation_backward(z, grad, name, row_weight=row_weight)
    # A few elements say little about how far off plain torch is, so that is its worst of four draws.
    draws = [(expected(draw(seed), math), expected(draw(seed), torch.float64)) for seed in range(4)]
    for i, (what, dtype_of_out) in enumerate(zip(names, dtypes, strict=True)):
        exact = draws[0][1][i]
        if dtype == torch.float64:
            assert_float64(ours[i], exact, what)
        else:
            error = max(largest_error(plain[i].to(dtype_of_out), wide[i]) for plain, wide in draws)
            assert_as_good_as(ours[i], error, exact, what)
    for i, what in enumerate(names):  # each alone gives the same bits; column sums come with grad_z
        wanted = ["grad_z", what] if what == "column_sums" else [what]
        alone = kernels.activation_backward(z, grad, name, row_weight=row_weight, outputs=wanted)
        assert_same_bits(alone[i], ours[i], f"{what} alone")
        assert [out is not None for out in alone] == [other in wanted for other in names]
    if name not in GATED:
        assert_same_bits(
            kernels.activation_backward(z, grad, name, row_weight=row_weight, in_place=True)[0], ours[0], "in place"
        )
    grad_z, scaled, dot, _ = kernels.activation_backward(z, None, name, row_weight=row_weight)
    assert_same_bits(scaled, ours[1], "scaled, no grad")
    assert not grad_z.any()
    assert not dot.any()


@with_or_without
@of_dtype
@of_size
def test_column_sums(kernels, size, dtype, given):
    math = math_dtype(dtype)
    rows = inputs.normal(*size, seed=1, dtype=dtype)
    row_weight = inputs.normal(size[0], seed=2, dtype=math) if given else None

    def weighted(dtype):
        return rows.to(dtype) if row_weight is None else row_weight.to(dtype)[:, None] * rows.to(dtype)

    sums = kernels.column_sum(rows, row_weight=row_weight)
    assert_good(sums, chunk_sums(weighted(math)), chunk_sums(weighted(torch.float64)), "column_sums")

    initial = inputs.normal(size[1], seed=3, dtype=dtype)
    plain, exact = sums.sum(dim=0), sums.double().sum(dim=0)
    assert_good(kernels.reduce_chunks(sums, initial), plain.to(dtype), exact, "sum")
    added = kernels.reduce_chunks(sums, initial, accumulate=True)
    assert_good(added, (initial.to(math) + plain).to(dtype), initial.double() + exact, "sum on top")
    if dtype == torch.float64:  # sums in float64 into a buffer in float32
        added = kernels.reduce_chunks(sums, initial.float(), accumulate=True)
        assert_same_bits(added, (initial.float().double() + exact).float(), "float64 into float32")


@with_or_without
@of_dtype
@of_shape
def test_weight_gradient(kernels, shape, dtype, given):
    math, plan = math_dtype(dtype), inputs.make_plan(shape)
    grad, dot = make_rows(shape, dtype), inputs.normal(plan.num_rows, seed=2, dtype=math)
    bias = inputs.normal(shape.D, seed=3, dtype=dtype) if given else None

    def expected(dtype):
        value = dot.to(dtype) if bias is None else dot.to(dtype) + grad.to(dtype) @ bias.to(dtype)
        used = plan.row_choice >= 0
        return torch.zeros(shape.T * shape.K, dtype=dtype).index_put((plan.row_choice[used].long(),), value[used])

    out = kernels.weight_gradient(dot, grad, plan.row_choice, shape.T * shape.K, bias=bias)
    assert_good(out, expected(math), expected(torch.float64))


@of_dtype
@pytest.mark.parametrize("size", [0, 1, 15, 16, 1000])
def test_accumulate(kernels, size, dtype):
    values, total = inputs.normal(size, seed=1, dtype=dtype), inputs.normal(size, seed=2)
    assert_same_bits(kernels.accumulate(values, total), total + values.float())
