"""bench table on an invented file, and the README's own tables against the newest committed files."""

import re
from pathlib import Path

import invented
import pytest

from widenet_kernels.benchmarks import reading, table
from widenet_kernels.benchmarks.timing import LEAST_ROUNDS

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()


@pytest.fixture
def results(tmp_path):
    return reading.load(invented.written(tmp_path / "result.json", invented.content()))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rows(results, tmp_path):
    title, _, header, _, *lines = table.render(results, "cpu", tmp_path).splitlines()
    assert title == ("Invented CPU (avx2), 2 threads: torch 2.13.0, widenet_kernels 0.1.0 at 0123456, 2001-02-03.")
    # 80 ms is the limit's, ours has 0.8 of its speed, the loop 0.5; 8 * 1000 * 100 * 200 operations in 100 ms
    rows = [dict(zip(cells(header), cells(line), strict=True)) for line in lines]
    assert rows[0] == {
        "shape": "wide-1000",
        "dtype": "fp32",
        "pass": "forward",
        "ours": "100 ms ± 1.00",
        "GFLOP/s": "1.60",
        "limit": "gemms",
        "of its speed": "0.800",
        "best peer": "peer loop, 160 ms",
        "times as fast": "1.60",
        "peak memory (least peer)": "12 MiB (20 MiB)",
    }
    # not the row of one thread: the machine's number is two
    assert [(row["shape"], row["pass"]) for row in rows] == [
        ("wide-1000", "forward"),
        ("wide-1000", "forward+backward"),
        ("wide-2000", "forward"),
        ("wide-e8", "forward"),
    ]


def test_what_was_not_measured_is_a_dash(tmp_path):
    content = invented.content()
    content["rows"] = [invented.row("layer", "ours", 3.0)]
    results = reading.load(invented.written(tmp_path / "result.json", content))
    *_, line = table.render(results, "cpu", tmp_path).splitlines()
    assert cells(line)[3:] == ["3.00 ms ± 0.0300", "-", "-", "-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("rounds", "shown"), [(1, "(called once)"), (3, "± 0.0300 (3 rounds)"), (LEAST_ROUNDS, "± 0.0300")]
)
def test_how_often_is_said_where_it_was_not_often_enough(tmp_path, rounds, shown):
    content = invented.content()
    content["rows"] = [invented.row("layer", "ours", 3.0) | {"rounds": rounds}]
    results = reading.load(invented.written(tmp_path / "result.json", content))
    *_, line = table.render(results, "cpu", tmp_path).splitlines()
    assert cells(line)[3] == f"3.00 ms {shown}"


def test_a_checkout_with_changes_is_not_its_commit():
    machine = invented.content()["machine"] | {"commit": "0123456789abcdef-dirty"}
    assert "at 0123456-dirty," in reading.software(machine)


def test_pictures_beside_the_file_are_shown(results, tmp_path):
    for name in ("result-roofline-cpu-fp32.png", "result-layer-cpu-fp32.png", "result-scaling-T-cpu-fp32.png"):
        (tmp_path / name).touch()
    *_, layer, _, roofline = table.render(results, "cpu", tmp_path.parent).splitlines()
    assert layer == f"![layer cpu fp32]({tmp_path.name}/result-layer-cpu-fp32.png)"
    assert roofline == f"![roofline cpu fp32]({tmp_path.name}/result-roofline-cpu-fp32.png)"


def test_write_replaces_what_is_between_the_markers(results, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench cpu -->\nan old table\n<!-- /bench cpu -->\nafter\n")
    for _ in range(2):  # the second time nothing changes
        invented.run(table, "table", results.path, "--write", readme)
        expected = table.render(results, "cpu", tmp_path)
        assert readme.read_text() == f"before\n<!-- bench cpu -->\n\n{expected}\n\n<!-- /bench cpu -->\nafter\n"
    assert capsys.readouterr().out == ""
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="expected <!-- bench cpu --> and <!-- /bench cpu --> once"):
        invented.run(table, "table", results.path, "--write", readme)
    assert readme.read_text() == "no markers"


def test_a_file_without_a_time_is_no_table(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench cpu -->\nthe table\n<!-- /bench cpu -->\n")
    path = invented.written(tmp_path / "empty.json", invented.content() | {"rows": []})
    with pytest.raises(SystemExit, match=r"empty\.json has no time of the layer"):
        invented.run(table, "table", path, "--write", readme)
    assert "the table" in readme.read_text()


def dated(path, date, number=reading.FORMAT, **machine):
    content = invented.content()
    content["machine"] |= {"date": date} | machine
    content["format"] = number
    if "gpu" in machine:
        for row in content["rows"]:
            row["device"] = "cuda"
    return invented.written(path, content)


def test_newest_is_the_latest_date_of_this_format(tmp_path):
    assert reading.newest(tmp_path, "cpu") == []
    for name, date, number in (("b", "2001-02-03", 1), ("a", "2002-01-01", 1), ("c", "2003-01-01", 2)):
        dated(tmp_path / f"{name}.json", date, number)
    assert reading.newest(tmp_path, "cpu") == [tmp_path / "a.json"]
    assert reading.newest(tmp_path, "cuda") == []


def test_newest_for_every_glibc_tunables(tmp_path):
    """Memory that stays with the process makes other times: a table of its own, which says so."""
    for name, date, tunables in (("a", "2001-01-01", "x=1"), ("b", "2003-01-01", None), ("c", "2002-01-01", "x=1")):
        dated(tmp_path / f"{name}.json", date, glibc_tunables=tunables)
    dated(tmp_path / "d.json", "2001-01-01")  # from before this was noted
    newest = reading.newest(tmp_path, "cpu")
    assert newest == [tmp_path / "b.json", tmp_path / "c.json"]
    titles = [table.render(reading.load(path), "cpu", tmp_path).splitlines()[0] for path in newest]
    assert titles[0].endswith(", 2003-01-01.")
    assert titles[1].endswith(", 2002-01-01, GLIBC_TUNABLES=x=1.")


def test_newest_of_every_gpu(tmp_path):
    for name, date, gpu in (("a", "2001-01-01", "X"), ("b", "2003-01-01", "Y"), ("c", "2002-01-01", "X")):
        dated(tmp_path / f"{name}.json", date, gpu=gpu)
    assert reading.newest(tmp_path, "cuda") == [tmp_path / "b.json", tmp_path / "c.json"]


def test_several_files_are_one_table_after_the_other(tmp_path):
    paths = [dated(tmp_path / f"{gpu}.json", "2001-01-01", gpu=gpu) for gpu in ("X", "Y")]
    readme = tmp_path / "README.md"
    readme.write_text("<!-- bench cuda -->\n<!-- /bench cuda -->\n")
    invented.run(table, "table", *paths, "--write", readme)
    expected = [table.render(reading.load(path), "cuda", tmp_path) for path in paths]
    assert table.between_markers(readme.read_text(), "cuda") == "\n\n".join(expected)
    assert expected[0].startswith("X: ")
    assert expected[1].startswith("Y: ")


@pytest.mark.parametrize("of", ["cpu", "cuda"])
def test_the_readme_has_the_tables_of_the_newest_committed_files(of):
    newest = [table.render(reading.load(path), of, ROOT) for path in reading.newest(COMMITTED, of)]
    assert newest
    assert table.between_markers(README, of) == "\n\n".join(newest)


def test_the_pictures_of_the_readme_are_committed():
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert [place for place in shown if (ROOT / place).parent != COMMITTED or not (ROOT / place).is_file()] == []
