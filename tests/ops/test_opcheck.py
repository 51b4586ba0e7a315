"""torch.library.opcheck, all its tests, of every op that the package defines, in every namespace."""

import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.ops.registry import NAMESPACES
from widenet_kernels.testing import inputs


def samples(shape, device, dtype, activation):
    """For every op the arguments of one call; the differentiable ones require gradients where the op has a formula."""
    plan = inputs.make_plan(shape, device=device)
    x = inputs.make_x(shape, dtype=dtype, device=device)
    weight = inputs.make_gate_weight(shape, device=device)
    w1, b1, w2, b2 = inputs.make_experts(shape, activation, dtype=dtype, device=device)
    rows = inputs.normal(plan.num_rows, shape.D, seed=6, dtype=dtype, device=device)
    z = inputs.normal(plan.num_rows, w1.shape[2], seed=7, dtype=dtype, device=device)
    grad_hidden = inputs.normal(plan.num_rows, w2.shape[1], seed=8, dtype=dtype, device=device)
    grad_rows = inputs.normal(plan.num_rows, shape.D, seed=8, dtype=dtype, device=device)
    grad_y = inputs.normal(shape.T, shape.D, seed=9, dtype=dtype, device=device)
    logits = inputs.make_logits(shape, dtype=dtype, device=device)
    noise = inputs.normal(shape.T, shape.E, seed=10, device=device)
    router_weight = inputs.normal(shape.E, shape.D, seed=11, dtype=dtype, device=device)
    mask = inputs.make_mask(shape.T, device=device)
    gate = wk.topk_gate(logits, shape.K, normalize=True, backend="reference")
    index = inputs.make_expert_index(shape, device=device)
    maps, places = (plan.choice_row, plan.row_choice), (plan.expert_begin, plan.expert_count)
    buffers = [torch.zeros(t.shape, device=device) for t in (w1, b1, w2, b2)]
    saved = (grad_y, x, weight, *maps, *places, z, w1, w2, b2, activation)

    def leaf(*tensors):
        return [t.clone().requires_grad_() for t in tensors]

    return {
        "topk_gate": [*leaf(logits), shape.K, noise, True],
        "topk_gate_backward": [gate.weight, None, *gate, True],
        "plan_routing": [index, shape.E, shape.C, "score", weight[:, 0]],
        "route": [*leaf(x, router_weight), shape.K, shape.C, noise, True, "choice", mask],
        "route_backward": [gate.weight, gate.probs, None, x, router_weight, *gate, True, True, False],
        "permute": [*leaf(x), *maps],
        "permute_backward": [grad_rows, plan.choice_row],
        "grouped_gemm": [*leaf(rows, w1, b1), *places, activation, True],
        "grouped_gemm_backward": [grad_hidden, rows, w1, z, *places, activation, True, True, False],
        "combine": [*leaf(rows, weight), *maps],
        "combine_backward": [grad_y, rows, weight, *maps, True, True],
        "moe_ffn": [*leaf(x, weight), *maps, *places, *leaf(w1, b1, w2, b2), activation, True],
        "moe_ffn_backward": [*saved, True, True, True, False, True, True],
        "moe_ffn_backward_accumulate": [*saved, True, True, *buffers],
    }


OPS = tuple(samples(inputs.ORDINARY, "cpu", torch.float32, "gelu"))


def defined_ops(namespace):
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return {name.partition(".")[0] for space, _, name in names if space == namespace}


@pytest.mark.parametrize("namespace", NAMESPACES.values())
def test_every_op_has_a_sample(namespace):
    assert defined_ops(namespace) == set(OPS)


# Full buffers, with drops: unused rows of the pre-activation, a private output, may stay unwritten.
FULL = inputs.Shape(9, 8, 12, 3, 3, 5, "even", "every token asks every expert")


def check(op, backend, device, shape, dtype, activation, **options):
    torch.use_deterministic_algorithms(False)
    arguments = samples(shape, device, dtype, activation)[op]
    torch.library.opcheck(getattr(getattr(torch.ops, NAMESPACES[backend]), op).default, arguments, **options)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, device, backend):
    check(op, backend, device, FULL if op in ("grouped_gemm", "moe_ffn") else inputs.ORDINARY, torch.float32, "gelu")


@pytest.mark.parametrize("op", OPS)
def test_opcheck_of_packed_rows_in_bf16(op, device, backend):
    check(op, backend, device, inputs.DROPLESS, torch.bfloat16, "swiglu")


@pytest.mark.parametrize("shape", [inputs.NO_TOKENS, inputs.NO_TOKENS_PACKED, inputs.NO_ROWS], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_shapes_and_dtypes_without_tokens_or_rows(op, shape, device, backend):
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    check(op, backend, device, shape, torch.float64, "relu", test_utils=utils)
