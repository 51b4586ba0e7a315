"""The products that the CPU ops make, counted between them and torch: none for a gradient that nobody asked for.

In float64 every product is torch's, whatever the CPU. A library that is loaded before torch counts the calls.
"""

import json
import os
import pathlib
import subprocess
import sys

SOURCE = pathlib.Path(__file__).parents[1] / "csrc" / "testing" / "product_counter.cpp"

COUNT = """
import ctypes, itertools, json, sys
import torch
import widenet_kernels as wk
from widenet_kernels.testing import inputs

made = ctypes.CDLL(sys.argv[1]).widenet_products
shape = inputs.ORDINARY
plan = inputs.make_plan(shape)
double = {"dtype": torch.float64}
experts = inputs.make_experts(shape, **double)
rows = inputs.normal(plan.num_rows, shape.D, seed=6, **double)

def gemm(activation):
    return lambda rows, w1, b1: wk.grouped_gemm(rows, w1, plan, b1, activation, backend="native")

def moe(x, weight, *experts, **options):
    return wk.moe_ffn(x, weight, plan, *experts, backend="native", **options)

def buffered(x, weight, *experts):
    return moe(x, weight, *experts, grad_buffers=wk.GradBuffers(*(torch.zeros(t.shape) for t in experts)))

tokens = inputs.make_x(shape, **double), inputs.make_gate_weight(shape, **double)
cases = {
    "grouped_gemm": (gemm(None), {"rows": rows, "w1": experts[0], "b1": experts[1]}),
    "grouped_gemm, gelu": (gemm("gelu"), {"rows": rows, "w1": experts[0], "b1": experts[1]}),
    "moe_ffn": (moe, dict(zip(("x", "weight", "w1", "b1", "w2", "b2"), (*tokens, *experts)))),
}
counts = []
for op, (function, tensors) in cases.items():
    for number in range(len(tensors) + 1):
        for wanted in itertools.combinations(tensors, number):
            leaves = [t.detach().requires_grad_(name in wanted) for name, t in tensors.items()]
            before = made()
            out = function(*leaves)
            forward = made() - before
            if wanted:
                out.sum().backward()
            counts.append([op, wanted, forward, made() - before - forward])
before = made()
out = buffered(*(t.detach().requires_grad_() for t in (*tokens, *experts)))
forward = made() - before
out.sum().backward()
counts.append(["moe_ffn", ["x", "weight", "w1", "b1", "w2", "b2"], forward, made() - before - forward])
print(json.dumps([int((plan.expert_count > 0).sum()), counts]))
"""


def backward_products(op: str, wanted: set[str]) -> int:
    """Of one expert, where only the gradients of these inputs are asked for."""
    if op.startswith("grouped_gemm"):
        return len(wanted & {"rows", "w1"})
    through_the_second_layer = bool(wanted & {"x", "weight", "w1", "b1"})
    return through_the_second_layer + len(wanted & {"x", "w1", "w2"})


def test_no_product_for_what_nobody_asked(tmp_path):
    library = tmp_path / "product_counter.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-std=c++17", SOURCE, "-o", library, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run([sys.executable, "-c", COUNT, library], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    serving, counts = json.loads(done.stdout)
    assert serving == 3  # of four experts: the products of one without rows are not made
    assert len(counts) == 8 + 8 + 64 + 1
    for op, wanted, forward, backward in counts:
        assert forward == serving * (2 if op == "moe_ffn" else 1), (op, wanted)
        assert backward == serving * backward_products(op, set(wanted)), (op, wanted)
