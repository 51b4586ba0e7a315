"""The CUDA emulator itself: right kernels give the same for every order of threads, wrong ones are found out."""

import os
import pathlib
import subprocess

import pytest

SOURCE = pathlib.Path(__file__).parents[2] / "csrc" / "testing" / "emulator_examples.cpp"
SEEDS = range(4)
VALUES = [[i * i % 101 for i in range(block * 96, (block + 1) * 96)] for block in range(3)]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulator") / "examples"
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    command = ["g++", "-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *checks, SOURCE, "-o", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def run(program, name, seed):
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, name, str(seed)], capture_output=True, text=True, env=environment)


def results(program, name):
    """What a kernel gives for every seed."""
    done = [run(program, name, seed) for seed in SEEDS]
    assert all(d.returncode == 0 for d in done), done[0].stdout + done[0].stderr
    return [tuple(map(int, d.stdout.split())) for d in done]


@pytest.mark.parametrize("name", ["sum", "shuffle"])
def test_sums(program, name):
    assert results(program, name) == [tuple(map(sum, VALUES))] * len(SEEDS)


def test_match_and_ballot(program):
    def of_warp(values):
        ranks = sum(values[:i].count(value) for i, value in enumerate(values))
        return ranks + sum(value % 2 for value in values)

    fifths = [[value % 5 for value in block] for block in VALUES]
    expected = tuple(sum(of_warp(block[i : i + 32]) for i in (0, 32, 64)) for block in fifths)
    assert results(program, "rank") == [expected] * len(SEEDS)


@pytest.mark.parametrize("name", ["no_barrier", "unwritten"])
def test_races_and_garbage_change_the_results(program, name):
    assert len(set(results(program, name))) > 1


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("early_exit", ["block (1, 0)", "__syncthreads", "never reached by 70 (ended)"]),
        ("two_barriers", ["thread 0 waits in __syncthreads", "48 (in __syncthreads"]),
        ("missing_lane", ["thread 32 waits in __shfl_sync", "never reached by 37 (ended)"]),
        ("wrong_mask", ["__shfl_sync with a mask that leaves out the calling lane"]),
        ("absent_source", ["__shfl_sync reads a lane that is not in its mask"]),
    ],
)
def test_what_never_meets_is_reported(program, name, words, seed):
    done = run(program, name, seed)
    assert done.returncode == 1
    assert all(word in done.stdout for word in [*words, "emulator_examples.cpp:"]), done.stdout


@pytest.mark.parametrize("name", ["past_shared", "past_global"])
def test_out_of_bounds_is_reported(program, name):
    done = run(program, name, 1)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert name + "_kernel" in done.stderr
