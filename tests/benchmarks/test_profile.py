"""bench profile at a tiny shape: its stages, its trace, and that the layer it profiles is the layer."""

import json
import os
import subprocess
import sys

import invented
import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.benchmarks import profiling, shapes

STAGES = ["route", "permute", "first GEMM", "activation", "second GEMM", "combine"]


@pytest.fixture(params=["widenet-b-8", "small"])  # gelu with a capacity and biases; swiglu, dropless, without them
def case(request):
    return shapes.find(request.param).tiny()


@pytest.fixture
def tiny(monkeypatch):
    """The command's shapes are all tiny."""
    monkeypatch.setattr(profiling, "find", lambda name: shapes.find(name).tiny())


@pytest.mark.parametrize("composition", ["composed", "fused"])
def test_the_stages_make_the_layer(case, composition, device):
    inputs = shapes.Inputs(case, device, torch.float64)
    layer = profiling.Layer(inputs, backward=True)
    getattr(layer, composition)()
    getattr(layer, composition)()  # leaves nothing behind for the next

    x, router = inputs.x.clone().requires_grad_(), inputs.router.clone().requires_grad_()
    experts = [None if t is None else t.clone().requires_grad_() for t in inputs.experts.values()]
    gate, plan, _ = wk.route(x, router, case.K, case.capacity, normalize=case.normalize)
    y = wk.moe_ffn(x, gate.weight, plan, *experts, case.activation)
    y.backward(inputs.grad)
    torch.testing.assert_close(layer.steps[-1].out, y)
    for ours, expected in zip((layer.x, layer.router, *layer.experts.values()), (x, router, *experts), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours.grad, expected.grad)


@pytest.mark.usefixtures("tiny")
def test_command(tmp_path, capsys):
    trace, found = tmp_path / "trace.json", tmp_path / "profile.json"
    invented.run(profiling, "profile", "--device", "cpu", "--dtype", "fp32", "--trace", trace, "--json", found)
    profile = json.loads(found.read_text())
    names = {way: [s["stage"] for s in stages(profile, "composed", way)] for way in ("forward", "backward")}
    assert names == {"forward": STAGES, "backward": STAGES[::-1]}
    assert [stage["stage"] for stage in stages(profile, "fused", "forward")] == ["route", "moe_ffn"]
    assert all(stage["ms"] > 0 for stage in profile["stages"])
    assert profile["host_us"].keys() == {"route", "permute", "grouped_gemm", "combine", "moe_ffn"}
    assert profile["launches"] > 0
    assert (profile["shape"], profile["dims"]["T"], profile["pass"]) == ("widenet-b-8", 40, "forward+backward")

    ranges = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {f"composed: {stage}{way}" for stage in STAGES for way in ("", " backward")} <= ranges
    assert "widenet_kernels::moe_ffn" in ranges
    out = capsys.readouterr().out
    assert all(stage in out for stage in STAGES)


@pytest.mark.usefixtures("tiny")
def test_forward_alone(tmp_path):
    found = tmp_path / "profile.json"
    invented.run(profiling, "profile", "--device", "cpu", "--dtype", "fp32", "--pass", "forward", "--json", found)
    profile = json.loads(found.read_text())
    assert [stage["stage"] for stage in stages(profile, "composed", "forward")] == STAGES
    assert {stage["pass"] for stage in profile["stages"]} == {"forward"}


@pytest.mark.usefixtures("tiny")
def test_a_trace_that_torch_does_not_write_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda watched, path: None)
    trace = tmp_path / "trace.json"
    trace.write_text("an earlier one")
    with pytest.raises(SystemExit, match=r"could not write .*trace\.json"):
        invented.run(profiling, "profile", "--device", "cpu", "--dtype", "fp32", "--trace", trace)


def test_nothing_is_written_to_stderr():
    command = [sys.executable, "-m", "widenet_kernels", "bench", "profile", "--shape", "host", "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def stages(profile, composition, way):
    return [s for s in profile["stages"] if (s["composition"], s["pass"]) == (composition, way)]


def test_report_says_what_the_fusion_gains():
    found = {
        "shape": "invented",
        "dtype": "fp32",
        "device": "cpu",
        "machine": {"threads": 2},
        "rounds": 5,
        "stages": [
            {"composition": "composed", "stage": "permute", "pass": "forward", "ms": 30.0},
            {"composition": "composed", "stage": "combine", "pass": "forward", "ms": 10.0},
            {"composition": "fused", "stage": "moe_ffn", "pass": "forward", "ms": 30.0},
        ],
        "launches": 7,
        "host_us": {"route": 12.0},
    }
    lines = profiling.report(found).splitlines()
    assert "fused it takes 10.000 ms less, 25.0%" in lines
    assert next(line for line in lines if "permute" in line).split() == ["permute", "forward", "30.000", "ms", "75.0%"]


def test_an_unknown_shape_is_named_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        invented.run(profiling, "profile", "--shape", "widenet-z")
    error = capsys.readouterr().err
    assert "widenet-z" in error
    assert "widenet-b-8" in error
