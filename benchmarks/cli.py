"""``python -m widenet_kernels bench``: the options of a run, and the commands that read what it leaves."""

import argparse
import sys

import torch

from . import compare, plots, profiling, results, shapes, table
from . import run as runner
from .arguments import DEVICES, default_device, device, nonnegative, output, positive
from .stage import PASSES
from .timing import Row

DEFAULT_BENCHES = ("ceilings", "layer", "gate", "plan", "route", "permute", "grouped_gemm", "combine")


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The run itself is what ``bench`` does without a command; a module adds its command by ``add_command``."""
    parser.description = __doc__
    parser.set_defaults(run=run)
    add = parser.add_argument
    benches, threads = " ".join(DEFAULT_BENCHES), torch.get_num_threads()
    about = f"what to measure (default: {benches})"
    add("--bench", nargs="+", choices=runner.BENCHES, metavar="BENCH", default=DEFAULT_BENCHES, help=about)
    about = "shapes or suites (default: the suite named default)"
    add("--shape", nargs="+", choices=shapes.NAMES, metavar="SHAPE", default=["default"], help=about)
    about = "(default: fp32 on a CPU, bf16 on a GPU)"
    add("--dtype", nargs="+", choices=list(shapes.DTYPES), help=about)
    about = "those of the passes that a bench has (default: all)"
    add("--pass", nargs="+", choices=PASSES, default=list(PASSES), dest="directions", help=about)
    about = "(default: cuda where torch has a GPU, here %(default)s)"
    add("--device", type=device, choices=DEVICES, default=default_device(), help=about)
    about = f"of the CPU; for each number everything is measured (default: {threads})"
    add("--threads", nargs="+", type=positive, metavar="N", default=[threads], help=about)
    about = "for the rounds of one set of contenders (default: %(default)s)"
    add("--seconds", type=nonnegative, default=3.0, help=about)
    about = "seconds; what takes longer is called once, what is foreseen to is not (default: %(default)s)"
    add("--patience", type=nonnegative, default=20.0, help=about)
    add("--json", type=output, metavar="FILE", help="write the rows here too")
    add("--list", action="store_true", help="print the benches, shapes and suites")
    commands = parser.add_subparsers(title="on a file that a run has left, or on one layer")
    for module in (compare, plots, table, profiling):
        module.add_command(commands)


def run(options: argparse.Namespace) -> None:
    if options.list:
        print(listing(list(runner.BENCHES)))
        return
    try:
        measure(options)
    except KeyboardInterrupt:
        print("interrupted: this is what there is", file=sys.stderr)
        raise


def measure(options: argparse.Namespace) -> None:
    plan = runner.Plan(
        options.bench, shapes.chosen(options.shape),
        options.dtype or ["fp32" if options.device == "cpu" else "bf16"], options.directions, options.device,
        options.threads, options.seconds, options.patience,
    )  # fmt: skip
    faults = runner.broken(options.device)
    if faults:
        sys.exit("\n".join(["bench: this build gives wrong results and is not measured:", *faults]))
    torch.set_num_threads(max(options.threads))
    results.machine()
    rows: list[Row] = []

    def report(section: list[Row]) -> None:
        section = results.rounded(section)  # what is printed is what is written
        rows.extend(section)
        runner.Progress.write(results.table(section) + "\n")
        sys.stdout.flush()
        if options.json:
            results.write(options.json, rows)

    runner.run(plan, report)
    if not rows:
        what = (options.bench, options.shape, options.directions)
        sys.exit("bench: nothing was measured: {} of {} has no {} here".format(*map(", ".join, what)))


def listing(benches: list[str]) -> str:
    lines = [f"benches: {', '.join(benches)}", "", "suites:"]
    lines += [f"  {name:14}{' '.join(members)}" for name, members in shapes.SUITES.items()]
    lines += ["", "shapes:"]
    for case in shapes.CASES.values():
        room = "dropless" if case.capacity_factor is None else f"capacity factor {case.capacity_factor}"
        about = f"T={case.T} D={case.D} F={case.F} E={case.E} K={case.K} {case.activation}, {room}, {case.routing}"
        lines.append(f"  {case.name:30}{about}")
    return "\n".join(lines)
