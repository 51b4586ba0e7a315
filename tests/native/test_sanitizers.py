"""The native tests again, with kernels that AddressSanitizer and UndefinedBehaviorSanitizer watch.

The sanitizers' runtime has to be in the process before Python is, so the tests run in a subprocess.
"""

import os
import pathlib
import subprocess
import sys

import native
import pytest

HERE = pathlib.Path(__file__).parent


def runtime(name: str) -> str:
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert os.path.isabs(path), f"g++ has no {name}: install its sanitizer libraries"
    return path


@pytest.fixture(scope="module")
def built() -> pathlib.Path:
    return native.build(sanitize=True)


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        # libstdc++ as well: the runtime looks for its exceptions before anything else has loaded it
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they have until the process ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(native.ROOT)]),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=native.ROOT, capture_output=True, text=True)


def test_native_tests_pass_under_the_sanitizers(built):
    without = (pathlib.Path(__file__).name, "test_emulator.py", "test_emulated_ops.py")
    ignore = [f"--ignore={HERE / name}" for name in without]
    done = run("-m", "pytest", str(HERE), *ignore, "--sanitized", "-q", "-x", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert " passed" in done.stdout


MISTAKES = {
    "read past the end": ("read_past_the_end(np.zeros(4096, np.float32))", "AddressSanitizer: heap-buffer-overflow"),
    "signed overflow": ("overflow(2**31 - 1)", "runtime error: signed integer overflow"),
}


@pytest.mark.parametrize(("call", "report"), MISTAKES.values(), ids=MISTAKES)
def test_the_sanitizers_are_on(built, call, report):
    done = run("-c", f"import native, numpy as np; native.load(native.pathlib.Path({str(built)!r})).{call}")
    assert done.returncode != 0
    assert report in done.stderr, done.stderr
