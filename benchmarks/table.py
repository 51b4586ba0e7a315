"""The Markdown table of the layer, for the README: ours, its share of the limit, and the best peer."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from .reading import Results, Row, as_argument, at_full_width, device_name, load, software, timed, values

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
MEMORY = "peak memory (least peer)"
HEADER = ("shape", "dtype", "pass", "ours", "GFLOP/s", "limit", "of its speed", "best peer", "times as fast", MEMORY)


def render(results: Results, folder: Path) -> str:
    """The machine, a table for each device (a CPU at the machine's number of threads), and the layer's pictures.

    folder: of the Markdown file, which the pictures' places are relative to.
    """
    rows = timed(at_full_width(results), bench="layer")
    parts = []
    for device in values(rows, "device"):
        lines = [line(row, rows) for row in timed(rows, device=device, kind="ours")]
        where = device_name(results.machine, device)
        parts += [f"{where}: {software(results.machine)}.", "\n".join([*head(), *lines])]
    parts += [f"![{alt}]({place})" for alt, place in pictures(results.path, folder)]
    return "\n\n".join(parts)


def head() -> list[str]:
    return [f"| {' | '.join(HEADER)} |", f"|{' --- |' * len(HEADER)}"]


def line(ours: Row, rows: list[Row]) -> str:
    """One of our rows, with the best of the peers that were timed in the same setting."""
    setting = {name: ours[name] for name in ("shape", "dtype", "pass", "device", "threads")}
    peers = timed(rows, kind="peer", **setting)
    best = min(peers, key=lambda row: row["ms"], default=None)
    memories = [row["peak_mib"] for row in peers if row["peak_mib"] is not None]
    cells = (
        ours["shape"],
        ours["dtype"],
        ours["pass"],
        f"{number(ours['ms'])} ms ± {number(ours['spread_ms'] / 2)}",
        "-" if ours["tflops"] is None else number(ours["tflops"] * 1e3),
        ours["limit"] or "-",
        number(ours["share_of_limit"]),
        f"{best['contender']}, {number(best['ms'])} ms" if best else "-",
        number(ours["ratio_to_best_peer"]),
        mebibytes(ours["peak_mib"]) + (f" ({mebibytes(min(memories))})" if memories else ""),
    )
    return f"| {' | '.join(cells)} |"


def mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} MiB"


def number(value: float | None) -> str:
    """Three digits, as many before the point as there are."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def pictures(path: Path, folder: Path) -> list[tuple[str, str]]:
    """What each picture of the layer and each roofline beside the result file is, and its place from the folder."""
    found = [picture for kind in ("layer", "roofline") for picture in sorted(path.parent.glob(f"{path.stem}-{kind}-*"))]
    names = [picture.stem.removeprefix(f"{path.stem}-").replace("-", " ") for picture in found]
    return list(zip(names, (Path(os.path.relpath(picture, folder)).as_posix() for picture in found), strict=True))


def between_markers(text: str) -> str:
    """What stands between the markers, without the blank lines around it."""
    found = re.findall(f"{BEGIN}\n(.*?){END}", text, flags=re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"expected {BEGIN} and {END} once, each on a line of its own, got them {len(found)} times")
    return found[0].strip()


def replaced(text: str, content: str) -> str:
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def with_markers(path: Path) -> Path:
    """A Markdown file that has a place for the table, or ValueError."""
    between_markers(path.read_text())
    return path


def run(options: argparse.Namespace) -> None:
    if not timed(at_full_width(options.results), bench="layer"):
        sys.exit(f"bench table: {options.results.path} has no time of the layer")
    if options.write is None:
        print(render(options.results, Path.cwd()))
    else:
        text = options.write.read_text()
        options.write.write_text(replaced(text, render(options.results, options.write.resolve().parent)))


def add_command(commands: Any) -> None:
    parser = commands.add_parser("table", help="the layer's Markdown table", description=__doc__)
    parser.add_argument("results", type=as_argument(load), metavar="FILE.json")
    about = f"put it between {BEGIN} and {END} there instead of printing it"
    parser.add_argument("--write", type=as_argument(with_markers), metavar="README.md", help=about)
    parser.set_defaults(run=run)
