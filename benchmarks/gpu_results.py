"""What a run on a GPU leaves beside the files of bench: verdicts and stages in one JSON that outlives a stopped stage.

python benchmarks/gpu_results.py stage OUTDIR NAME STATUS SECONDS LIMIT  # needs no torch, so it takes no time
python -m widenet_kernels.benchmarks.gpu_results summary OUTDIR
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

FILE = "results.json"
MEASURED = ("table", "stages", "products", "sweeps")  # bench's files
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


def summary(folder: Path) -> str:
    from .results import table

    lines = []
    for name in MEASURED:
        if measured := load(folder / f"{name}.json"):
            about = " ".join(f"{key}={value}" for key, value in measured["machine"].items())
            lines += [f"{name}: {about}", table(measured["rows"])]
    results = load(folder / FILE)
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
    command, folder, *rest = sys.argv[1:]
    if command == "stage":
        name, status, seconds, limit = rest
        add(Path(folder) / FILE, ("stages", name), {"status": status, "seconds": int(seconds), "limit": int(limit)})
    elif command == "summary":
        print(summary(Path(folder)))
    else:
        raise SystemExit(f"gpu_results.py: expected stage or summary, got {command!r}")


if __name__ == "__main__":
    main()
