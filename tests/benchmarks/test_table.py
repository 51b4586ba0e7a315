"""bench table on an invented file, and the README's own table against the newest committed file."""

import re
from pathlib import Path

import invented
import pytest

from widenet_kernels.benchmarks import reading, table

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


def test_newest_is_the_latest_date_of_this_format(tmp_path):
    assert reading.newest(tmp_path, "cpu") is None
    for name, date, number in (("b", "2001-02-03", 1), ("a", "2002-01-01", 1), ("c", "2003-01-01", 2)):
        content = invented.content()
        content["machine"]["date"], content["format"] = date, number
        invented.written(tmp_path / f"{name}.json", content)
    assert reading.newest(tmp_path, "cpu") == tmp_path / "a.json"
    assert reading.newest(tmp_path, "cuda") is None


@pytest.mark.parametrize("of", ["cpu", "cuda"])
def test_the_readme_has_the_table_of_the_newest_committed_file(of):
    newest = reading.newest(COMMITTED, of)
    assert table.between_markers(README, of) == table.render(reading.load(newest), of, ROOT)


def test_the_pictures_of_the_readme_are_committed():
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert [place for place in shown if (ROOT / place).parent != COMMITTED or not (ROOT / place).is_file()] == []
