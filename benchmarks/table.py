"""The Markdown table of the layer, for the README: ours, its share of the limit, and the best peer."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from .reading import Results, Row, as_argument, at_full_width, device_name, load, software, timed, values
from .timing import LEAST_ROUNDS

MEMORY = "peak memory (least peer)"
HEADER = ("shape", "dtype", "pass", "ours", "GFLOP/s", "limit", "of its speed", "best peer", "times as fast", MEMORY)


def devices(results: Results) -> list[str]:
    """Those that the layer was timed on."""
    return values(timed(at_full_width(results), bench="layer"), "device")


def render(results: Results, device: str, folder: Path) -> str:
    """The machine, the table (of a CPU at the machine's number of threads), and the layer's pictures.

    folder: of the Markdown file, which the pictures' places are relative to.
    """
    rows = timed(at_full_width(results), bench="layer")
    lines = [line(row, rows) for row in timed(rows, device=device, kind="ours")]
    where = device_name(results.machine, device)
    parts = [f"{where}: {software(results.machine)}.", "\n".join([*head(), *lines])]
    parts += [f"![{alt}]({place})" for alt, place in pictures(results.path, device, folder)]
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
        f"{number(ours['ms'])} ms {spread(ours)}",
        "-" if ours["tflops"] is None else number(ours["tflops"] * 1e3),
        ours["limit"] or "-",
        number(ours["share_of_limit"]),
        f"{best['contender']}, {number(best['ms'])} ms" if best else "-",
        number(ours["ratio_to_best_peer"]),
        mebibytes(ours["peak_mib"]) + (f" ({mebibytes(min(memories))})" if memories else ""),
    )
    return f"| {' | '.join(cells)} |"


def spread(row: Row) -> str:
    """Half the distance of the quartiles, and how often it was measured where that was not often enough."""
    if row["rounds"] == 1:
        return "(called once)"
    rounds = f" ({row['rounds']} rounds)" if row["rounds"] < LEAST_ROUNDS else ""
    return f"± {number(row['spread_ms'] / 2)}{rounds}"


def mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} MiB"


def number(value: float | None) -> str:
    """Three digits, as many before the point as there are."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def pictures(path: Path, device: str, folder: Path) -> list[tuple[str, str]]:
    """What each picture of the layer and each roofline beside the result file is, and its place from the folder."""
    kinds = (f"{path.stem}-{kind}-{device}-*" for kind in ("layer", "roofline"))
    found = [picture for kind in kinds for picture in sorted(path.parent.glob(kind))]
    names = [picture.stem.removeprefix(f"{path.stem}-").replace("-", " ") for picture in found]
    return list(zip(names, (Path(os.path.relpath(picture, folder)).as_posix() for picture in found), strict=True))


def markers(device: str) -> tuple[str, str]:
    return f"<!-- bench {device} -->", f"<!-- /bench {device} -->"


def between_markers(text: str, device: str) -> str:
    """What stands between the device's markers, without the blank lines around it."""
    begin, end = markers(device)
    found = re.findall(f"{begin}\n(.*?){end}", text, flags=re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"expected {begin} and {end} once, each on a line of its own, got them {len(found)} times")
    return found[0].strip()


def replaced(text: str, device: str, content: str) -> str:
    between_markers(text, device)
    begin, end = markers(device)
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def run(options: argparse.Namespace) -> None:
    place = options.write
    folder = Path.cwd() if place is None else place.resolve().parent
    tables: dict[str, list[str]] = {}
    for results in options.results:
        if not devices(results):
            sys.exit(f"bench table: {results.path} has no time of the layer")
        for device in devices(results):
            tables.setdefault(device, []).append(render(results, device, folder))
    contents = {device: "\n\n".join(parts) for device, parts in tables.items()}
    if place is None:
        print("\n\n".join(contents.values()))
        return
    text = place.read_text()
    for device, content in contents.items():
        try:
            text = replaced(text, device, content)
        except ValueError as error:
            sys.exit(f"bench table: {place}: {error}")
    place.write_text(text)


def markdown(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is no file")
    return path


def add_command(commands: Any) -> None:
    parser = commands.add_parser("table", help="the layer's Markdown table", description=__doc__)
    about = "several of one device: one table after the other"
    parser.add_argument("results", nargs="+", type=as_argument(load), metavar="FILE.json", help=about)
    about = "put it between {} and {} there, or cuda's, instead of printing it".format(*markers("cpu"))
    parser.add_argument("--write", type=markdown, metavar="README.md", help=about)
    parser.set_defaults(run=run)
