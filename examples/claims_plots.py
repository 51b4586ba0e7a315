"""The pictures of paper_claims.py: accuracy against parameters, and per depth the expert load and the LayerNorms."""

import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from claims_grid import VARIANTS
from claims_training import Record
from digits_plot import BLUE, GREY, ORANGE, draw_load
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

WHAT = {"digits": "held-out digits", "text": "held-out masked pieces"}
LOADS = ("widenet", "experts-8", "top-1")
DIVERGENCES = {"widenet": BLUE, "dense": GREY, "unshared-dense": ORANGE}


def save_plots(results: list[Record], folder: pathlib.Path) -> list[pathlib.Path]:
    """Those for which there are runs."""
    tasks = list(dict.fromkeys(result["settings"]["task"] for result in results))
    variants = {result["settings"]["variant"] for result in results}
    plots = {"parameters.png": parameters_plot(results, tasks)}
    if variants & set(LOADS):
        plots["load.png"] = load_plot(results, tasks, [variant for variant in LOADS if variant in variants])
    if variants & set(DIVERGENCES):
        plots["divergence.png"] = divergence_plot(results, tasks)
    for name, figure in plots.items():
        figure.savefig(folder / name, dpi=150)
        plt.close(figure)
    return [folder / name for name in plots]


def runs_of(results: list[Record], task: str, variant: str) -> list[Record]:
    wanted = (task, variant)
    return [result for result in results if (result["settings"]["task"], result["settings"]["variant"]) == wanted]


def parameters_plot(results: list[Record], tasks: list[str]) -> plt.Figure:
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks) + 3, 5), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        draw_parameters(axis, results, task)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def draw_parameters(axes: Axes, results: list[Record], task: str) -> None:
    """One point a variant; those with as many parameters as WideNet stand side by side."""
    colors = plt.get_cmap("tab20").colors
    met: dict[int, int] = {}
    for index, (variant, (label, _)) in enumerate(VARIANTS.items()):
        runs = runs_of(results, task, variant)
        if not runs:
            continue
        parameters = runs[0]["parameters"]
        met[parameters] = met.get(parameters, -1) + 1
        accuracy = [run["history"][-1]["accuracy"] for run in runs]
        axes.errorbar(
            parameters * 1.02 ** met[parameters],
            statistics.fmean(accuracy),
            statistics.stdev(accuracy) if len(accuracy) > 1 else None,
            color=colors[index],
            marker="*" if variant == "widenet" else "o",
            markersize=13 if variant == "widenet" else 6,
            capsize=2,
            linestyle="none",
            label=label,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("trainable parameters (equal ones side by side)")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(f"{task}: accuracy on {WHAT[task]}")
    tidy(axes)


def load_plot(results: list[Record], tasks: list[str], variants: list[str]) -> plt.Figure:
    """Of the first seed alone: another one's first expert is another expert."""
    size = (5.2 * len(variants), 3.6 * len(tasks))
    figure, axes = plt.subplots(len(tasks), len(variants), figsize=size, layout="constrained", squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for axis, variant in zip(row, variants, strict=True):
            draw_load(axis, runs_of(results, task, variant)[0]["load"])
            axis.set_title(f"{task}, {VARIANTS[variant].label}: share of the choices")
            axis.tick_params(axis="x", labelrotation=45 if variant == "experts-8" else 0)
    return figure


def divergence_plot(results: list[Record], tasks: list[str]) -> plt.Figure:
    size = (10, 3.6 * len(tasks))
    figure, axes = plt.subplots(len(tasks), 2, figsize=size, layout="constrained", squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for axis, name in zip(row, ("gamma", "beta"), strict=True):
            draw_divergence(axis, results, task, name)
    axes[0][0].legend(frameon=False)
    return figure


def draw_divergence(axes: Axes, results: list[Record], task: str, name: str) -> None:
    """Mean over the seeds, and what is a standard deviation around it."""
    for variant, color in DIVERGENCES.items():
        runs = [run["divergence"][name] for run in runs_of(results, task, variant)]
        if not runs:
            continue
        depths = range(1, len(runs[0]) + 1)
        means = [statistics.fmean(values) for values in zip(*runs, strict=True)]
        spreads = [statistics.stdev(values) if len(runs) > 1 else 0.0 for values in zip(*runs, strict=True)]
        axes.plot(depths, means, color=color, marker="o", markersize=4, label=VARIANTS[variant].label)
        low, high = ([mean + side * spread for mean, spread in zip(means, spreads, strict=True)] for side in (-1, 1))
        axes.fill_between(depths, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set_title(f"{task}: divergence of the FFN LayerNorms' {name}")
    axes.set_xlabel("block")
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)


def tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
