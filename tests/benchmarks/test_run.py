"""A run from its plan to its file: what is measured, what is refused and why, and what an interruption leaves."""

import functools
import itertools
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import widenet_kernels as wk
from widenet_kernels.benchmarks import (
    ceilings,
    counts,
    layer,
    limits,
    model,
    peers,
    results,
    run,
    shapes,
    stages,
    timing,
)
from widenet_kernels.benchmarks.shapes import Case, Inputs
from widenet_kernels.benchmarks.timing import LEAST_ROUNDS, Budget, Clock, Contender, Unavailable, measure
from widenet_kernels.models import WideNetConfig

TINY = Case("tiny", 24, 16, 24, 4, 2)
BUDGET = Budget(seconds=0, patience=20, largest_error=1e-3)
ABOUT = {"dtype": "fp32", "device": "cpu", "threads": 1}


def contender(name, call=lambda: None, **options):
    return Contender(name, options.pop("kind", "ours"), lambda: call, **options)


def measured(*contenders, budget=BUDGET, clock=None):
    rows = {}
    measure(list(contenders), torch.float32, clock or Clock(), budget, rows, lambda name: None)
    return rows


class Fake(Clock):
    """Turns take what they are told, whatever is called."""

    def __init__(self, *milliseconds):
        super().__init__()
        self.times = itertools.cycle(milliseconds)

    def turn(self, call):
        call()
        return next(self.times)


def test_the_figures_of_a_contender():
    row = measured(contender("one", repeat=2), clock=Fake(1.0, 5.0, 3.0, 2.0, 4.0))["one"]
    assert (row["ms"], row["lowest_ms"], row["spread_ms"], row["rounds"]) == (1.5, 0.5, 1.0, 5)


def test_contenders_take_turns():
    calls = []
    measured(*(contender(name, functools.partial(calls.append, name)) for name in "ab"), clock=Fake(1.0))
    assert "".join(calls).endswith("ab" * timing.LEAST_ROUNDS)


def test_a_wrong_answer_is_not_timed():
    rows = measured(contender("off", error=lambda result: 0.5), contender("nan", error=lambda result: float("nan")))
    assert all("ms" not in row and row["why"].startswith("WRONG: off by") for row in rows.values())


def test_what_cannot_run_says_why_and_stops_no_other():
    def fails():
        raise RuntimeError("no such\n  kernel")

    def refuses():
        raise Unavailable("not installed")

    rows = measured(contender("broken", fails), Contender("absent", "peer", refuses), contender("good"))
    assert rows["broken"]["why"] == "RuntimeError: no such kernel"
    assert rows["absent"]["why"] == "not installed"
    assert rows["good"]["ms"] >= 0


def test_what_fails_in_a_later_round_stops_no_other():
    calls = itertools.count()

    def fails_late():
        if next(calls) > 4:
            raise RuntimeError("out of luck")

    rows = measured(contender("late", fails_late), contender("works"))
    assert rows["late"] == {"why": "RuntimeError: out of luck"}
    assert len(rows["works"]["turns_ms"]) == LEAST_ROUNDS


def test_what_takes_too_long_is_called_once():
    calls = []
    row = measured(contender("slow", lambda: calls.append(1)), budget=BUDGET._replace(patience=0))["slow"]
    assert (row["rounds"], len(calls)) == (1, 1)


def test_what_is_too_much_is_not_called():
    clock = Clock()
    clock.foreseen_seconds = lambda flops, dtype: flops / 1e9
    huge = contender("huge", lambda: pytest.fail("called"), memory=2.0**60)
    endless = contender("endless", lambda: pytest.fail("called"), work=1e12)
    rows = measured(huge, endless, clock=clock)
    assert "needs 1,099,511,627,776 MiB" in rows["huge"]["why"]
    assert "1,000 s foreseen, patience 20 s" in rows["endless"]["why"]


def test_peak_memory_is_what_a_call_holds_at_once():
    def call():
        for _ in range(3):
            torch.empty(1 << 18)  # 1 MiB, given back each time

    assert measured(contender("one", call))["one"]["peak_mib"] == pytest.approx(1, abs=0.01)


def test_a_row_is_completed_by_its_section():
    section = results.Section(
        "layer",
        TINY,
        "forward",
        [
            contender("floor", kind="limit", flops=2e9),
            contender("ours", flops=2e9, nbytes=4e6),
            contender("slow peer", kind="peer", flops=2e9),
            contender("best peer", kind="peer", flops=2e9),
            contender("absent", kind="peer"),
            contender("interrupted", kind="peer"),
        ],
        "floor",
    )
    times = {"floor": 1.0, "ours": 2.0, "slow peer": 8.0, "best peer": 4.0}
    figures = {name: timing.summary([ms]) for name, ms in times.items()} | {
        "absent": {"why": "not installed"},
        "interrupted": {},
    }
    rows = {row["contender"]: row for row in results.complete(section, ABOUT, figures)}
    assert list(rows) == ["floor", "ours", "slow peer", "best peer", "absent"]
    ours = rows["ours"]
    assert (ours["tflops"], ours["gb_per_s"]) == (1.0, 2.0)
    assert (ours["limit"], ours["share_of_limit"], ours["ratio_to_best_peer"]) == ("floor", 0.5, 2.0)
    assert rows["best peer"]["ratio_to_best_peer"] == 1.0
    assert rows["floor"]["ratio_to_best_peer"] is None
    assert rows["absent"]["why"] == "not installed"
    assert "ms" not in rows["absent"]
    assert ours["dims"] == {"T": 24, "D": 16, "F": 24, "E": 4, "K": 2} | {
        "capacity_factor": 1.2,
        "activation": "gelu",
        "routing": "uniform",
    }


def test_ratios_are_taken_within_rounds():
    """The machine was half as fast in the second round, which changes no ratio; the medians alone would give 0.4."""
    contenders = [contender("floor", kind="limit", flops=2e9), contender("ours", flops=2e9)]
    section = results.Section("layer", TINY, "forward", contenders, "floor")
    figures = {"floor": timing.summary([1.0, 2.0, 1.2]), "ours": timing.summary([2.0, 4.0, 3.0])}
    rows = {row["contender"]: row for row in results.complete(section, ABOUT, figures)}
    assert rows["ours"]["share_of_limit"] == 0.5


def test_what_was_called_once_is_held_against_the_median():
    contenders = [contender("floor", kind="limit", flops=2e9), contender("ours", flops=2e9)]
    section = results.Section("layer", TINY, "forward", contenders, "floor")
    figures = {"floor": timing.summary([1.0, 2.0, 3.0]), "ours": timing.summary([4.0])}
    rows = {row["contender"]: row for row in results.complete(section, ABOUT, figures)}
    assert rows["ours"]["share_of_limit"] == 0.5


def test_the_table_says_what_was_no_graph_on_a_gpu():
    section = results.Section("layer", TINY, "forward", [contender(name) for name in ("a", "b", "c")], None)
    ways = {"a": "graph", "b": "events, not captured: it waits", "c": "events"}
    figures = {name: timing.summary([1.0]) | {"timed": way} for name, way in ways.items()}
    for device, shown in (("cuda", ["a", "b [events]", "c [events]"]), ("cpu", ["a", "b", "c"])):
        rows = list(results.complete(section, ABOUT | {"device": device}, figures))
        _, _, *lines = results.table(rows).splitlines()
        assert [line.split("  1 ms")[0].strip() for line in lines] == shown


def test_the_layers_contest():
    inputs = Inputs(TINY, "cpu", torch.float32)
    names = {"GEMMs alone", "dense GEMMs", "widenet_kernels", "torch loop", "one-hot einsum", "torch.bmm"}
    for section in layer.sections(inputs):
        rows = {row["contender"]: row for row in completed(section)}
        assert names <= {name for name, row in rows.items() if "ms" in row}
        assert rows["widenet_kernels"]["relative_error"] < 1e-5
        both = 3 if section.direction == "forward+backward" else 1
        assert rows["widenet_kernels"]["flops"] == both * counts.layer_flops(TINY, inputs.served)
        assert rows["GEMMs alone"]["share_of_limit"] == 1
        assert all(row["why"] for row in rows.values() if "ms" not in row)


def test_without_a_backward_no_gradients_are_foreseen_and_none_computed():
    inputs = Inputs(TINY, "cpu", torch.float32)
    contest = layer.Contest(inputs)
    forward, both = ({c.name: c for c in contest.contenders(way)} for way in layer.DIRECTIONS)
    gradients = counts.layer_bytes(TINY, 4, TINY.E) * 3  # of the layer and, twice as wide, of the truth
    assert both["torch loop"].memory - forward["torch loop"].memory == gradients
    assert list(contest.truth(False, False)) == ["y"]
    assert torch.equal(contest.truth(False, False)["y"], contest.truth(False, True)["y"])


@pytest.mark.parametrize("name", stages.STAGES)
def test_a_stages_contest(name):
    for shape in (TINY, TINY._replace(capacity_factor=0.5), TINY._replace(activation="swiglu", capacity_factor=None)):
        sections = list(stages.sections(name, Inputs(shape, "cpu", torch.float32)))
        assert [section.direction for section in sections] == list(layer.DIRECTIONS[: 1 if name == "plan" else 2])
        for section in sections:
            rows = completed(section)
            for row in rows:
                assert "ms" in row, row
                assert row["kind"] == "limit" or row["relative_error"] is None or row["relative_error"] < 1e-5
            peers = {row["contender"] for row in rows if row["kind"] == "peer"}
            assert ("torch grouped_mm" in peers) == (name == "grouped_gemm")


@pytest.mark.parametrize("bench", ["backward", "launches", "products"])
def test_what_is_not_measured_by_default(bench):
    for shape in (TINY, TINY._replace(activation="swiglu", capacity_factor=None, bias=False)):
        for section in run.BENCHES[bench](Inputs(shape, "cpu", torch.float32)):
            for row in completed(section):
                assert "ms" in row, row
                assert row["relative_error"] is None or row["relative_error"] < 1e-5


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("product", run.PRODUCTS)
def test_tiles(product, activation):
    """Every candidate takes the default's place, gives its result, and leaves."""
    from widenet_kernels.benchmarks import sweeps

    inputs = Inputs(TINY._replace(activation=activation), "cpu", torch.float32)
    for section in run.BENCHES[f"tiles-{product}"](inputs):
        rows = completed(section, BUDGET._replace(patience=0))  # each is called once
        launched = [sweeps.grouped_gemm.choose_tile.last[1]]
        assert len(rows) > 5
    default, *candidates = rows
    assert default["contender"].startswith("default ")
    assert all(row["relative_error"] < 1e-5 for row in candidates)
    assert [str(tile) for tile in launched] == [candidates[-1]["contender"]]
    assert sweeps.grouped_gemm.choose_tile is sweeps.tiles.choose_tile


def test_a_stages_tensors_are_foreseen_and_made_when_there_is_room():
    inputs = Inputs(TINY, "cpu", torch.float32)
    rows, element = inputs.served, 4
    at_least = element * (rows * (TINY.D + TINY.F) + TINY.E * TINY.D * TINY.F)
    for section in stages.sections("grouped_gemm", inputs):
        assert all(c.memory >= at_least for c in section.contenders if c.name != limits.LAUNCH)
    assert "experts" not in vars(inputs)


def test_a_wrong_peer_of_grouped_gemm_is_seen_in_every_pass(monkeypatch):
    multiply = peers.torch_grouped_mm()
    monkeypatch.setattr(peers, "torch_grouped_mm", lambda: lambda rows, w, offs: 1.1 * multiply(rows, w, offs=offs))
    for section in stages.sections("grouped_gemm", Inputs(TINY, "cpu", torch.float32)):
        rows = {row["contender"]: row for row in completed(section)}
        assert rows["torch grouped_mm"]["why"].startswith("WRONG")


def test_the_training_step(monkeypatch):
    def tiny_network(**options):
        sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "ffn_size": 12, "num_layers": 2, "num_heads": 2}
        return WideNetConfig(**sizes, num_classes=3, **options)

    case = Case("tiny network", 2 * 5, 8, 12, 4, 2)  # two images of four patches and a first position
    monkeypatch.setattr(model, "CONFIGS", {"b": tiny_network})
    monkeypatch.setattr(model, "WIDENET", {("b", 2): case})
    (section,) = model.sections(Inputs(case, "cpu", torch.float32))
    rows = {row["contender"]: row for row in completed(section)}
    assert list(rows) == ["GEMMs alone", "widenet_kernels", "reference"]
    assert rows["widenet_kernels"]["relative_error"] < 1e-5
    assert rows["widenet_kernels"]["flops"] > 2 * 3 * counts.layer_flops(case, served=2 * 10)
    assert all("ms" in row for row in rows.values())
    assert not list(model.sections(Inputs(TINY, "cpu", torch.float32)))


def completed(section, budget=BUDGET):
    return list(results.complete(section, ABOUT, measured(*section.contenders, budget=budget)))


def plan(**options):
    defaults = run.Plan(["layer"], [TINY], ["fp32"], ["forward"], "cpu", [1], 0, 20)
    return defaults._replace(**options)


def test_a_run_keeps_what_an_interruption_leaves(monkeypatch):
    class Interrupted(Clock):
        def turn(self, call):
            if turns and next(turns) == 5:
                raise KeyboardInterrupt
            return super().turn(call)

    turns = itertools.count()
    monkeypatch.setattr(run, "clock", lambda device: Interrupted())
    rows = []
    with pytest.raises(KeyboardInterrupt):
        run.run(plan(), rows.extend)
    timed = [row["contender"] for row in rows if "ms" in row]
    assert timed[:3] == ["GEMMs alone", "dense GEMMs", "widenet_kernels"]
    assert len(timed) == 5
    assert "torch loop" in results.table(rows)


def test_the_roof_is_the_better_of_two_products():
    (section,) = ceilings.sections(Inputs(TINY, "cpu", torch.float32))
    rows = {row["contender"]: row for row in completed(section)}
    assert list(rows) == [ceilings.COPY, ceilings.TORCH, ceilings.OURS, limits.LAUNCH]
    assert rows[ceilings.OURS]["relative_error"] < 1e-5
    figures = pytest.importorskip("widenet_kernels.benchmarks.figures", reason="needs matplotlib")
    roof = figures.roof(list(rows.values()))
    best = max((ceilings.TORCH, ceilings.OURS), key=lambda name: rows[name]["tflops"])
    assert (roof.by, roof.peak) == (best, rows[best]["tflops"])


def test_ceilings_and_host_do_not_depend_on_the_shape():
    rows = []
    run.run(plan(benches=["host"], cases=[TINY, shapes.find("decode-1")]), rows.extend)
    assert [row["contender"] for row in rows].count("widenet_kernels") == 1
    products, ours = (
        next(r for r in rows if r["contender"] == name) for name in ("the same mm calls", "widenet_kernels")
    )
    beyond = [turn - least for turn, least in zip(ours["turns_ms"], products["turns_ms"], strict=True)]
    assert ours["host_us"] == pytest.approx(statistics.median(beyond) * 1e3)


@pytest.mark.parametrize("bench", ["ceilings", "host"])
def test_what_does_not_depend_on_the_shape_is_run_once_for_each_dtype(bench, monkeypatch):
    seen = []
    monkeypatch.setitem(run.BENCHES, bench, lambda inputs: iter(seen.append((inputs.case.name, inputs.dtype)) or ()))
    cases = [TINY, TINY._replace(name="another")]
    run.run(plan(benches=[bench], cases=cases, dtypes=["fp32", "bf16"]), lambda rows: None)
    assert seen == [("tiny", torch.float32), ("tiny", torch.bfloat16)]


def test_a_build_with_a_broken_op_is_refused(monkeypatch):
    assert run.broken("cpu") == []
    permute = wk.permute

    def broken(x, plan, backend=None):
        return permute(x, plan, backend=backend) * (1 if backend == "reference" else 1.5)

    monkeypatch.setattr(wk, "permute", broken)
    faults = run.broken("cpu")
    assert faults
    assert all("permute" in fault for fault in faults)


def test_what_is_counted_is_not_rounded():
    row = {"bytes": 536870912.0, "ms": 1.23456789, "turns_ms": [0.000123456789], "rounds": 1234567, "why": None}
    assert results.rounded(row) == row | {"ms": 1.23457, "turns_ms": [0.000123457]}


def test_what_is_installed_knows_its_commit(tmp_path, monkeypatch):
    """The file that setup.py leaves in what it builds, read there."""
    root, site = Path(__file__).parents[2], tmp_path / "site"
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", site]
    subprocess.run(command, cwd=root, env=os.environ | {"WIDENET_NATIVE": "OFF"}, check=True)
    describe = ("git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    monkeypatch.delenv("WIDENET_COMMIT", raising=False)
    monkeypatch.setattr(results, "__file__", str(site / "widenet_kernels" / "benchmarks" / "results.py"))
    assert results.commit() == (results.said(*describe) if (root / ".git").exists() else None)
