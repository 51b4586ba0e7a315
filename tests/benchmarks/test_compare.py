"""bench compare on two invented files."""

import contextlib

import invented
import pytest

from widenet_kernels.benchmarks import compare, reading


@pytest.fixture
def files(tmp_path):
    """A function that writes the old file and the new one, the latter as ``change`` leaves it."""

    def write(change):
        new = invented.content()
        change(new)
        old = invented.written(tmp_path / "old.json", invented.content())
        return old, invented.written(tmp_path / "new.json", new)

    return write


def one_row(results, contender="ours"):
    rows = results["rows"]
    return next(r for r in rows if (r["bench"], r["shape"], r["contender"]) == ("layer", "wide-1000", contender))


def scaled(factor, contender="ours", **other):
    def change(new):
        row = one_row(new, contender)
        row.update(other, ms=row["ms"] * factor)

    return change


def test_nothing_changed(files, capsys):
    invented.run(compare, "compare", *files(lambda new: None), "--fail")
    out = capsys.readouterr().out
    assert "0 slower, 0 faster, 26 same, 0 once, 0 lost" in out
    assert "warning" not in out


@pytest.mark.parametrize(
    ("change", "arguments", "verdict", "code"),
    [
        (scaled(1.5), ["--fail"], "slower", 1),
        (scaled(1.5), [], "slower", 0),
        (scaled(0.5), ["--fail"], "faster", 0),
        (scaled(1.04), ["--fail"], "same", 0),  # below the threshold
        (scaled(1.04), ["--fail", "--threshold", "0.03"], "slower", 1),
        (scaled(1.5, spread_ms=60.0), ["--fail"], "same", 0),  # 50 ms more, inside the new file's spread
        (scaled(1.5, contender="peer loop"), ["--fail"], "slower", 0),  # not one of ours
        (scaled(1.5, spread_ms=0.0, rounds=1), ["--fail"], "once", 0),
    ],
)
def test_one_row_changed(files, capsys, change, arguments, verdict, code):
    with pytest.raises(SystemExit, match="1") if code else contextlib.nullcontext():
        invented.run(compare, "compare", *files(change), *arguments)
    summary = capsys.readouterr().out.splitlines()[-1]
    counts = {word: int(count) for count, word in (part.split() for part in summary.split(", "))}
    expected = {"slower": 0, "faster": 0, "same": 25, "once": 0, "lost": 0}
    assert counts == expected | {verdict: 26 if verdict == "same" else 1}


@pytest.mark.parametrize(("spreads", "verdict"), [((60, 0), "same"), ((0, 60), "same"), ((40, 40), "slower")])
def test_noise_is_the_larger_of_both_spreads(spreads, verdict):
    old = invented.row("layer", "ours", 100, spread_ms=spreads[0])
    new = invented.row("layer", "ours", 150, spread_ms=spreads[1])
    assert compare.Change(old, new, threshold=0.05).verdict == verdict


def test_threads_are_the_cpus():
    rows = [invented.row("layer", "ours", 1.0, device=device, threads=n) for device in ("cpu", "cuda") for n in (1, 2)]
    assert [len({reading.key(row) for row in pair}) for pair in (rows[:2], rows[2:])] == [2, 1]


def test_a_row_of_ours_without_a_time_is_lost(files, capsys):
    """A build that became wrong is not measured, which is no reason to call it as fast as before."""

    def wrong(new):
        row = one_row(new)
        del row["ms"]
        row["why"] = "WRONG: off by 0.5"

    with pytest.raises(SystemExit, match="1"):
        invented.run(compare, "compare", *files(wrong), "--fail")
    assert capsys.readouterr().out.splitlines()[-1].endswith("1 lost")


def test_columns(files, capsys):
    invented.run(compare, "compare", *files(scaled(1.5, share_of_limit=0.55)))
    header, *lines = capsys.readouterr().out.splitlines()
    changed = next(line for line in lines if line.endswith("slower"))
    assert header.split() == " ".join(compare.HEADER).split()
    name, numbers = changed.split()[:7], changed.split()[7:]
    assert name == ["layer", "wide-1000", "fp32", "forward", "cpu", "2", "ours"]
    assert numbers == ["100", "150", "1.500", "0.800", "0.550", "-0.250", "slower"]


def test_rows_of_one_file_are_named(files, capsys):
    def change(new):
        new["rows"].remove(one_row(new, "peer bmm"))
        new["rows"].append(invented.row("layer", "newcomer", 5.0))
        row = one_row(new, "peer loop")
        del row["ms"]
        row["why"] = "out of memory"

    invented.run(compare, "compare", *files(change))
    lines = capsys.readouterr().out.splitlines()
    assert "only in the old file: layer wide-1000 fp32 forward cpu 2 peer bmm" in lines
    assert "only in the new file: layer wide-1000 fp32 forward cpu 2 newcomer" in lines
    assert "timed only in the old file: layer wide-1000 fp32 forward cpu 2 peer loop: out of memory" in lines
    assert lines[-1].endswith("24 same, 0 once, 0 lost")


def test_other_machine_is_a_warning_another_commit_is_not(files, capsys):
    def change(new):
        new["machine"].update(cpu="Another CPU", commit="fedcba", date="2002-03-04")

    invented.run(compare, "compare", *files(change))
    warning = capsys.readouterr().out.splitlines()[0]
    assert warning.startswith("warning: ")
    assert warning.endswith("cpu Invented CPU and Another CPU")


def test_another_format_is_refused(tmp_path, capsys):
    good = invented.written(tmp_path / "good.json", invented.content())
    none = "a file that names no format"
    for content, found in (({"format": 2}, "format 2"), ({"fp32": {}}, none), ([], none)):
        bad = invented.written(tmp_path / "bad.json", content)
        with pytest.raises(SystemExit):
            invented.run(compare, "compare", good, bad)
        assert f"bad.json: expected a result file of format 1, got {found}" in capsys.readouterr().err
