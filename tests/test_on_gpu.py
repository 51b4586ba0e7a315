"""benchmarks/on_gpu.sh without a GPU: it says so; --cpu-smoke goes through its stages, those that fail included."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]

BACKENDS = ("plain torch", "widenet_kernels, triton")


def on_gpu(*arguments, **environment):
    command = ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path):
    done = on_gpu(tmp_path / "out")
    assert done.returncode == 2
    assert "there is no GPU" in done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_arguments():
    done = on_gpu()
    assert done.returncode == 64
    assert "usage" in done.stderr


def test_stages(tmp_path):
    pytest.importorskip("triton")
    done = on_gpu("--cpu-smoke", tmp_path, WIDENET_COMMIT="abc")
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: stage["status"] for name, stage in results["stages"].items()} == {
        "smoke": "ok",
        "graph": "ok",
        "table": "ok",
        "products": "ok",
        "fails": "failed (3)",
        "hangs": "timed out",
        "racecheck": "refused",
        "memcheck": "not there",
    }
    assert done.returncode == 1, done.stderr
    for part in ("smoke", "graph"):
        assert all(row["verdict"].startswith("ok") for row in results[part])
        assert any(row["case"].startswith("triton") for row in results[part])
    products = json.loads((tmp_path / "products.json").read_text())["rows"]
    timed = {(row["bench"], row["pass"], row["contender"]) for row in products if row.get("ms", 0) > 0}
    both = {(stage, "backward", name) for stage in ("gate", "route", "permute", "combine") for name in BACKENDS}
    assert both <= timed
    assert {("launches", "forward", f"gate + plan, {backend}") for backend in ("reference", "triton")} <= timed
    assert {("second product, gradient of weight", "backward", name) for name in ("dense GEMMs", BACKENDS[1])} <= timed
    assert any(bench == "tiles-first" and name.startswith("default") for bench, _, name in timed)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["machine"]["commit"] == "abc"
    assert any(row["kind"] == "ours" and row["ms"] > 0 for row in table["rows"])
    summary = (tmp_path / "summary.txt").read_text()
    assert summary in done.stdout
    assert all(line in summary for line in ("second product, gradient of weight host", "layer host", "smoke", "hangs"))
    assert len(list(tmp_path.iterdir())) <= 6
