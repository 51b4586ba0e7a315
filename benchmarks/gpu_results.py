"""The one JSON file of a run on a GPU: every stage adds to it, and what is in it outlives a stage that is stopped.

    python benchmarks/gpu_results.py stage results.json NAME STATUS SECONDS LIMIT
    python benchmarks/gpu_results.py summary results.json

Knows no torch, so that the script between the stages loses no time on it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

PARTS = ("speed", "sweeps")  # section -> rows
VERDICTS = ("smoke", "graph")  # a verdict for each case


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def add(path: Path, keys: tuple[str, ...], value: Any) -> None:
    """Set ``results[keys[0]][keys[1]]... = value``; the old file is replaced whole or not at all."""
    results = load(path)
    inner = results
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, path)


def row_line(row: dict[str, Any]) -> str:
    """One contender of a section; what could not be timed says why."""
    if "ms" not in row:
        return f"  {row['name']:40} {row['why']}"
    line = f"  {row['name']:40} {row['ms'] * 1e3:11.1f} us  spread {row['spread_ms'] * 1e3:8.1f}"
    for key, text in (
        ("tflops", "{:7.1f} TFLOP/s"),
        ("share_of_dense", "{:6.3f} of dense"),
        ("gb_per_s", "{:7.0f} GB/s"),
        ("floor_us", "floor {:8.1f} us"),
        ("share_of_copy", "{:6.3f} of copy"),
        ("speed_of_default", "{:6.3f} of the default's speed"),
        ("relative_error", "error {:.1e}"),
        ("host_us", "host {:.0f} us"),
    ):
        if key in row:
            line += "  " + text.format(row[key])
    return line + ("" if row["timed"] in ("graph", "cpu") else f"  [{row['timed']}]")


def summary(results: dict[str, Any]) -> str:
    lines = [" ".join(f"{key}={value}" for key, value in results.get("machine", {}).items())]
    for part in PARTS:
        for section, rows in results.get(part, {}).items():
            if isinstance(rows, str):
                lines += [f"{part}: {section}", f"  {rows}"]
                continue
            lines.append(f"{part}: {section}")
            lines += [row_line(row) for row in rows]
    for part in VERDICTS:
        lines.append(part)
        lines += [f"  {row['case']:60} {row['verdict']}" for row in results.get(part, [])]
    lines.append("stages")
    lines += [
        f"  {name:24} {stage['status']:12} {stage['seconds']:4} of {stage['limit']} s"
        for name, stage in results.get("stages", {}).items()
    ]
    return "\n".join(lines)


def main() -> None:
    command, path, *rest = sys.argv[1:]
    if command == "stage":
        name, status, seconds, limit = rest
        add(Path(path), ("stages", name), {"status": status, "seconds": int(seconds), "limit": int(limit)})
    elif command == "summary":
        print(summary(load(Path(path))))
    else:
        raise SystemExit(f"gpu_results.py: expected stage or summary, got {command!r}")


if __name__ == "__main__":
    main()
