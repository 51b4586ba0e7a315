"""The pictures of a result file, each drawn from rows of one device and dtype."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullFormatter, PercentFormatter

from .reading import Row, timed, values

# Okabe and Ito's colours (2008), which the colour-blind can tell apart
BLUE, BLACK, SKY, GREY = "#0072B2", "#000000", "#56B4E9", "#999999"
OTHERS = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", GREY)
COLORS = {"ours": (BLUE, SKY), "limit": (BLACK, GREY), "peer": OTHERS}
PASSES = ("forward", "forward+backward")
STAGES = ("route", "permute", "grouped_gemm", "combine")  # the benches that a layer is made of; one GEMM is the first
WIDTH = 8  # inches of 100 pixels: as wide as a README shows it
CAPTION = 0.22  # inches of its strip at the bottom
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # behind a text that may stand on a line


class NothingToDraw(Exception):
    """What the file lacks for this picture."""


def figure(panels: int, height: float, title: str, **options: Any) -> tuple[Figure, list[Axes]]:
    """Panels side by side, above a strip for the caption."""
    strip = CAPTION / height
    drawn = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(rect=(0, strip, 1, 1 - strip)))
    axes = drawn.subplots(1, panels, squeeze=False, **options)[0].tolist()
    drawn.suptitle(title, fontsize=11)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return drawn, axes


def legend(drawn: Figure) -> None:
    """One for all panels, below them and above the caption, each name once."""
    entries: dict[str, Any] = {}
    for axes in drawn.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    handles, labels = list(entries.values()), list(entries)
    drawn.legend(handles, labels, loc="outside lower center", borderaxespad=2, ncols=5, frameon=False, fontsize=8)


def colors(rows: list[Row]) -> dict[str, str]:
    """Of each contender: blue is ours, black the limit."""
    return {
        contender: COLORS[kind][index % len(COLORS[kind])]
        for kind in COLORS
        for index, contender in enumerate(values(timed(rows, kind=kind), "contender"))
    }


def unit(rows: list[Row]) -> tuple[float, str]:
    """What TFLOP/s are multiplied by to be read easily, and the unit's name."""
    return (1.0, "TFLOP/s") if max(row["tflops"] for row in rows) >= 1 else (1e3, "GFLOP/s")


# Roofline


class Roof(NamedTuple):
    bandwidth: float  # GB/s, as a large copy has it
    peak: float  # TFLOP/s
    by: str  # whose product that is


def roof(rows: list[Row]) -> Roof:
    """The measured copy bandwidth and the fastest measured product, torch's or ours."""
    copies = [row["gb_per_s"] for row in timed(rows, bench="ceilings") if row["gb_per_s"] and not row["flops"]]
    products = [row for row in timed(rows, kind="limit") if row["tflops"]]
    if not copies or not products:
        missing = "copy bandwidth in bench ceilings" if not copies else "product of kind limit with its FLOPs"
        raise NothingToDraw(f"no measured {missing}")
    best = max(products, key=lambda row: row["tflops"])
    return Roof(max(copies), best["tflops"], best["contender"])


def roofline(rows: list[Row]) -> Figure:
    """Every kernel of the shape that has the most of them, under the roof that was measured in the same run.

    What has no FLOPs to speak of stands beside it, under the copy bandwidth alone.
    """
    measured = roof(rows)
    kernels = [row for row in timed(rows, kind="ours") if row["bytes"]]
    shapes = values([row for row in kernels if row["flops"]], "shape")
    if not shapes:
        raise NothingToDraw("no row of ours with FLOPs and bytes")
    shape = max(shapes, key=lambda name: len(timed(kernels, shape=name)))
    kernels = timed(kernels, shape=shape)
    title = f"{shape}, {kernels[0]['dtype']}: kernels under the measured roof"
    without_flops = [row for row in kernels if not row["flops"]]
    drawn, axes = figure(1 + bool(without_flops), 4.5, title, width_ratios=(3, 1)[: 1 + bool(without_flops)])
    draw_roof(axes[0], [row for row in kernels if row["flops"]], measured)
    if without_flops:
        draw_bandwidths(axes[1], without_flops, measured.bandwidth)
    return drawn


def draw_roof(axes: Axes, kernels: list[Row], roof: Roof) -> None:
    bandwidth, peak, by = roof
    scale, name = (1.0, "TFLOP/s") if peak >= 1 else (1e3, "GFLOP/s")
    ridge = peak * 1e3 / bandwidth
    points = [(row["flops"] / row["bytes"], row["tflops"] * scale, kernel(row)) for row in kernels]
    intensities, speeds, _ = zip(*points, strict=True)
    reach = (min(*intensities, ridge) / 3, ridge, max(*intensities, ridge) * 3)
    axes.loglog(reach, [min(peak, x * bandwidth / 1e3) * scale for x in reach], color=BLACK, linewidth=1)
    axes.set_ylim(min(*speeds, peak * scale / 10) / 2, max(*speeds, peak * scale) * 2)
    shades = dict(zip(values(kernels, "bench"), (BLUE, *OTHERS, SKY), strict=False))
    for row, (x, y, label) in zip(kernels, points, strict=True):
        color = shades[row["bench"]]
        fill = color if row["pass"] == "forward" else "white"
        axes.plot(x, y, "o", color=color, markerfacecolor=fill, label=label, zorder=4)  # above the names
    label_points(axes, points)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{bandwidth:.3g} GB/s copied, {peak * scale:.3g} {name} multiplied by {by}", fontsize=9)
    axes.set_xlabel("FLOPs per byte", fontsize=9)
    axes.set_ylabel(name, fontsize=9)
    axes.grid(alpha=0.3)


def draw_bandwidths(axes: Axes, kernels: list[Row], bandwidth: float) -> None:
    axes.barh(range(len(kernels)), [row["gb_per_s"] for row in kernels], 0.3, color=SKY)
    for place, row in enumerate(kernels):
        axes.text(0, place - 0.2, kernel(row), va="bottom", fontsize=7)
    axes.axvline(bandwidth, color=BLACK, linewidth=1)
    axes.set_title("without FLOPs", fontsize=9)
    axes.set_xlabel("GB/s", fontsize=9)
    axes.set_yticks([])
    axes.invert_yaxis()


def kernel(row: Row) -> str:
    _, _, backend = row["contender"].partition(", ")  # ours is named with its backend where it is not the best one
    return f"{row['bench']}, {row['pass']}" + (f" ({backend})" if backend else "")


def label_points(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """A name beside each point, the names moved apart in height."""
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    left, right = (math.log10(limit) for limit in axes.get_xlim())
    gap, free = (high - low) / 22, -math.inf
    for x, y, text in sorted(points, key=lambda point: point[1]):
        free = max(math.log10(y), free + gap)
        on_the_right = math.log10(x) < (left + right) / 2
        axes.annotate(
            text,
            (x, y),
            xytext=(x * 1.25 if on_the_right else x / 1.25, 10**free),
            ha="left" if on_the_right else "right",
            va="center",
            fontsize=8,
            bbox=ON_WHITE,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )


# The layer against its peers


def layer_bars(rows: list[Row]) -> Figure:
    """Each contender's speed as a share of the limit's, by shape; the time stands at the bar."""
    rows = [row for row in timed(rows, bench="layer") if row["share_of_limit"] and row["kind"] != "limit"]
    shapes, passes = values(timed(rows, kind="ours"), "shape"), [p for p in PASSES if timed(rows, **{"pass": p})]
    if not shapes:
        raise NothingToDraw("no layer of ours with its share of a limit")
    shades = colors(rows)
    height = 1.6 + len(shapes) * (0.2 + 0.16 * len(shades))
    title = f"The layer, {rows[0]['dtype']}: speed as a share of the limit's ({', '.join(values(rows, 'limit'))})"
    drawn, panels = figure(len(passes), height, title, sharey=True)
    for axes, one_pass in zip(panels, passes, strict=True):
        for number, contender in enumerate(shades):
            bars = {row["shape"]: row for row in timed(rows, contender=contender, **{"pass": one_pass})}
            drawn_shapes = [shape for shape in shapes if shape in bars]
            places = [shapes.index(shape) + bar_offset(number, len(shades)) for shape in drawn_shapes]
            shares = [bars[shape]["share_of_limit"] for shape in drawn_shapes]
            container = axes.barh(places, shares, 0.8 / len(shades), color=shades[contender], label=contender)
            times = [milliseconds(bars[shape]["ms"]) for shape in drawn_shapes]
            axes.bar_label(container, times, padding=2, fontsize=7, bbox=ON_WHITE)
        axes.axvline(1, color=BLACK, linewidth=1, linestyle="--", label="the limit")
        axes.set_title(one_pass, fontsize=9)
        axes.set_xlim(0, 1.15 * max(1, *(row["share_of_limit"] for row in rows)))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[0].set_yticks(range(len(shapes)), shapes)
    panels[0].invert_yaxis()
    legend(drawn)
    return drawn


def bar_offset(number: int, bars: int) -> float:
    """Of a bar's middle from its group's."""
    return 0.8 * ((number + 0.5) / bars - 0.5)


def milliseconds(ms: float) -> str:
    return f"{ms * 1e3:.3g} us" if ms < 1 else f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


# Time by stage


def stage_bars(rows: list[Row]) -> Figure:
    """The layer's time as the benches of its stages split it."""
    bars, ends = {}, {}
    for shape in values(rows, "shape"):
        for one_pass in PASSES:
            found: dict[str, float] = {}  # what the layer uses: the first of ours in each bench
            for row in timed(rows, kind="ours", shape=shape, **{"pass": one_pass}):
                found.setdefault(row["bench"], row["ms"])
            if {"layer", "route", "grouped_gemm"} <= found.keys():
                name = f"{shape}\n{one_pass}"
                bars[name], ends[name] = split(found)
    if not bars:
        raise NothingToDraw("no shape with the layer, route and grouped_gemm")
    title = f"Time by stage, {rows[0]['dtype']}: from the benches of the stages, each run by itself"
    return stacked(bars, ends, title)


def split(found: Mapping[str, float]) -> tuple[dict[str, float], str]:
    """{stage: ms} of a layer, and its own time: by themselves the stages may take longer than in it."""
    layer, stages = found["layer"], {name: found[name] for name in STAGES if name in found}
    alone = sum(stages.values())
    if alone > layer:
        return stages, f"layer {milliseconds(layer)},\nthese {milliseconds(alone)}"
    return stages | {"the rest": layer - alone}, milliseconds(layer)


def profile_bars(profile: dict[str, Any]) -> Figure:
    """The stages of a profile: the layer by its public ops, and with the fused one."""
    bars: dict[str, dict[str, float]] = {}
    for stage in profile["stages"]:
        bars.setdefault(f"{stage['composition']}\n{stage['pass']}", {})[stage["stage"]] = stage["ms"]
    ends = {name: milliseconds(sum(bar.values())) for name, bar in bars.items()}
    return stacked(bars, ends, f"Time by stage, {profile['shape']}, {profile['dtype']}: from a profile of the layer")


def stacked(bars: Mapping[str, Mapping[str, float]], ends: Mapping[str, str], title: str) -> Figure:
    """Bars {name: {stage: ms}} as shares of each bar's sum; ``ends``: what stands at the end of each."""
    stages = list(dict.fromkeys(stage for bar in bars.values() for stage in bar))
    drawn, (axes,) = figure(1, 1.4 + 0.5 * len(bars), title)
    totals = [sum(bar.values()) for bar in bars.values()]
    begin = [0.0] * len(bars)
    for stage, color in zip(stages, (BLUE, *OTHERS, SKY), strict=False):
        times = [bar.get(stage, 0.0) for bar in bars.values()]
        widths = [ms / total for ms, total in zip(times, totals, strict=True)]
        container = axes.barh(range(len(bars)), widths, 0.7, left=begin, color=color, label=stage)
        texts = [milliseconds(ms) if width > 0.08 else "" for ms, width in zip(times, widths, strict=True)]
        axes.bar_label(container, texts, label_type="center", fontsize=7, color="white" if color == BLUE else BLACK)
        begin = [left + width for left, width in zip(begin, widths, strict=True)]
    for place, name in enumerate(bars):
        axes.text(1.01, place, ends[name], va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_xlim(0, 1.1)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend(drawn)
    return drawn


# Scaling


def scaling(rows: list[Row], axis: str) -> Figure:
    """Speed over T, E or threads, everything else the same."""
    rows = longest_series([row for row in timed(rows, bench="layer") if row["tflops"]], axis)
    scale, name = unit(rows)
    shades = colors(rows)
    passes = [one_pass for one_pass in PASSES if timed(rows, **{"pass": one_pass})]
    title = f"The layer over {axis}, {rows[0]['dtype']}\n{describe(rows[0]['dims'], axis)}"
    drawn, panels = figure(len(passes), 3.8, title, sharey=True)
    for axes, one_pass in zip(panels, passes, strict=True):
        for contender, color in shades.items():
            line = timed(rows, contender=contender, **{"pass": one_pass})
            if not line:
                continue
            line.sort(key=lambda row: position(row, axis))
            style = "--" if line[0]["kind"] == "limit" else "-"
            speeds = [row["tflops"] * scale for row in line]
            axes.plot(positions(line, axis), speeds, style, marker="o", markersize=3, color=color, label=contender)
        axes.set_xscale("log", base=2)
        ticks = sorted(set(positions(rows, axis)))
        axes.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
        axes.minorticks_off()
        axes.set_title(one_pass, fontsize=9)
        axes.set_xlabel(axis, fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0)  # of all, and when all is drawn: the top stays where it is then
    panels[0].set_ylabel(name, fontsize=9)
    legend(drawn)
    return drawn


def position(row: Row, axis: str) -> int:
    return row["threads"] if axis == "threads" else row["dims"][axis]


def positions(rows: Iterable[Row], axis: str) -> list[int]:
    return [position(row, axis) for row in rows]


def longest_series(rows: list[Row], axis: str) -> list[Row]:
    """Of the rows that differ in this alone, those that have the most values of it, then those with the most work."""
    series: dict[tuple, list[Row]] = {}
    for row in rows:
        fixed = row["dims"] | {"threads": row["threads"]} | {axis: None}
        series.setdefault(tuple(fixed.items()), []).append(row)

    def size(some: list[Row]) -> tuple[int, float]:
        return len(set(positions(some, axis))), max(row["flops"] for row in some)

    longest = max(series.values(), key=size, default=[])
    if len(set(positions(longest, axis))) < 2:
        raise NothingToDraw(f"no two layers that differ in {axis} alone")
    return longest


def describe(dims: dict[str, Any], axis: str) -> str:
    names = [f"{name} {dims[name]}" for name in ("T", "D", "F", "E", "K") if name != axis]
    capacity = "dropless" if dims["capacity_factor"] is None else f"capacity factor {dims['capacity_factor']}"
    return ", ".join([*names, capacity, dims["activation"], dims["routing"]])


PICTURES: dict[str, Callable[[list[Row]], Figure]] = {
    "roofline": roofline,
    "layer": layer_bars,
    "stages": stage_bars,
    **{f"scaling-{axis}": functools.partial(scaling, axis=axis) for axis in ("T", "E", "threads")},
}
