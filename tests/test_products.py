"""The products that the CPU ops leave to torch, counted between them: none for a gradient that nobody asked for, and
those alone that are not faster by our own GEMM.

In float64 every product is torch's, whatever the CPU. A library that is loaded before torch counts the calls.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

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


# One expert's product, forward, of weights whose rows lie in one piece ("kn") or whose columns do ("nk").
WHOSE = """
import ctypes, itertools, json, sys
import torch
import widenet_kernels as wk

made, counts = ctypes.CDLL(sys.argv[1]).widenet_products, []
for dtype, lies, num_rows in itertools.product(("float32", "bfloat16", "float64"), ("kn", "nk"), (8, 100)):
    of = {"dtype": getattr(torch, dtype)}
    weight = torch.ones(1, 64, 48, **of) if lies == "kn" else torch.ones(1, 48, 64, **of).mT
    plan = wk.plan_routing(torch.zeros(num_rows, 1, dtype=torch.int64), num_experts=1, capacity=None)
    before = made()
    wk.grouped_gemm(torch.ones(num_rows, 64, **of), weight, plan, backend="native")
    counts.append([dtype, lies, num_rows, made() - before])
print(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Runs a script with the counter loaded, and reads what it prints."""
    library = tmp_path_factory.mktemp("counter") / "product_counter.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-std=c++17", SOURCE, "-o", library, "-ldl"], check=True)

    def run(script):
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        done = subprocess.run([sys.executable, "-c", script, library], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def is_torchs(cpu: set[str], dtype: str, lies: str, num_rows: int) -> bool:
    """By what /proc/cpuinfo says of a CPU."""
    if dtype == "float64" or "avx2" not in cpu:
        return True
    intel, few_along_k = "GenuineIntel" in cpu, lies == "nk" and num_rows == 8
    if dtype == "float32":
        return intel and not few_along_k
    if intel:
        return "amx_bf16" in cpu
    if "avx512_bf16" in cpu:
        return lies == "nk" and not few_along_k
    return "avx512bw" in cpu  # of such torch says that it is fast


def test_whose_products(counted):
    cpu = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    counts = counted(WHOSE)
    assert len(counts) == 12
    for dtype, lies, num_rows, torchs in counts:
        assert torchs == is_torchs(cpu, dtype, lies, num_rows), (dtype, lies, num_rows)


def test_no_product_for_what_nobody_asked(counted):
    serving, counts = counted(COUNT)
    assert serving == 3  # of four experts: the products of one without rows are not made
    assert len(counts) == 8 + 8 + 64 + 1
    for op, wanted, forward, backward in counts:
        assert forward == serving * (2 if op == "moe_ffn" else 1), (op, wanted)
        assert backward == serving * backward_products(op, set(wanted)), (op, wanted)
