"""The compiled library as shipped: what its CUDA kernels need, what it asks of a machine, which driver it takes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.__main__ import main
from widenet_kernels.ops.gpu import serves
from widenet_kernels.ops.native import LIBRARY_FILE
from widenet_kernels.ops.registry import why_not

ARCHITECTURES = "80-real,86-real,89-real,90a-real,100-real,120-real,90-virtual"
ROUTING_OPS = {"topk_gate", "plan_routing", "route", "permute", "combine"}
MOST_REGISTERS = 128  # of a thread: two blocks of 256 fill a multiprocessor


def said(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def kernels(report):
    """(architecture, kernel, registers, bytes of stack, bytes of local memory) from cuobjdump's report."""
    architecture = ""
    for part in re.finditer(r"^arch = (\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", report, re.M):
        architecture = part[1] or architecture
        if part[2]:
            yield architecture, part[2], *map(int, part.group(3, 4, 5))


def wasteful(report):
    return [k for k in kernels(report) if k[2] > MOST_REGISTERS or k[3] or k[4]]


def test_no_kernel_spills_or_takes_too_many_registers():
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = said(cuobjdump, "-res-usage", LIBRARY_FILE)
    assert wk.build_info()["cuda_architectures"] == ARCHITECTURES
    found = {}
    for architecture, kernel, *_ in kernels(report):
        found.setdefault(architecture, set()).add(re.search(r"[a-z_]+_kernel", kernel)[0])
    assert set(found) == {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"}
    stages = {"gate", "gate_backward", "count", "scan", "place", "permute", "combine", "combine_backward"}
    stages |= {"route_backward", "sum_parts", "asked_rows"}
    assert all(names == {f"{stage}_kernel" for stage in stages} for names in found.values()), found
    assert wasteful(report) == []


@pytest.mark.parametrize("usage", ["REG:48 STACK:8", "REG:137 STACK:0", "REG:40 STACK:0"])
def test_waste_is_seen(usage):
    """In lines that cuobjdump wrote of earlier forms of the gate; a stack frame is where ptxas spills to."""
    local = 0 if usage != "REG:40 STACK:0" else 16
    report = f"arch = sm_80\n Function gate_kernel:\n  {usage} SHARED:0 LOCAL:{local} CONSTANT[0]:440 TEXTURE:0\n"
    assert len(wasteful(report)) == 1


def test_the_library_needs_nothing_of_cuda_or_python():
    """The CUDA runtime is inside and unseen; libtorch_cuda is found at run time, where there is one."""
    needed = re.findall(r"NEEDED.*\[(\S+)\]", said("readelf", "-d", LIBRARY_FILE))
    assert not [name for name in needed if re.search("cuda|cublas|python|c10", name)], needed
    symbols = said("nm", "-D", LIBRARY_FILE).split("\n")
    assert [line for line in symbols if line.endswith("widenet_build_info")]
    assert not [line for line in symbols if re.search(r" (cuda|__cuda|cu[A-Z]|_?Py)", line)]


def with_driver(tmp_path, version):
    """What a process says of the library beside a driver that serves this CUDA version (None: beside no driver)."""
    source = f'extern "C" int cuDriverGetVersion(int* v) {{ *v = {version}; return 0; }}'
    (tmp_path / "driver.cpp").write_text(source if version else "")
    said("g++", "-shared", "-fPIC", tmp_path / "driver.cpp", "-o", tmp_path / "libcuda.so.1")
    program = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    torch.version.cuda = "13.0"  # as a torch for GPUs has it
    import widenet_kernels as wk
    from widenet_kernels.ops import registry
wk.route(torch.ones(3, 4), torch.ones(2, 4))
gpu = torch.device("cuda", 0)
reason = registry.why_not("native", "permute", gpu, torch.float32)
said = [str(w.message) for w in caught if "widenet" in str(w.message)]
print(json.dumps([wk.build_info(), said, reason]))
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(Path(wk.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_driver_that_is_too_old(tmp_path):
    info, warned, reason = with_driver(tmp_path, 12040)
    problem = f"the driver serves CUDA 12.4, the kernels were built with {info['cuda_toolkit']}"
    assert info["cuda_problem"].startswith(problem)
    assert [problem in text for text in warned] == [True]
    assert reason == info["cuda_problem"]
    assert set(info["native_ops"]["cpu"]) >= ROUTING_OPS


def test_a_driver_that_is_new_enough(tmp_path):
    info, warned, reason = with_driver(tmp_path, 99000)
    assert (info["cuda_problem"], warned) == ("", [])
    assert reason == "there is no GPU that torch can use"


def test_no_driver_is_no_reason_to_warn(tmp_path):
    info, warned, reason = with_driver(tmp_path, None)
    assert info["cuda_problem"] == reason == "there is no NVIDIA driver (libcuda.so.1)"
    assert warned == []


def test_more_experts_than_the_kernels_take():
    gpu = torch.device("cuda", 0)
    assert why_not("native", "topk_gate", gpu, torch.float32, 1025) == (
        "its kernels for a GPU take up to 1,024 experts, got 1,025"
    )
    assert "1,024" not in why_not("native", "topk_gate", gpu, torch.float32, 1024)


@pytest.mark.parametrize(
    ("architectures", "good", "bad"),
    [
        ("80-real", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (12, 0)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0)]),
        ("90a-real", [(9, 0)], [(8, 9), (10, 0)]),
        ("90a", [(9, 0)], [(10, 0)]),
        ("100f-real", [(10, 0), (10, 3)], [(11, 0)]),
        ("120-real", [(12, 0), (12, 1)], [(10, 0)]),
        ("90-virtual", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ("89", [(8, 9), (9, 0)], [(8, 6)]),
        (ARCHITECTURES, [(8, 0), (8, 7), (9, 0), (10, 3), (11, 0), (13, 0)], [(7, 0), (7, 5)]),
    ],
)
def test_which_devices_an_architecture_serves(architectures, good, bad):
    assert all(serves(architectures, capability) for capability in good)
    assert not any(serves(architectures, capability) for capability in bad)


def test_info(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["widenet_kernels", "info"])
    main()
    text = capsys.readouterr().out
    for part in (wk.__version__, torch.__version__, str(LIBRARY_FILE), "stable ABI of LibTorch 2.10", "sm_90a"):
        assert part in text
    for op in ROUTING_OPS:
        assert re.search(rf"^{op} +cpu, cuda +native", text, re.M), text
    assert re.search(r"^moe_ffn +cpu +native", text, re.M), text
