"""benchmarks/on_gpu.sh without a GPU: it says so; --cpu-smoke goes through its stages, those that fail included."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]


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
        "timings": "ok",
        "table": "ok",
        "fails": "failed (3)",
        "hangs": "timed out",
        "refuses": "refused",
        "memcheck": "not there",
    }
    assert done.returncode == 1, done.stderr
    assert results["machine"]["commit"] == "abc"
    for part in ("smoke", "graph"):
        assert all(row["verdict"].startswith("ok") for row in results[part])
        assert any(row["case"].startswith("triton") for row in results[part])
    assert results["speed"]["ceilings"][0]["gb_per_s"] > 0
    for section, stage in (("routing", "route backward"), ("movement", "combine backward")):
        rows = {row["name"]: row for row in results["speed"][f"WideNet-B {section}"]}
        assert all(rows[f"{stage}, {backend}"]["host_us"] > 0 for backend in ("reference", "triton"))
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["machine"]["commit"] == "abc"
    assert any(row["kind"] == "ours" and row["ms"] > 0 for row in table["rows"])
    assert (tmp_path / "summary.txt").read_text() in done.stdout
    assert len(list(tmp_path.iterdir())) <= 6
