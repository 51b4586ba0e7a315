"""A result file, read: its rows, what they are matched by, and the machine in one line."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

FORMAT = 1
KEY = ("bench", "shape", "dtype", "pass", "device", "threads", "contender")  # what makes two rows the same measurement

Row = dict[str, Any]
Content = TypeVar("Content")


class Results(NamedTuple):
    path: Path
    machine: dict[str, Any]
    rows: list[Row]


def load(path: Path) -> Results:
    """Raises ValueError for a file that is not a result file of this format."""
    content = parsed(path)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: expected a result file of format {FORMAT}, got {describe(found)}")
    return Results(path, content["machine"], content["rows"])


def parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error


def load_profile(path: Path) -> tuple[Path, dict[str, Any]]:
    """Raises ValueError for a file that is none of ``bench profile``."""
    content = parsed(path)
    if not isinstance(content, dict) or content.get("profile") != FORMAT:
        raise ValueError(f"{path}: expected what bench profile --json writes")
    return path, content


def as_argument(read: Callable[[Path], Content]) -> Callable[[str], Content]:
    """The type of a command's argument: what is wrong with the file is an error of the command line."""

    def from_command_line(argument: str) -> Content:
        try:
            return read(Path(argument))
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return from_command_line


def describe(found: Any) -> str:
    return "a file that names no format" if found is None else f"format {found!r}"


def newest(folder: Path, device: str) -> list[Path]:
    """The result files of a device's layer with the latest date, the last by name of those: one of a CPU for each
    GLIBC_TUNABLES, or one of each GPU, the newest first; files of another format do not count."""
    found = {}
    for path in folder.glob("*.json"):
        try:
            results = load(path)
        except ValueError:
            continue
        if timed(results.rows, bench="layer", device=device):
            found[path] = results.machine
    latest: dict[str | None, Path] = {}
    for path in sorted(found, key=lambda path: (found[path]["date"], path.name), reverse=True):
        latest.setdefault(found[path].get("glibc_tunables") if device == "cpu" else found[path]["gpu"], path)
    return list(latest.values())


def key(row: Row) -> tuple:
    """The threads are a CPU's: how many there are changes nothing on a GPU."""
    return tuple("-" if name == "threads" and row["device"] != "cpu" else row[name] for name in KEY)


def timed(rows: list[Row], **wanted: Any) -> list[Row]:
    """The rows with a time that have these values: ``timed(rows, bench="layer", kind="ours")``."""
    return [row for row in rows if "ms" in row and all(row[name] == value for name, value in wanted.items())]


def at_full_width(results: Results) -> list[Row]:
    """The timed rows at the machine's number of threads, without those that show how fewer of them scale."""
    return [
        row for row in timed(results.rows) if row["device"] != "cpu" or row["threads"] == results.machine["threads"]
    ]


def values(rows: list[Row], name: str) -> list[Any]:
    """The different values of a field, in the order of the rows."""
    return list(dict.fromkeys(row[name] for row in rows))


def device_name(machine: dict[str, Any], device: str) -> str:
    """What ran the rows of a device: "AMD EPYC (avx2), 2 threads" or "NVIDIA H200"."""
    if device != "cpu":
        return str(machine["gpu"])
    threads = machine["threads"]
    return f"{machine['cpu']} ({machine['cpu_level']}), {threads} thread{'s' * (threads != 1)}"


def software(machine: dict[str, Any]) -> str:
    """Versions, commit, date and what is set: "torch 2.13.0, widenet_kernels 0.1.0 at 1aca8b2, 2026-01-31"."""
    cuda = f", CUDA {machine['cuda']}" if machine["cuda"] else ""
    at, dash, dirty = (machine["commit"] or "").partition("-")  # "-dirty" where the checkout had changes
    commit = f" at {at[:7]}{dash}{dirty}" if at else ""
    tunables = machine.get("glibc_tunables")  # older files do not have it
    package = f"widenet_kernels {machine['widenet_kernels']}{commit}"
    parts = [f"torch {machine['torch']}{cuda}", package, machine["date"]]
    return ", ".join(parts + ([f"GLIBC_TUNABLES={tunables}"] if tunables else []))
