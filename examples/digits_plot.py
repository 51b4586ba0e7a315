"""The picture of a training run: learning curves, and the load of each expert at each depth."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, MultipleLocator, PercentFormatter

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"


def save_plot(history: list[dict[str, Any]], target: float, path: pathlib.Path) -> None:
    """Three panels: loss, accuracy, and the experts' load after the last epoch (left out for a dense network)."""
    load = history[-1]["load"]
    panels = 2 if load is None else 3
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 4), layout="constrained")
    epochs = range(1, len(history) + 1)
    draw_loss(axes[0], epochs, history)
    draw_accuracy(axes[1], epochs, history, target)
    if load is not None:
        draw_load(axes[2], load)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_loss(axes: Axes, epochs: range, history: list[dict[str, Any]]) -> None:
    axes.plot(epochs, [record["loss"] for record in history], color=BLUE, marker="o", markersize=3)
    axes.set_title("Training loss")
    tidy(axes)


def draw_accuracy(axes: Axes, epochs: range, history: list[dict[str, Any]], target: float) -> None:
    curves = (("train_accuracy", ORANGE, "training (warped, with dropout)"), ("accuracy", BLUE, "held out"))
    for key, color, label in curves:
        axes.plot(epochs, [record[key] for record in history], color=color, marker="o", markersize=3, label=label)
    axes.axhline(target, color=GREY, linestyle="--", linewidth=1, label=f"target {target:.0%}")
    if history[-1]["accuracy"] > 0.9:  # the last percents are of interest, not the way to them
        axes.set_ylim(0.8, 1.005)
        axes.yaxis.set_major_locator(MultipleLocator(0.05))
    axes.set_title(f"Accuracy: {history[-1]['accuracy']:.1%} of the held-out digits")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="lower right", frameon=False)
    tidy(axes)


def draw_load(axes: Axes, load: list[list[float]]) -> None:
    """Share of the choices that ask for each expert; rows are depths, the first block on top."""
    depths, experts = len(load), len(load[0])
    even = 1 / experts
    image = axes.imshow(load, cmap="RdBu_r", vmin=0, vmax=2 * even, aspect="auto")  # white: an even share
    for depth, shares in enumerate(load):
        for expert, share in enumerate(shares):
            color = "white" if abs(share - even) > 0.65 * even else "black"
            axes.text(expert, depth, f"{share:.0%}", ha="center", va="center", color=color)
    axes.set_xticks(range(experts), [f"expert {index + 1}" for index in range(experts)])
    axes.set_yticks(range(depths), [f"block {index + 1}" for index in range(depths)])
    axes.tick_params(length=0)
    axes.set_title("Share of the choices asking for each expert")
    bar = axes.figure.colorbar(image, ax=axes, format=PercentFormatter(1, decimals=0), ticks=[0, even, 2 * even])
    bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)


def tidy(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
