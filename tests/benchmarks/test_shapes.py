"""Shapes and suites by name, the routing that a shape asks for, and what is counted, against literal counts."""

import pytest
import torch

from widenet_kernels.benchmarks import counts, gemms, layer, shapes
from widenet_kernels.benchmarks.shapes import Case, Inputs
from widenet_kernels.models import WideNetConfig


def test_suites_name_shapes():
    for name, members in shapes.SUITES.items():
        assert name not in shapes.CASES
        assert [case.name for case in shapes.chosen([name])] == list(members)


def test_shapes_are_found_by_their_names():
    assert all(shapes.find(name).name == name for name in shapes.CASES)
    with pytest.raises(ValueError, match=r"expected one of widenet-b-8, .*, got 'widenet-x'"):
        shapes.find("widenet-x")


def test_a_shape_is_measured_once():
    assert [case.name for case in shapes.chosen(["small", "default", "small"])].count("small") == 1


def test_the_first_choices_follow_zipf():
    inputs = Inputs(Case("skewed", 20_000, 16, 8, 4, 1, None, routing="zipf"), "cpu", torch.float32)
    share = torch.tensor(inputs.demand) / 20_000
    zipf = 1 / torch.arange(1, 5)
    torch.testing.assert_close(share, zipf / zipf.sum(), rtol=0, atol=0.02)


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_rounding_changes_no_choice(routing):
    inputs = Inputs(Case("rounded", 500, 64, 8, 16, 4, None, routing=routing), "cpu", torch.bfloat16)
    in_bf16 = (inputs.x @ inputs.router.t()).topk(4).indices
    assert torch.equal(in_bf16.int(), inputs.gate.expert_index)


def test_inputs_are_the_same_every_time():
    first, second = (Inputs(shapes.find("decode-8"), "cpu", torch.float32) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.experts["w2"], second.experts["w2"])


def test_flops_of_a_layer():
    case = Case("counted", 5, 3, 4, 2, 2, None, "swiglu")
    multiplications = sum(1 for _ in range(7) for _ in range(3) for _ in range(8))  # rows, D, two halves of F
    multiplications += sum(1 for _ in range(7) for _ in range(4) for _ in range(3))
    assert counts.layer_flops(case, served=7) == 2 * multiplications


@pytest.mark.parametrize("bias", [True, False])
def test_bytes_of_a_layer(bias):
    inputs = Inputs(Case("counted", 40, 16, 24, 4, 2, bias=bias), "cpu", torch.float32)
    tensors = [inputs.x, inputs.grad, inputs.router, *(t for t in inputs.experts.values() if t is not None)]
    assert counts.layer_bytes(inputs.case, 4, 4) == sum(4 * t.numel() for t in tensors)  # y is as large as its gradient


@pytest.mark.parametrize("bias", [True, False])
def test_experts_that_serve_nobody_are_not_read_but_have_gradients(bias):
    inputs = Inputs(Case("one token", 1, 16, 24, 4, 2, bias=bias), "cpu", torch.float32)
    case, serving = inputs.case, [expert for expert, count in enumerate(inputs.counts) if count]
    assert len(serving) == inputs.serving == 2
    read = sum(4 * t[serving].numel() for t in inputs.experts.values() if t is not None)
    written = sum(4 * t.numel() for t in inputs.experts.values() if t is not None)
    around = 4 * (inputs.x.numel() + inputs.grad.numel() + inputs.router.numel())
    forward, both = (contest.nbytes for contest in map(layer_row(inputs), layer.DIRECTIONS))
    assert forward == around + read
    assert both == forward + around + written
    first = gemms.first_layer(inputs).passes
    parameters = case.width * (case.D + bool(bias))
    rows = inputs.served
    assert first["forward"].nbytes == 4 * (rows * (case.D + case.F) + 2 * parameters)
    assert first["backward"].nbytes == 4 * (rows * (2 * case.D + case.F + case.width) + (2 + 4) * parameters)
    gemm = gemms.Gemm(inputs, "w2")
    moved = {wanted: gemm.nbytes(wanted) / 4 - rows * (case.F + case.D) for wanted in ((), ("rows",), ("weight",))}
    assert moved == {(): 2 * 24 * 16, ("rows",): 2 * 24 * 16, ("weight",): 4 * 24 * 16}


def layer_row(inputs):
    return lambda direction: layer.Contest(inputs).contenders(direction)[0]


def test_bytes_of_the_stages():
    inputs = Inputs(Case("counted", 40, 16, 24, 4, 2, 0.5), "cpu", torch.float32)
    case, plan, gate = inputs.case, inputs.plan, inputs.gate

    def nbytes(*tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    of_gate, of_plan = nbytes(gate.weight, gate.expert_index), nbytes(plan.choice_row, plan.row_choice)
    routing = counts.routing_bytes(case, plan.num_rows, 4)
    assert routing["topk_gate"] == nbytes(inputs.logits, gate.probs) + of_gate
    assert routing["plan_routing"] == nbytes(gate.expert_index) + of_plan
    assert routing["route"] == nbytes(inputs.x, inputs.router, inputs.logits, gate.probs) + of_gate + of_plan
    movement = counts.movement_bytes(case, plan.num_rows, inputs.served, 4)
    rows = torch.empty(plan.num_rows, case.D)
    assert movement["permute"] == nbytes(inputs.x, rows, plan.row_choice)
    assert movement["combine"] == nbytes(rows[: inputs.served], inputs.x, gate.weight, plan.choice_row)


def test_flops_of_a_training_step():
    config = WideNetConfig(
        image_size=8, patch_size=4, hidden_size=8, ffn_size=12, num_layers=2, num_heads=2, num_experts=4
    )
    tokens, length = 3 * 5, 5  # three images of four patches and a first position
    block = 4 * tokens * 8 * 8 + 2 * tokens * length * 8 + tokens * 8 * 4 + 2 * (2 * tokens * 8 * 12)
    patches = 3 * 4 * (3 * 4 * 4) * 8
    assert counts.model_flops(config, 3) == 3 * 2 * (patches + 2 * block)
