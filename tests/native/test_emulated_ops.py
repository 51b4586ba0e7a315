"""The tests of the routing ops with csrc/torch's side for a GPU behind them, and csrc/cuda under the emulator."""

import os
import pathlib
import re
import subprocess
import sys

import native

HERE = pathlib.Path(__file__).parent
FILES = ("gate", "plan", "plan_properties", "route", "permute", "combine", "autocast", "opcheck", "rules")
# Not asked: what takes the emulator minutes, what is about the CPU's threads, and more experts than the kernels take.
SELECTED = "native and not T65600 and not number_of_threads and not very_many_experts"


def test_the_ops_tests_pass_with_emulated_kernels():
    files = [str(native.ROOT / f"tests/ops/test_{name}.py") for name in FILES]
    options = ["-p", "emulated_ops", "-p", "no:cacheprovider", "-q", "-x", "-k", SELECTED]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(native.ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert "Overriding a previously registered kernel" in done.stderr + done.stdout  # it was the emulated ones
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 1000
