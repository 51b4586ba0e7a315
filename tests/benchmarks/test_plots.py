"""bench plot: what the axes of each picture hold, for an invented file."""

import invented
import pytest

pytest.importorskip("matplotlib", reason="draws the pictures")

from widenet_kernels.benchmarks import figures, plots, reading

FORWARD = {"pass": "forward"}


@pytest.fixture
def rows(tmp_path):
    results = reading.load(invented.written(tmp_path / "result.json", invented.content()))
    return reading.at_full_width(results)


@pytest.fixture
def all_rows():
    return reading.timed(invented.content()["rows"])


def lines(axes):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def bars(axes):
    """{label: (widths, texts at the bars)}"""
    return {container.get_label(): [bar.get_width() for bar in container] for container in axes.containers}


def test_roofline(rows):
    axes, _ = figures.roofline(rows).axes
    # copied: 4e7 bytes in 2 ms; multiplied: 3e7 operations in 10 ms, the most of any limit
    roof, *points = axes.lines
    assert axes.get_title() == "20 GB/s copied, 3 GFLOP/s multiplied by gemm"
    xs, ys = roof.get_data()
    assert xs[1] == pytest.approx(3 / 20)  # the ridge
    assert ys[1:] == pytest.approx([3, 3])
    assert ys[0] == pytest.approx(20 * xs[0])
    found = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in points}
    assert found == {
        "layer, forward": pytest.approx((1.6e8 / 4e6, 1.6)),  # in 100 ms
        "layer, forward+backward": pytest.approx((1.6e8 / 4e6, 1.6 / 3)),
        "route, forward": pytest.approx((8e5 / 5e5, 0.8)),
        "grouped_gemm, forward": pytest.approx((1.6e8 / 2e6, 4.0)),
        "combine, forward": pytest.approx((2e5 / 1.2e7, 0.2 / 3)),
    }
    assert {text.get_text() for text in axes.texts} == set(found)


def test_kernels_without_flops_stand_beside_the_roof(rows):
    _, beside = figures.roofline([*rows, invented.row("permute", "ours, triton", 3.0, bytes=1.2e7)]).axes
    assert [text.get_text() for text in beside.texts] == ["permute, forward", "permute, forward (triton)"]
    assert [bar.get_width() for bar in beside.containers[0]] == pytest.approx([6, 4])  # 1.2e7 bytes in 2 and 3 ms
    assert list(beside.lines[0].get_xdata()) == [20, 20]
    without = [row for row in rows if row["bench"] != "permute"]
    assert len(figures.roofline(without).axes) == 1


def test_layer_bars(rows):
    drawn = figures.layer_bars(rows)
    forward, both = drawn.axes
    assert [label.get_text() for label in forward.get_yticklabels()] == ["wide-1000", "wide-2000", "wide-e8"]
    assert bars(forward) == {"ours": [0.8] * 3, "peer loop": [0.5] * 3, "peer bmm": [0.4] * 3}
    assert bars(both) == {"ours": [0.8], "peer loop": [0.5], "peer bmm": [0.4]}
    assert lines(forward)["the limit"][0] == [1, 1]
    assert [text.get_text() for text in forward.texts][:3] == ["100 ms", "200 ms", "150 ms"]
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["the limit", *bars(forward)]
    assert all(text.get_bbox_patch().get_facecolor() == (1, 1, 1, 1) for text in forward.texts)  # over the dashed line
    middles = [bar.get_y() + bar.get_height() / 2 for bar in forward.containers[1]]
    assert middles == pytest.approx([0, 1, 2])  # the second of three bars stands on the tick


def test_stage_bars(rows):
    (axes,) = figures.stage_bars(rows).axes
    shares = {label: widths[0] for label, widths in bars(axes).items()}
    measured = {"route": 0.01, "permute": 0.02, "grouped_gemm": 0.4, "combine": 0.03, "the rest": 0.54}
    assert shares == pytest.approx(measured)  # of the layer's 100 ms
    assert [label.get_text() for label in axes.get_yticklabels()] == ["wide-1000\nforward"]
    assert "benches of the stages" in axes.figure.get_suptitle()
    assert "100 ms" in [text.get_text() for text in axes.texts]


def test_stages_that_take_longer_than_the_layer(rows):
    slow = invented.row("combine", "ours", 63.0)
    (axes,) = figures.stage_bars([slow if row["bench"] == "combine" else row for row in rows]).axes
    assert "the rest" not in bars(axes)
    assert [text.get_text() for text in axes.texts][-1] == "layer 100 ms,\nthese 106 ms"


def profile():
    """Invented, as bench profile writes it."""
    times = {"composed": {"route": 1.0, "permute": 3.0}, "fused": {"route": 1.0, "moe_ffn": 2.0}}
    stages = [
        {"composition": composition, "stage": stage, "pass": "forward", "ms": ms}
        for composition, split in times.items()
        for stage, ms in split.items()
    ]
    about = {"profile": 1, "machine": invented.MACHINE, "shape": "wide-1000", "dtype": "fp32", "device": "cpu"}
    return about | {"stages": stages}


def test_profile_bars():
    (axes,) = figures.profile_bars(profile()).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["composed\nforward", "fused\nforward"]
    assert bars(axes) == {
        "route": pytest.approx([0.25, 1 / 3]),
        "permute": pytest.approx([0.75, 0]),
        "moe_ffn": pytest.approx([0, 2 / 3]),
    }
    assert "from a profile" in axes.figure.get_suptitle()


@pytest.mark.parametrize(
    ("axis", "positions", "ours"), [("T", [1000, 2000], [1.6, 1.6]), ("E", [4, 8], [1.6, 1.6 / 1.5])]
)
def test_scaling(rows, axis, positions, ours):
    forward, both = figures.scaling(rows, axis).axes
    found = lines(forward)
    assert list(found) == ["ours", "gemms", "peer loop", "peer bmm"]
    assert found["ours"] == (positions, pytest.approx(ours))
    assert found["gemms"] == (positions, pytest.approx([speed / 0.8 for speed in ours]))
    assert lines(both)["ours"] == (positions[:1], pytest.approx([1.6 / 3]))
    assert forward.get_ylabel() == "GFLOP/s"
    assert forward.get_xlabel() == axis


def test_the_axis_of_scaling_holds_every_panel(rows):
    for row in rows:
        if row["pass"] == "forward+backward":
            row["tflops"] *= 100
    forward, both = figures.scaling(rows, "T").axes
    assert forward.get_ylim() == both.get_ylim()
    assert forward.get_ylim()[0] == 0
    assert forward.get_ylim()[1] > max(max(speeds) for _, speeds in lines(both).values())


def test_of_equally_long_series_the_one_with_more_work_is_drawn(rows):
    small = [row | {"dims": row["dims"] | {"D": 10}, "flops": row["flops"] / 10} for row in rows if row["flops"]]
    for order in (small + rows, rows + small):
        forward, _ = figures.scaling(order, "T").axes
        assert "D 100," in forward.figure.get_suptitle()


def test_scaling_over_threads_is_in_order(all_rows):
    forward, _ = figures.scaling(all_rows, "threads").axes
    assert lines(forward)["ours"] == ([1, 2], pytest.approx([0.8, 1.6]))


def test_files(tmp_path, capsys):
    path = invented.written(tmp_path / "result.json", invented.content())
    profiled = invented.written(tmp_path / "profile.json", profile())
    invented.run(plots, "plot", path, "--out", tmp_path / "pictures", "--profile", profiled)
    names = ("roofline", "layer", "stages", "scaling-T", "scaling-E", "scaling-threads")
    expected = {f"result-{name}-cpu-fp32.png" for name in names} | {"profile.png"}
    assert {picture.name for picture in (tmp_path / "pictures").iterdir()} == expected
    assert "not drawn" not in capsys.readouterr().out


def test_what_is_no_profile_is_refused(tmp_path, capsys):
    path = invented.written(tmp_path / "result.json", invented.content())
    with pytest.raises(SystemExit):
        invented.run(plots, "plot", path, "--profile", path)
    assert "result.json: expected what bench profile --json writes" in capsys.readouterr().err


def test_captions(tmp_path, monkeypatch):
    captions = []
    monkeypatch.setattr(plots, "save", lambda picture, path, caption: captions.append(caption))
    invented.run(plots, "plot", invented.written(tmp_path / "result.json", invented.content()))
    caption = "Invented CPU (avx2), 2 threads; torch 2.13.0, widenet_kernels 0.1.0 at 0123456, 2001-02-03"
    assert captions == [caption] * 6


def test_a_picture_without_rows_is_not_drawn_and_says_so(tmp_path, capsys):
    content = invented.content()
    content["rows"] = [row for row in content["rows"] if row["bench"] == "layer" and row["shape"] == "wide-1000"]
    path = invented.written(tmp_path / "result.json", content)
    invented.run(plots, "plot", path)
    drawn = {picture.name for picture in tmp_path.glob("*.png")}
    assert drawn == {"result-layer-cpu-fp32.png", "result-scaling-threads-cpu-fp32.png"}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not drawn")]
    assert lines == [
        "not drawn: roofline, cpu, fp32: no measured copy bandwidth in bench ceilings",
        "not drawn: stages, cpu, fp32: no shape with the layer, route and grouped_gemm",
        "not drawn: scaling-T, cpu, fp32: no two layers that differ in T alone",
        "not drawn: scaling-E, cpu, fp32: no two layers that differ in E alone",
    ]


def test_a_file_without_a_time_is_no_picture(tmp_path):
    path = invented.written(tmp_path / "empty.json", invented.content() | {"rows": []})
    with pytest.raises(SystemExit, match=r"empty\.json has no time$"):
        invented.run(plots, "plot", path)


def test_chosen_shapes(tmp_path, capsys):
    path = invented.written(tmp_path / "result.json", invented.content())
    invented.run(plots, "plot", path, "--shape", "wide-2000")
    assert "no two layers that differ in T" in capsys.readouterr().out
