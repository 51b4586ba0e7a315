"""Bad arguments: a ValueError or TypeError that names the op, the argument, what was expected and what came."""

import pytest
import torch
from torch.utils import _pytree as pytree

import widenet_kernels as wk

F32, F64, I32 = torch.float32, torch.float64, torch.int32
INDEX = torch.tensor([[0, 1], [1, 2], [3, 0]], dtype=I32)
PLAN = wk.plan_routing(INDEX, 4, 2, backend="reference")  # T 3, K 2, E 4, R 8
HUGE = 2**31


def good(op):
    z = torch.zeros
    return {
        "topk_gate": {"logits": z(3, 4), "k": 2},
        "plan_routing": {"expert_index": INDEX, "num_experts": 4, "capacity": 2},
        "route": {"x": z(3, 5), "router_weight": z(4, 5), "k": 2, "capacity": 2},
        "permute": {"x": z(3, 5), "plan": PLAN},
        "grouped_gemm": {"rows": z(8, 5), "weight": z(4, 5, 6), "plan": PLAN, "bias": z(4, 6), "activation": "gelu"},
        "combine": {"rows": z(8, 5), "weight": z(3, 2), "plan": PLAN},
        "moe_ffn": {
            **{"x": z(3, 5), "weight": z(3, 2), "plan": PLAN},
            **{"w1": z(4, 5, 6), "b1": z(4, 6), "w2": z(4, 6, 5), "b2": z(4, 5)},
        },
        "load_balance_loss": {"probs": z(3, 4), "plan": PLAN},
        "router_z_loss": {"logits": z(3, 4)},
    }[op]


def buffers(**changed):
    shapes = {"w1": (4, 5, 6), "b1": (4, 6), "w2": (4, 6, 5), "b2": (4, 5)}
    return {"grad_buffers": wk.GradBuffers(**({n: torch.zeros(s) for n, s in shapes.items()} | changed))}


V, T = ValueError, TypeError
zeros = torch.zeros
# op, what is wrong, the error, the argument it names, what it expects, what it says it got
BAD = [
    ("topk_gate", {"logits": zeros(3)}, V, "logits", r"\[T, E\]", r"\[3\]"),
    ("topk_gate", {"logits": [[1.0, 2.0]]}, T, "logits", r"a tensor \[T, E\]", "list"),
    ("topk_gate", {"logits": zeros(3, 4, dtype=I32)}, T, "logits", "fp32, bf16, fp16 or fp64", "torch.int32"),
    ("topk_gate", {"k": 0}, V, "k", "1 to 4", "0"),
    ("topk_gate", {"k": 5}, V, "k", "1 to 4", "5"),
    ("topk_gate", {"k": 2.0}, T, "k", "an int", r"2\.0"),
    ("topk_gate", {"k": True}, T, "k", "an int", "True"),
    ("topk_gate", {"noise": zeros(3, 5)}, V, "noise", r"\[T, E\] = \[3, 4\]", r"\[3, 5\]"),
    ("topk_gate", {"noise": zeros(3, 4, dtype=I32)}, T, "noise", "fp32", "torch.int32"),
    ("topk_gate", {"noise": zeros(3, 4, device="meta")}, V, "noise", "on cpu as logits", "meta"),
    ("plan_routing", {"expert_index": zeros(3, dtype=I32)}, V, "expert_index", r"\[T, K\]", r"\[3\]"),
    ("plan_routing", {"expert_index": zeros(3, 2)}, T, "expert_index", "an integer dtype", "torch.float32"),
    ("plan_routing", {"expert_index": zeros(3, 2, dtype=torch.bool)}, T, "expert_index", "an integer", "torch.bool"),
    ("plan_routing", {"expert_index": zeros(3, 0, dtype=I32)}, V, "expert_index", "at least one choice", r"\[3, 0\]"),
    ("plan_routing", {"num_experts": 0}, V, "num_experts", "at least 1", "0"),
    ("plan_routing", {"num_experts": 2**31, "capacity": 0}, V, "num_experts", r"below 2\*\*31", str(2**31)),
    ("topk_gate", {"normalize": "yes"}, T, "normalize", "True or False", "'yes'"),
    ("route", {"normalize": None}, T, "normalize", "True or False", "None"),
    ("moe_ffn", {"grad_buffers": (None, None)}, T, "grad_buffers", "a GradBuffers", "tuple"),
    ("plan_routing", {"num_experts": 4.0}, T, "num_experts", "an int", r"4\.0"),
    ("plan_routing", {"capacity": -1}, V, "capacity", "at least 0, or None", "-1"),
    ("plan_routing", {"capacity": 1.5}, T, "capacity", "an int, or None", r"1\.5"),
    ("plan_routing", {"capacity": 2**29}, V, "capacity", r"below 2\*\*31", str(2**29)),
    ("plan_routing", {"priority": "luck"}, V, "priority", "'choice', 'token' or 'score'", "'luck'"),
    ("plan_routing", {"priority": "score"}, V, "weight", "which priority 'score' ranks by", "None"),
    ("plan_routing", {"priority": "score", "weight": zeros(3, 3)}, V, "weight", r"\[T, K\] = \[3, 2\]", r"\[3, 3\]"),
    ("plan_routing", {"priority": "score", "weight": INDEX}, T, "weight", "fp32", "torch.int32"),
    ("plan_routing", {"expert_index": INDEX[:1, :1].expand(HUGE, 1)}, V, "expert_index", r"2\*\*31", "2147483648"),
    ("route", {"x": zeros(3)}, V, "x", r"\[T, D\]", r"\[3\]"),
    ("route", {"x": zeros(3, 5, dtype=I32)}, T, "x", "fp32", "torch.int32"),
    ("route", {"router_weight": zeros(4, 6)}, V, "router_weight", r"\[E, D\] = \[any, 5\]", r"\[4, 6\]"),
    ("route", {"router_weight": zeros(4, 5, dtype=I32)}, T, "router_weight", "fp32", "torch.int32"),
    ("route", {"router_weight": zeros(4, 5, device="meta")}, V, "router_weight", "on cpu as x", "meta"),
    ("route", {"k": 5}, V, "k", "1 to 4", "5"),
    ("route", {"capacity": -2}, V, "capacity", "at least 0", "-2"),
    ("route", {"capacity": 2**29}, V, "capacity", r"below 2\*\*31", str(2**29)),
    ("route", {"x": zeros(1, 5).expand(2**30, 5)}, V, "x", r"T \* K", "2147483648"),
    ("route", {"noise": zeros(3, 3)}, V, "noise", r"\[T, E\] = \[3, 4\]", r"\[3, 3\]"),
    ("route", {"priority": "luck"}, V, "priority", "'choice'", "'luck'"),
    ("route", {"mask": zeros(3)}, T, "mask", "torch.bool", "torch.float32"),
    ("route", {"mask": zeros(4, dtype=torch.bool)}, V, "mask", r"\[T\] = \[3\]", r"\[4\]"),
    ("permute", {"x": zeros(3)}, V, "x", r"\[T, D\]", r"\[3\]"),
    ("permute", {"x": zeros(9, 5)}, V, "x", r"the plan's T = \[3, any\]", r"\[9, 5\]"),
    ("permute", {"x": zeros(3, 5, dtype=I32)}, T, "x", "fp32", "torch.int32"),
    ("permute", {"plan": tuple(PLAN)}, T, "plan", "a RoutingPlan", "tuple"),
    ("permute", {"x": zeros(3, 5, device="meta")}, V, r"plan\.choice_row", "on meta as x", "cpu"),
    ("grouped_gemm", {"rows": zeros(8)}, V, "rows", r"\[R, M\]", r"\[8\]"),
    ("grouped_gemm", {"rows": zeros(9, 5)}, V, "rows", r"the plan's R = \[8, any\]", r"\[9, 5\]"),
    ("grouped_gemm", {"rows": zeros(8, 5, dtype=I32)}, T, "rows", "fp32", "torch.int32"),
    ("grouped_gemm", {"weight": zeros(4, 4, 6)}, V, "weight", r"\[E, M, N\] = \[4, 5, any\]", r"\[4, 4, 6\]"),
    ("grouped_gemm", {"weight": zeros(3, 5, 6)}, V, "weight", r"\[4, 5, any\]", r"\[3, 5, 6\]"),
    ("grouped_gemm", {"weight": zeros(4, 5, 6, dtype=F64)}, T, "weight", "torch.float32 as rows", "torch.float64"),
    ("grouped_gemm", {"bias": zeros(4, 5)}, V, "bias", r"\[E, N\] = \[4, 6\]", r"\[4, 5\]"),
    ("grouped_gemm", {"bias": zeros(4, 6).bfloat16()}, T, "bias", "torch.float32 as rows", "torch.bfloat16"),
    ("grouped_gemm", {"activation": "tanhish"}, V, "activation", "None or one of gelu,.*geglu", "'tanhish'"),
    ("grouped_gemm", {"weight": zeros(4, 5, 7), "bias": None, "activation": "swiglu"}, V, "weight", "an even", "7"),
    ("grouped_gemm", {"plan": None}, T, "plan", "a RoutingPlan", "NoneType"),
    ("combine", {"rows": zeros(8)}, V, "rows", r"\[R, D\]", r"\[8\]"),
    ("combine", {"rows": zeros(7, 5)}, V, "rows", r"the plan's R = \[8, any\]", r"\[7, 5\]"),
    ("combine", {"rows": zeros(8, 5, dtype=I32)}, T, "rows", "fp32", "torch.int32"),
    ("combine", {"weight": zeros(3, 3)}, V, "weight", r"the plan's T and K = \[3, 2\]", r"\[3, 3\]"),
    ("combine", {"weight": INDEX}, T, "weight", "fp32", "torch.int32"),
    ("combine", {"weight": zeros(3, 2, device="meta")}, V, "weight", "on cpu as rows", "meta"),
    ("combine", {"plan": 3}, T, "plan", "a RoutingPlan", "int"),
    ("combine", {"plan": PLAN._replace(row_choice=PLAN.row_choice[:3])}, V, r"plan\.row_choice", r"\[8\]", r"\[3\]"),
    ("permute", {"plan": PLAN._replace(choice_row=PLAN.choice_row[:, :1])}, V, r"plan\.choice_row", "2", r"\[3, 1\]"),
    ("moe_ffn", {"plan": PLAN._replace(expert_count=PLAN.expert_count[:1])}, V, r"plan\.expert_count", r"\[4\]", "1"),
    (
        "moe_ffn",
        {"plan": PLAN._replace(expert_begin=PLAN.expert_begin.to(torch.int16))},
        T,
        r"plan\.expert_begin",
        "int32",
        "int16",
    ),
    ("moe_ffn", {"x": zeros(4, 5)}, V, "x", r"the plan's T = \[3, any\]", r"\[4, 5\]"),
    ("moe_ffn", {"x": zeros(3, 5, dtype=I32)}, T, "x", "fp32", "torch.int32"),
    ("moe_ffn", {"weight": zeros(3, 3)}, V, "weight", r"\[3, 2\]", r"\[3, 3\]"),
    ("moe_ffn", {"weight": INDEX}, T, "weight", "fp32", "torch.int32"),
    ("moe_ffn", {"w1": zeros(4, 4, 6)}, V, "w1", r"\[4, 5, any\]", r"\[4, 4, 6\]"),
    ("moe_ffn", {"w1": None}, T, "w1", "a tensor", "NoneType"),
    ("moe_ffn", {"w1": zeros(4, 5, 6, dtype=F64)}, T, "w1", "torch.float32 as x", "torch.float64"),
    ("moe_ffn", {"b1": zeros(4, 5)}, V, "b1", r"\[4, 6\]", r"\[4, 5\]"),
    ("moe_ffn", {"b1": zeros(4, 6).half()}, T, "b1", "torch.float32 as x", "torch.float16"),
    ("moe_ffn", {"w2": zeros(4, 5, 6)}, V, "w2", r"\[E, F, D\] = \[4, 6, 5\]", r"\[4, 5, 6\]"),
    ("moe_ffn", {"activation": "swiglu"}, V, "w2", r"\[4, 3, 5\]", r"\[4, 6, 5\]"),
    ("moe_ffn", {"b2": zeros(4, 6)}, V, "b2", r"\[E, D\] = \[4, 5\]", r"\[4, 6\]"),
    ("moe_ffn", {"b2": zeros(4, 5, dtype=F64)}, T, "b2", "torch.float32 as x", "torch.float64"),
    ("moe_ffn", {"activation": None}, V, "activation", "an activation between", "None"),
    ("moe_ffn", {"activation": "tanhish"}, V, "activation", "one of gelu", "'tanhish'"),
    ("moe_ffn", buffers(w1=zeros(4, 5, 7)), V, r"grad_buffers\.w1", r"\[4, 5, 6\]", r"\[4, 5, 7\]"),
    ("moe_ffn", buffers(b2=zeros(4, 5, dtype=F64)), T, r"grad_buffers\.b2", "torch.float32", "torch.float64"),
    ("moe_ffn", {"b1": None} | buffers(), V, r"grad_buffers\.b1", "None, as b1 is None", r"\[4, 6\]"),
    ("moe_ffn", buffers(w2=zeros(4, 6, 5, device="meta")), V, r"grad_buffers\.w2", "on cpu as w2", "meta"),
    ("load_balance_loss", {"probs": zeros(4)}, V, "probs", r"\[T, E\]", r"\[4\]"),
    ("load_balance_loss", {"probs": zeros(3, 5)}, V, "probs", r"the plan's T and E = \[3, 4\]", r"\[3, 5\]"),
    ("load_balance_loss", {"probs": zeros(3, 4, dtype=I32)}, T, "probs", "fp32", "torch.int32"),
    ("load_balance_loss", {"plan": None}, T, "plan", "a RoutingPlan", "NoneType"),
    ("load_balance_loss", {"mask": zeros(3)}, T, "mask", "torch.bool", "torch.float32"),
    ("load_balance_loss", {"mask": zeros(2, dtype=torch.bool)}, V, "mask", r"\[3\]", r"\[2\]"),
    ("router_z_loss", {"logits": zeros(4)}, V, "logits", r"\[T, E\]", r"\[4\]"),
    ("router_z_loss", {"logits": zeros(3, 4, dtype=I32)}, T, "logits", "fp32", "torch.int32"),
    ("router_z_loss", {"mask": zeros(3)}, T, "mask", "torch.bool", "torch.float32"),
]


def describe(case):
    op, wrong, *_ = case
    said = {
        n: f"{str(v.dtype)[6:]}{list(v.shape)}" if isinstance(v, torch.Tensor) else str(v)[:12]
        for n, v in wrong.items()
    }
    return f"{op}-{'-'.join(f'{n}={v}' for n, v in said.items())}".replace(" ", "")


@pytest.mark.parametrize(("op", "wrong", "error", "argument", "expected", "got"), BAD, ids=map(describe, BAD))
def test_message(op, wrong, error, argument, expected, got):
    with pytest.raises(error, match=rf"^{op}: {argument}: expected .*{expected}.*, got .*{got}"):
        getattr(wk, op)(**{**good(op), **wrong})


@pytest.mark.parametrize("op", sorted({op for op, *_ in BAD}))
def test_the_good_arguments_are_good(op):
    result = getattr(wk, op)(**good(op))
    tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    assert all(t.isfinite().all() for t in tensors)
    assert tensors or isinstance(result, int | tuple)


def test_a_plan_of_other_sizes_is_told_apart():
    other = wk.plan_routing(INDEX, 5, 2)
    with pytest.raises(ValueError, match=r"^moe_ffn: w1: expected .*\[5, 5, any\], got .*\[4, 5, 6\]"):
        wk.moe_ffn(**{**good("moe_ffn"), "plan": other})
