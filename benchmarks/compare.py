"""Two result files side by side: what became slower or faster beyond the noise of both."""

import argparse
import sys
from typing import Any, NamedTuple

from .arguments import nonnegative
from .reading import KEY, Results, Row, as_argument, key, load

VERDICTS = ("slower", "faster", "same", "once")  # the last: one of both was timed once
OURS_CHANGES = {"widenet_kernels", "commit", "date"}  # of the machine's entries, what is meant to differ


class Change(NamedTuple):
    """A measurement that both files hold."""

    old: Row
    new: Row
    threshold: float

    @property
    def ratio(self) -> float:
        """New time over old time: above 1 it became slower."""
        return self.new["ms"] / self.old["ms"]

    @property
    def verdict(self) -> str:
        """Slower or faster only beyond the threshold and the spread of either file, which one call does not show."""
        if min(self.old["rounds"], self.new["rounds"]) < 2:
            return "once"
        noise = max(self.old["spread_ms"], self.new["spread_ms"])
        if abs(self.ratio - 1) <= self.threshold or abs(self.new["ms"] - self.old["ms"]) <= noise:
            return "same"
        return "slower" if self.ratio > 1 else "faster"

    @property
    def regressed(self) -> bool:
        return self.new["kind"] == "ours" and self.verdict == "slower"

    def columns(self) -> list[str]:
        shares = [row["share_of_limit"] for row in (self.old, self.new)]
        change = f"{shares[1] - shares[0]:+.3f}" if None not in shares else "-"
        times = [f"{row['ms']:.4g}" for row in (self.old, self.new)]
        return [*map(str, key(self.new)), *times, f"{self.ratio:.3f}", *map(share, shares), change, self.verdict]


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


HEADER = [*KEY, "old ms", "new ms", "new/old", "old share", "new share", "change", "verdict"]


class Differences(NamedTuple):
    changes: list[Change]  # the measurements in both
    lines: list[str]  # one for each that only one of them has or could time
    lost: int  # of ours, timed in the old file, without a time in the new one


def differences(old: Results, new: Results, threshold: float) -> Differences:
    rows = [{key(row): row for row in results.rows} for results in (old, new)]
    changes, lines, lost = [], [], 0
    for name in dict.fromkeys([*rows[0], *rows[1]]):
        before, after = (found.get(name) for found in rows)
        if before and after and "ms" in before and "ms" in after:
            changes.append(Change(before, after, threshold))
        elif before is None or after is None:
            lines.append(f"only in the {'new' if before is None else 'old'} file: {' '.join(map(str, name))}")
        elif "ms" in before or "ms" in after:
            untimed, which = (after, "old") if "ms" in before else (before, "new")
            lost += which == "old" and before["kind"] == "ours"
            lines.append(f"timed only in the {which} file: {' '.join(map(str, name))}: {untimed['why']}")
    return Differences(changes, lines, lost)


def machine_warning(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = [name for name in old | new if name not in OURS_CHANGES and old.get(name) != new.get(name)]
    if not names:
        return []
    differing = "; ".join(f"{name} {old.get(name)} and {new.get(name)}" for name in names)
    return [f"warning: not the same machine or versions, so times do not compare, shares of the limit may: {differing}"]


def aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]


def run(options: argparse.Namespace) -> None:
    changes, lines, lost = differences(options.old, options.new, options.threshold)
    table = aligned([HEADER, *(change.columns() for change in changes)]) if changes else []
    verdicts = [change.verdict for change in changes]
    summary = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS) + f", {lost} lost"
    print("\n".join([*machine_warning(options.old.machine, options.new.machine), *table, *lines, summary]))
    if options.fail and (lost or any(change.regressed for change in changes)):
        sys.exit(1)


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="two result files: what became slower or faster",
        description="Rows of two result files, matched. A row is slower or faster if its median moved by more than "
        "the threshold and by more than the spread between quartiles in either file; what was called once in one of "
        "them has no spread, and is neither. The share of the limit was "
        "measured in turn with the limit, so it says more than the time where the machine is noisy.",
    )
    parser.add_argument("old", type=as_argument(load), metavar="OLD.json")
    parser.add_argument("new", type=as_argument(load), metavar="NEW.json")
    parser.add_argument("--threshold", type=nonnegative, default=0.05, help="of the old time, 0.05 if not given")
    about = "exit with 1 if a row of ours became slower, or has no time any more"
    parser.add_argument("--fail", action="store_true", help=about)
    parser.set_defaults(run=run)
