"""Backends: which there are, which one serves, and what happens with no library or a broken one."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.ops import registry
from widenet_kernels.testing import inputs

PUBLIC_OPS = ("topk_gate", "plan_routing", "route", "permute", "grouped_gemm", "combine", "moe_ffn")


def call(op, device="cpu", backend=None, dtype=torch.float32):
    shape = inputs.ORDINARY
    plan = inputs.make_plan(shape, device=device)
    x = inputs.make_x(shape, dtype=dtype, device=device)
    weight = inputs.make_gate_weight(shape, device=device)
    w1, b1, w2, b2 = inputs.make_experts(shape, dtype=dtype, device=device)
    on = {"backend": backend}
    return {
        "topk_gate": lambda: wk.topk_gate(x, 2, **on),
        "plan_routing": lambda: wk.plan_routing(inputs.make_expert_index(shape, device=device), 4, 6, **on),
        "route": lambda: wk.route(x, w1[:, :, 0], **on),
        "permute": lambda: wk.permute(x, plan, **on),
        "grouped_gemm": lambda: wk.grouped_gemm(wk.permute(x, plan), w1, plan, b1, "gelu", **on),
        "combine": lambda: wk.combine(wk.permute(x, plan), weight, plan, **on),
        "moe_ffn": lambda: wk.moe_ffn(x, weight, plan, w1, b1, w2, b2, **on),
    }[op]()


def test_a_library_that_is_there_is_loaded_and_serves_every_op():
    info = wk.build_info()
    assert info["native"] == (info["library"] is not None), info["reason"]
    assert (info["reason"] is None) == info["native"]
    if info["native"]:
        for op in PUBLIC_OPS:
            assert wk.available_backends(op, "cpu")[0] == "native"
        assert set(info["native_ops"]["cpu"]) >= set(PUBLIC_OPS)


@pytest.mark.parametrize("op", PUBLIC_OPS)
def test_available_backends_is_what_can_be_called(op, device):
    names = wk.available_backends(op, device)
    assert names == wk.available_backends(op, torch.device(device)) == wk.available_backends(op, f"{device}:0")
    assert names[-1] == "reference"
    assert list(names) == [name for name in ("native", "triton", "reference") if name in names]
    for name in ("native", "triton", "reference"):
        if name in names:
            call(op, device, name)
        else:
            with pytest.raises(ValueError, match=rf"^{op}: backend: '{name}' cannot serve this call: \S.{{20,}}"):
                call(op, device, name)


@pytest.mark.parametrize("op", PUBLIC_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_available_dtype_works(op, dtype, device):
    names = wk.available_backends(op, device, dtype)
    assert "reference" in names
    assert ("native" in names) == (op in wk.build_info()["native_ops"].get(device, ()))
    math = torch.float64 if dtype == torch.float64 else torch.float32
    for name in names:
        result = call(op, device, name, dtype)
        if op == "plan_routing":
            assert result.choice_row.dtype == torch.int32
        elif op == "topk_gate":
            assert result.weight.dtype == result.probs.dtype == math
        elif op == "route":
            assert result[0].weight.dtype == result[2].dtype == math
        else:
            assert result.dtype == dtype


def test_no_backend_for_a_dtype_that_no_op_takes(device):
    assert wk.available_backends("permute", device, torch.int32) == ()


def test_available_backends_of_an_unknown_op():
    with pytest.raises(ValueError, match=r"^available_backends: op: expected one of .*moe_ffn.*, got 'moe'$"):
        wk.available_backends("moe", "cpu")


@pytest.mark.parametrize("op", PUBLIC_OPS)
def test_unknown_backend(op):
    with pytest.raises(
        ValueError, match=f"^{op}: backend: expected None, 'native', 'triton' or 'reference', got 'abacus'"
    ):
        call(op, backend="abacus")


@pytest.mark.parametrize("op", PUBLIC_OPS)
def test_none_is_the_first_available(op, device, monkeypatch):
    chosen = []
    ops_for = registry.ops_for

    def spy(*args):
        chosen.append(ops_for(*args))
        return chosen[-1]

    module = sys.modules[getattr(wk, op).__module__]
    monkeypatch.setattr(module, "ops_for", spy)
    call(op, device)
    by_default = chosen[-1]
    call(op, device, wk.available_backends(op, device)[0])
    assert chosen[-1] is by_default


def run_copy(tmp_path: pathlib.Path, library: bytes | None) -> dict:
    """Import a copy of the package in a process of its own, with this for its library, and use it."""
    package = tmp_path / "widenet_kernels"
    shutil.copytree(pathlib.Path(wk.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library is not None:
        (package / "_C.so").write_bytes(library)
    program = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, widenet_kernels as wk
gate, plan, _ = wk.route(torch.ones(3, 4), torch.ones(2, 4))
experts = wk.Experts(2, 4, 8)
y = experts(torch.ones(3, 4), gate.weight, plan)
y.sum().backward()
print(json.dumps({
    "file": wk.__file__,
    "warnings": [[w.category.__name__, str(w.message)] for w in caught if "widenet" in str(w.message)],
    "info": wk.build_info(),
    "backends": wk.available_backends("moe_ffn", "cpu"),
    "finite": bool(y.isfinite().all() and experts.w1.grad.any()),
}))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["file"].startswith(str(tmp_path))
    assert result["backends"] == ["reference"]
    assert result["finite"]
    assert result["info"]["native"] is False
    return result


def test_a_broken_library_warns_once_and_the_reference_serves(tmp_path):
    result = run_copy(tmp_path, b"this is not a library")
    ((category, message),) = result["warnings"]
    assert category == "RuntimeWarning"
    reason = result["info"]["reason"]
    assert reason in message
    assert "_C.so" in reason
    assert "invalid ELF header" in reason or "file too short" in reason  # the loader's own words


def test_without_a_library_there_is_no_warning(tmp_path):
    result = run_copy(tmp_path, None)
    assert result["warnings"] == []
    assert "without compiled kernels" in result["info"]["reason"]
    assert result["info"]["library"] is None
