"""The command line of a run: what it refuses and how it says so, and what it prints and writes."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from widenet_kernels.__main__ import main
from widenet_kernels.benchmarks import cli, profiling, results, run, shapes, silent, stages
from widenet_kernels.benchmarks.arguments import output


def run_command(*arguments):
    with patch.object(sys, "argv", ["widenet_kernels", "bench", *arguments]):
        main()


def test_a_broken_build_is_refused(monkeypatch):
    monkeypatch.setattr(run, "broken", lambda device: ["permute is off by 0.5"])
    with pytest.raises(SystemExit, match="gives wrong results and is not measured:\npermute is off"):
        run_command("--shape", "decode-1")


def test_without_tqdm_there_is_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(run, "Progress", silent.Progress)
    run_command("--bench", "permute", "--shape", "host", "--device", "cpu", "--threads", "1", "--seconds", "0")
    captured = capsys.readouterr()
    assert captured.out.startswith("permute host")
    assert captured.err == ""


def test_the_command_from_end_to_end(tmp_path):
    options = ["--bench", "layer", "permute", "--shape", "host", "--pass", "forward", "--device", "cpu"]
    command = [sys.executable, "-m", "widenet_kernels", "bench", *options, "--threads", "1", "--seconds", "0"]
    done = subprocess.run([*command, "--json", tmp_path / "a.json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "layer host (T=1 D=64 F=64 E=4 K=2) fp32 forward, cpu, 1 threads; limit: GEMMs alone" in done.stdout
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["format"] == 1
    assert content["machine"]["torch"] == torch.__version__
    assert {"cpu", "threads", "glibc_tunables", "commit", "date", "cpu_level", "widenet_kernels"} <= set(
        content["machine"]
    )
    assert results.table(content["rows"]) + "\n\n" == done.stdout  # nothing is lost in the file
    lines = (tmp_path / "a.json").read_text().splitlines()[3:-1]
    assert [json.loads(line.rstrip(",")) for line in lines] == content["rows"]  # one in each line
    turns = [ms for row in content["rows"] for ms in row.get("turns_ms", ())]
    assert turns == [float(f"{ms:.6g}") for ms in turns]


@pytest.mark.parametrize("place", [(run, "broken"), (results, "machine"), (run, "Inputs"), (run, "measure")])
def test_an_early_interruption_leaves_the_file_as_it_was(place, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(*place, interrupted)
    kept = tmp_path / "kept.json"
    kept.write_text("what an earlier run has left")
    with pytest.raises(SystemExit, match="130"):
        run_command("--bench", "permute", "--shape", "host", "--device", "cpu", "--json", str(kept))
    assert kept.read_text() == "what an earlier run has left"
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("interrupted: this is what there is\n")


def test_an_interrupted_profile_ends_as_an_interrupted_run(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(profiling, "measure", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run_command("profile", "--shape", "host", "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train_step"], "train_step of host has no forward, backward, forward\\+backward here"),
        (["plan", "--pass", "backward"], "plan of host has no backward here"),
    ],
)
def test_a_run_that_measures_nothing_says_so(arguments, message, tmp_path):
    path = tmp_path / "none.json"
    with pytest.raises(SystemExit, match=f"nothing was measured: {message}"):
        run_command("--shape", "host", "--device", "cpu", "--json", str(path), "--bench", *arguments)
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "widenet-x"], "argument --shape: invalid choice: 'widenet-x' .*widenet-b-8.*cpu-targets"),
        (["--bench", "gemm"], "argument --bench: invalid choice: 'gemm' .*ceilings.*train_step"),
        (["--device", "gpu"], "argument --device: invalid choice: 'gpu' .*cpu.*cuda"),
        (["--threads", "2", "0"], "argument --threads: expected a whole number from 1 on, got '0'"),
        (["--threads", "1.5"], "argument --threads: expected a whole number from 1 on, got '1.5'"),
        (["--seconds", "inf"], "argument --seconds: expected a finite number from 0 on, got 'inf'"),
        (["--seconds", "soon"], "argument --seconds: expected a finite number from 0 on, got 'soon'"),
        (["--patience", "nan"], "argument --patience: expected a finite number from 0 on, got 'nan'"),
        (["--patience=-1"], "argument --patience: expected a finite number from 0 on, got '-1'"),
    ],
)
def test_a_wrong_argument_says_what_was_expected(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_command("--list", *arguments)  # accepted, it would measure nothing
    assert re.search(message, capsys.readouterr().err)


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ([], ["profile"]):
        with pytest.raises(SystemExit, match="2"):
            run_command(*command, "--device", "cuda")
        assert "argument --device: there is no GPU that torch can use" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--json"], ["profile", "--json"], ["profile", "--trace"]], ids=" ".join)
def test_a_place_that_cannot_be_written(option, tmp_path, capsys):
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path, f"{tmp_path} is a folder, expected a file"),
        (tmp_path / "file" / "a.json", f"{tmp_path / 'file'} cannot be made: "),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_command(*option, str(path))
        assert f"argument {option[-1]}: {message}" in capsys.readouterr().err


def test_a_place_for_pictures_that_is_a_file(tmp_path, capsys):
    results.write(tmp_path / "a.json", [])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        run_command("plot", str(tmp_path / "a.json"), "--out", str(tmp_path / "file"))
    assert f"argument --out: {tmp_path / 'file'} cannot be made: " in capsys.readouterr().err


def test_the_folder_of_a_file_is_made(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    assert output(str(path)) == path
    assert path.parent.is_dir()


def test_an_error_inside_a_command_keeps_its_traceback(monkeypatch):
    def fails(plan, report):
        raise ValueError("a bug")

    monkeypatch.setattr(run, "run", fails)
    with pytest.raises(ValueError, match="a bug"):
        run_command("--shape", "host", "--device", "cpu")


def test_the_list_names_everything(capsys):
    run_command("--list")
    out = capsys.readouterr().out
    assert all(name in out for name in (*shapes.CASES, *shapes.SUITES, *stages.STAGES, "train_step"))


def test_every_option_has_help():
    parser = argparse.ArgumentParser()
    cli.add_commands(parser)
    options = [action for action in parser._actions if action.option_strings]
    assert [action.option_strings for action in options if not action.help] == []
    said = " ".join(parser.format_help().split())
    for default in ("permute grouped_gemm combine)", f"{torch.get_num_threads()})", "3.0)", "20.0)"):
        assert default in said


def test_the_runs_of_the_readme_are_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the folder of --json is made
    parser = argparse.ArgumentParser()
    cli.add_commands(parser)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    commands = re.findall(r"^python -m widenet_kernels bench\b.*", readme, flags=re.MULTILINE)
    options = [shlex.split(command, comments=True)[4:] for command in commands]
    runs = [parser.parse_args(words) for words in options if not words or words[0].startswith("-")]  # no subcommand
    benches = {bench for chosen in runs for bench in chosen.bench}
    assert benches >= {*cli.DEFAULT_BENCHES, "train_step"}
