"""A result file for the tests of what reads it. Every number in it is invented; nothing here was measured."""

import argparse
import json
from pathlib import Path
from typing import Any

MACHINE = {
    "cpu": "Invented CPU",
    "cpu_level": "avx2",
    "threads": 2,
    "gpu": None,
    "driver": None,
    "cuda": None,
    "python": "3.12.0",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "numpy": "2.4.6",
    "widenet_kernels": "0.1.0",
    "commit": "0123456789abcdef",
    "date": "2001-02-03",
}
LIMIT_MS = 80.0  # of the layer of 1,000 tokens, forward, on two threads
SPEEDS = {"ours": 0.8, "peer loop": 0.5, "peer bmm": 0.4, "gemms": 1.0}  # of the limit's
KINDS = {"ours": "ours", "peer loop": "peer", "peer bmm": "peer", "gemms": "limit"}


def row(bench: str, contender: str, ms: float, **other: Any) -> dict[str, Any]:
    """A row of the layer "wide-1000", unless told otherwise."""
    dims = {"T": 1000, "D": 100, "F": 200, "E": 4, "K": 2, "capacity_factor": 1.2, "activation": "gelu"}
    fields = {
        "bench": bench,
        "shape": "wide-1000",
        "dims": dims | {"routing": "uniform"},
        "dtype": "fp32",
        "pass": "forward",
        "device": "cpu",
        "threads": 2,
        "contender": contender,
        "kind": KINDS.get(contender, "ours"),
        "ms": ms,
        "lowest_ms": ms * 0.9,
        "spread_ms": ms * 0.02,
        "rounds": 7,
        "flops": None,
        "bytes": None,
        "limit": None,
        "share_of_limit": None,
        "ratio_to_best_peer": None,
        "peak_mib": None,
        "relative_error": 1e-6,
        "host_us": None,
    } | other
    rate = {"tflops": fields["flops"], "gb_per_s": fields["bytes"]}
    scale = {"tflops": 1e9, "gb_per_s": 1e6}
    return {name: amount and amount / ms / scale[name] for name, amount in rate.items()} | fields


def layer(shape: str, limit_ms: float, sizes: dict[str, int], **other: Any) -> list[dict[str, Any]]:
    """The rows of all contenders for one shape and pass."""
    dims = row("layer", "ours", 1.0)["dims"] | sizes
    common = {"shape": shape, "dims": dims, "flops": 8.0 * dims["T"] * dims["D"] * dims["F"], "bytes": 4e6} | other
    rows = []
    for contender, speed in SPEEDS.items():
        ratio = speed / SPEEDS["peer loop"] if contender == "ours" else None
        shares = {"limit": "gemms", "share_of_limit": speed, "ratio_to_best_peer": ratio, "peak_mib": 10 / speed}
        rows.append(row("layer", contender, limit_ms / speed, **common, **shares))
    return rows


def content() -> dict[str, Any]:
    rows = [
        row("ceilings", "copy", 2.0, kind="limit", bytes=4e7, shape="copy"),
        row("ceilings", "gemm", 10.0, kind="limit", flops=3e7, shape="gemm"),
        *layer("wide-1000", LIMIT_MS, {}),
        *layer("wide-1000", LIMIT_MS * 3, {}, **{"pass": "forward+backward"}),
        *layer("wide-1000", LIMIT_MS * 2, {}, threads=1),
        *layer("wide-2000", LIMIT_MS * 2, {"T": 2000}),
        *layer("wide-e8", LIMIT_MS * 1.5, {"E": 8}),
        row("route", "ours", 1.0, bytes=5e5, flops=8e5),
        row("permute", "ours", 2.0, bytes=1.2e7),
        row("grouped_gemm", "ours", 40.0, flops=1.6e8, bytes=2e6),
        row("combine", "ours", 3.0, bytes=1.2e7, flops=2e5),
    ]
    why = {name: value for name, value in row("layer", "peer einsum", 1.0).items() if "ms" not in name}
    return {"format": 1, "machine": dict(MACHINE), "rows": [*rows, why | {"kind": "peer", "why": "needs 900 GiB"}]}


def written(path: Path, results: dict[str, Any]) -> Path:
    path.write_text(json.dumps(results))
    return path


def run(module: Any, *arguments: Any) -> None:
    """A subcommand of ``bench`` as its command line runs it."""
    parser = argparse.ArgumentParser()
    module.add_command(parser.add_subparsers())
    options = parser.parse_args([str(argument) for argument in arguments])
    options.run(options)
