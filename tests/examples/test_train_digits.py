import importlib
import itertools
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("sklearn", reason="the example's data")
pytest.importorskip("matplotlib", reason="the example's picture")

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
TWO_EPOCHS = ("--epochs", "2", "--threads", "1")
IMAGES = 64  # two batches an epoch


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """The example as a module, on the first of its images."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("train_digits")
    few = module.Digits(*(part[:IMAGES] for part in module.load_split()))
    monkeypatch.setattr(module, "load_split", lambda: few)
    return module


@pytest.fixture(autouse=True)
def heeded_interrupt() -> Iterator[None]:
    """Ctrl-C interrupts, here and in what is started: a background job of a shell is started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_at(call: int, module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of this call of count_right: one a step, and one at the end of each epoch."""
    calls = itertools.count(1)
    count_right: Callable = module.count_right

    def counting(*args):
        if next(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return count_right(*args)

    monkeypatch.setattr(module, "count_right", counting)


def load(folder: pathlib.Path) -> dict:
    state = torch.load(folder / "checkpoint.pt")
    for record in state["history"]:
        del record["seconds"]
    return state


def assert_same_bits(first, second) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_bits(first[key], second[key])
    else:
        assert first == second


def test_split_is_stratified_and_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("train_digits")
    first, second = module.load_split(), module.load_split()
    assert_same_bits(first._asdict(), second._asdict())
    assert first.train_images.shape == (1437, 1, 8, 8)
    assert first.held_out_images.shape == (360, 1, 8, 8)
    held_out, train = first.held_out_labels.bincount(), first.train_labels.bincount()
    torch.testing.assert_close(held_out / (held_out + train), torch.full((10,), 0.2), rtol=0, atol=0.004)


@pytest.mark.parametrize("network", [[], ["--dense"]], ids=["experts", "dense"])
def test_trains_draws_and_says_how_well(example, network: list[str], tmp_path: pathlib.Path, capsys) -> None:
    assert example.main([*TWO_EPOCHS, *network, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    verdict = r"held-out accuracy \d+\.\d % after 2 epochs in \d+ s \(target 97 %: not reached\)"
    assert re.fullmatch(verdict, lines[-1])
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    state = load(tmp_path)
    assert len(state["history"]) == 2
    assert [line for line in lines if re.match(r" +2  ", line)] == [example.table_line(2, state["history"][1])]
    load_ = state["history"][-1]["load"]
    if network:
        assert load_ is None
    else:
        torch.testing.assert_close(torch.tensor(load_).sum(dim=1), torch.ones(4))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("call", "done"), [(2, 0), (4, 1), (6, 1)], ids=["first-epoch", "second-epoch", "held-out"])
def test_interrupted_and_resumed_run_ends_in_the_same_bits(
    example, call: int, done: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "bro ken"
    assert example.main([*TWO_EPOCHS, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        interrupt_at(call, example, patch)
        assert example.main([*TWO_EPOCHS, "--out", str(broken)]) == example.INTERRUPTED
    assert len(load(broken)["history"]) == done
    told = capsys.readouterr().out.splitlines()[-1]
    assert f"holds {done} of 2 epochs" in told
    assert told.endswith(f"--epochs 2 --threads 1 --out '{broken}' --resume")
    torch.manual_seed(99)
    assert example.main([*TWO_EPOCHS, "--out", str(broken), "--resume"]) == 0
    assert_same_bits(load(whole), load(broken))


def test_seed_decides_the_run(example, tmp_path: pathlib.Path) -> None:
    losses = []
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        example.main([*TWO_EPOCHS, "--seed", seed, "--out", str(tmp_path / folder)])
        losses.append([record["loss"] for record in load(tmp_path / folder)["history"]])
    assert losses[0] == losses[1] != losses[2]


def test_reference_backend_gives_the_same_losses(example, tmp_path: pathlib.Path) -> None:
    losses = []
    for folder, backend in (("best", []), ("reference", ["--backend", "reference"])):
        example.main([*TWO_EPOCHS, *backend, "--out", str(tmp_path / folder)])
        losses.append(torch.tensor([record["loss"] for record in load(tmp_path / folder)["history"]]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_resume_refuses_what_does_not_fit(example, tmp_path: pathlib.Path, capsys) -> None:
    with pytest.raises(SystemExit):
        example.main(["--resume", "--out", str(tmp_path)])
    assert "expected a checkpoint in" in capsys.readouterr().err
    assert example.main([*TWO_EPOCHS, "--out", str(tmp_path)]) == 0
    with pytest.raises(SystemExit):
        example.main([*TWO_EPOCHS, "--seed", "5", "--resume", "--out", str(tmp_path)])
    assert "seed = 0, this command 5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example.main(["--epochs", "0"])
    assert "--epochs: expected at least 1, got 0" in capsys.readouterr().err


def test_finished_run_resumes_to_its_verdict(example, tmp_path: pathlib.Path, capsys) -> None:
    assert example.main([*TWO_EPOCHS, "--out", str(tmp_path)]) == 0
    first = capsys.readouterr().out.splitlines()
    before = load(tmp_path)
    assert example.main([*TWO_EPOCHS, "--out", str(tmp_path), "--resume"]) == 0
    assert capsys.readouterr().out.splitlines() == first
    assert_same_bits(load(tmp_path), before)


def test_ctrl_c_of_the_real_program(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-u", str(EXAMPLES / "train_digits.py"), "--threads", "1", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        for line in program.stdout:
            if line.startswith("epoch"):
                program.send_signal(signal.SIGINT)
                break
        rest, errors = program.communicate(timeout=60)
    assert program.returncode == 130, errors
    assert rest.splitlines()[-1].endswith(f"--threads 1 --out {tmp_path} --resume")
    assert f"holds {len(load(tmp_path)['history'])} of 30 epochs" in rest.splitlines()[-1]
