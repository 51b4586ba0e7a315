"""The rows of a run: completed by what they are compared with, printed as a table, written as JSON."""

import datetime
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import widenet_kernels as wk

from .reading import FORMAT
from .shapes import Case
from .timing import Contender, Row

DIGITS = 6


class Section(NamedTuple):
    """Contenders for the same work, timed in the same rounds."""

    bench: str
    case: Case
    direction: str  # forward or forward+backward
    contenders: list[Contender]
    limit: str | None  # the contender that the others' share_of_limit refers to


def complete(section: Section, about: Row, measured: dict[str, Row]) -> Iterator[Row]:
    """The rows of a section as the result file has them; ``about``: dtype, device, threads."""
    timed = {name: row for name, row in measured.items() if "ms" in row}
    limit = timed.get(section.limit or "")
    peers = (timed[c.name] for c in section.contenders if c.kind == "peer" and c.name in timed)
    best_peer = min(peers, key=lambda row: row["ms"], default=None)
    for contender in section.contenders:
        row = measured.get(contender.name, {})
        if "ms" not in row and "why" not in row:
            continue  # interrupted before its turn
        head = {
            "bench": section.bench,
            "shape": section.case.name,
            "dims": section.case.dims,
            "pass": section.direction,
        }
        counted = contender.flops or contender.nbytes or contender.name == section.limit
        yield head | about | {"contender": contender.name, "kind": contender.kind} | figures(contender, row) | {
            "limit": section.limit,
            "share_of_limit": paired_ratio(limit, row) if counted else None,
            "ratio_to_best_peer": None if contender.kind == "limit" else paired_ratio(best_peer, row),
            "host_us": host_us(section, limit, row),
        }  # fmt: skip


def figures(contender: Contender, row: Row) -> Row:
    empty = {"peak_mib": None, "relative_error": None, "host_us": None}
    counted = {"flops": contender.flops, "bytes": contender.nbytes, "tflops": None, "gb_per_s": None}
    if "ms" in row:
        counted["tflops"] = ratio(contender.flops, row["ms"] * 1e9)
        counted["gb_per_s"] = ratio(contender.nbytes, row["ms"] * 1e6)
    return empty | counted | row


def host_us(section: Section, limit: Row | None, row: Row) -> float | None:
    """As measured; of the bench of that name, what goes beyond the products."""
    if section.bench != "host" or limit is None or "ms" not in row:
        return row.get("host_us")
    return statistics.median(ms - least for ms, least in zip(row["turns_ms"], limit["turns_ms"], strict=False)) * 1e3


def paired_ratio(part: Row | None, whole: Row) -> float | None:
    """The median over the rounds of the ratio within a round: a slow phase of the machine slows both. What was called
    once was called in no round."""
    if part is None or "ms" not in whole:
        return None
    if min(part["rounds"], whole["rounds"]) == 1:
        return ratio(part["ms"], whole["ms"])
    return statistics.median(a / b for a, b in zip(part["turns_ms"], whole["turns_ms"], strict=False))


def ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


# ------------------------------------------------------------------------------------------------------------ files


@functools.cache
def machine() -> dict[str, Any]:
    """Asked once, before anything is measured: what is committed meanwhile did not run."""
    gpu = torch.cuda.is_available()
    return {
        "cpu": cpu_name(),
        "cpu_level": wk.build_info().get("cpu_level"),
        "threads": torch.get_num_threads(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),  # whether memory stays with the process
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "numpy")},
        "widenet_kernels": wk.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def cpu_name() -> str:
    """Such as "AMD EPYC, family 26, model 2": the name alone says little on a virtual machine."""
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().partition("\n\n")[0].splitlines() if cpuinfo.exists() else []
    about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}
    if "model name" not in about:
        return platform.processor()
    numbers = [
        f"{key} {about[field]}" for key, field in (("family", "cpu family"), ("model", "model")) if field in about
    ]
    return ", ".join([about["model name"], *numbers])


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the checkout that this file stands in, or that it was installed from; WIDENET_COMMIT names it elsewhere."""
    root, built = Path(__file__).parents[1], Path(__file__).with_name("COMMIT")  # which setup.py leaves
    describe = ("git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    here = said(*describe) if (root / ".git").exists() else built.read_text().strip() if built.exists() else None
    return os.environ.get("WIDENET_COMMIT") or here or None


def said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def rounded(value: Any) -> Any:
    """With as many digits as a measurement has, inside too; whole numbers are counts and stay as they are."""
    if isinstance(value, float) and not value.is_integer():
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def write(path: Path, rows: list[Row]) -> None:
    """A line for each row; the file is replaced whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(as_json(machine(), rows))
    os.replace(partial, path)


def as_json(machine: dict[str, Any], rows: list[Row]) -> str:
    lines = ",\n".join(map(json.dumps, rows))
    return f'{{"format": {FORMAT},\n"machine": {json.dumps(machine)},\n"rows": [\n{lines}\n]}}\n'


# ------------------------------------------------------------------------------------------------------------ table

COLUMNS = (  # heading, width, what stands in it
    ("time", 11, lambda row: milliseconds(row["ms"])),
    ("spread", 11, lambda row: milliseconds(row["spread_ms"])),
    ("rounds", 7, lambda row: str(row["rounds"])),
    ("GFLOP/s", 10, lambda row: number(row["tflops"], 1e3, ",.1f")),
    ("GB/s", 8, lambda row: number(row["gb_per_s"], 1, ",.1f")),
    ("tokens/s", 11, lambda row: number(ratio(row["dims"]["T"] or None, row["ms"]), 1e3, ",.0f")),
    ("of limit", 9, lambda row: number(row["share_of_limit"], 1, ".3f")),
    (
        "vs best peer",
        13,
        lambda row: number(row["ratio_to_best_peer"], 1, ".2f") + "x" * bool(row["ratio_to_best_peer"]),
    ),
    ("peak MiB", 10, lambda row: number(row["peak_mib"], 1, ",.1f")),
    ("host us", 9, lambda row: number(row["host_us"], 1, ",.1f")),
    ("error", 9, lambda row: number(row["relative_error"], 1, ".1e")),
)
NAME_WIDTH = 26


def milliseconds(value: float) -> str:
    return f"{value:,.1f} ms" if value >= 100 else f"{value:.3g} ms" if value >= 1 else f"{value * 1e3:.3g} us"


def number(value: float | None, scale: float, form: str) -> str:
    return "-" if value is None else format(value * scale, form)


def table(rows: Iterable[Row]) -> str:
    """A paragraph for each section: what is compared, a line for each contender, and why others have none."""
    paragraphs = []
    for head, section in itertools.groupby(rows, title):
        timed: dict[str, Row] = {}
        absent: dict[str, list[str]] = {}
        for row in section:
            if "ms" in row:
                timed[name_and_way(row)] = row
            else:
                absent.setdefault(row["why"], []).append(row["contender"])
        width = max(NAME_WIDTH, *map(len, timed), 0)
        lines = [head, " " * (width + 2) + "".join(f"{name:>{size}}" for name, size, _ in COLUMNS)]
        for name, row in timed.items():
            lines.append(f"  {name:{width}}" + "".join(f"{show(row):>{size}}" for _, size, show in COLUMNS))
        lines += [f"  {', '.join(names)}: {why}" for why, names in absent.items()]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def name_and_way(row: Row) -> str:
    """The contender; on a GPU also how it was timed, if not as a graph: then the host's time may be in it."""
    way = row["timed"].partition(",")[0]
    return row["contender"] if row["device"] == "cpu" or way == "graph" else f"{row['contender']} [{way}]"


def title(row: Row) -> str:
    sizes = " ".join(f"{name}={row['dims'][name]}" for name in ("T", "D", "F", "E", "K") if row["dims"][name])
    of_limit = f"; limit: {row['limit']}" if row["limit"] else ""
    device = row["device"] if row["device"] != "cpu" else f"cpu, {row['threads']} threads"
    of_sizes = f" ({sizes})" if sizes else ""
    return f"{row['bench']} {row['shape']}{of_sizes} {row['dtype']} {row['pass']}, {device}{of_limit}"
