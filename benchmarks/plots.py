"""The pictures of a result file: roofline, the layer against its peers, time by stage, scaling."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments
from .reading import Results, as_argument, at_full_width, device_name, load, load_profile, software, timed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200  # twice the pixels that a README shows


def draw_results(results: Results, folder: Path) -> None:
    """Every picture for each device and dtype, or a line that says what the file lacks for it."""
    from .figures import PICTURES, NothingToDraw

    for device, dtype in dict.fromkeys((row["device"], row["dtype"]) for row in timed(results.rows)):
        rows = timed(results.rows, device=device, dtype=dtype)
        full_width = at_full_width(results._replace(rows=rows))
        caption = f"{device_name(results.machine, device)}; {software(results.machine)}"
        for name, draw in PICTURES.items():
            try:
                picture = draw(rows if name == "scaling-threads" else full_width)
            except NothingToDraw as reason:
                print(f"not drawn: {name}, {device}, {dtype}: {reason}")
                continue
            save(picture, folder / f"{results.path.stem}-{name}-{device}-{dtype}.png", caption)


def draw_profile(path: Path, profile: dict[str, Any], folder: Path) -> None:
    from .figures import profile_bars

    caption = f"{device_name(profile['machine'], profile['device'])}; {software(profile['machine'])}"
    save(profile_bars(profile), folder / f"{path.stem}.png", caption)


def save(picture: "Figure", path: Path, caption: str) -> None:
    picture.text(0.01, 0.01, caption, fontsize=7, color="#555555")
    picture.savefig(path, dpi=DPI)
    print(path)


def run(options: argparse.Namespace) -> None:
    results = options.results
    if options.shape:
        kept = [row for row in results.rows if row["shape"] in options.shape or row["bench"] == "ceilings"]
        results = results._replace(rows=kept)
    if not timed(results.rows):
        raise SystemExit(f"bench plot: {results.path} has no time{' of these shapes' if options.shape else ''}")
    folder = options.out or results.path.parent
    try:
        draw_results(results, folder)
    except ModuleNotFoundError as error:
        raise SystemExit("bench plot: needs matplotlib: pip install matplotlib") from error
    if options.profile:
        path, profile = options.profile
        draw_profile(path, profile, folder)


def add_command(commands: Any) -> None:
    parser = commands.add_parser("plot", help="pictures of a result file", description=__doc__)
    parser.add_argument("results", type=as_argument(load), metavar="FILE.json")
    about = "where they go; beside the file if not given"
    parser.add_argument("--out", type=arguments.folder, metavar="DIR", help=about)
    parser.add_argument("--shape", nargs="+", metavar="NAME", help="only these; every shape if not given")
    about = "of bench profile: its stages as well"
    parser.add_argument("--profile", type=as_argument(load_profile), metavar="PROFILE.json", help=about)
    parser.set_defaults(run=run)
