"""Train the paper's ablations on digits and on real text, and say which of its claims show at this size.

    python examples/paper_claims.py            # 15 variants on digits, 10 on text, 3 seeds; resumed run by run
    python examples/paper_claims.py --short    # whether all of it works

Go Wider Instead of Deeper (Xue et al. 2021, arXiv 2107.11817) on two tasks that a small computer can learn: 8 x 8
digits, and masked pieces of words and the order of sentences in the docstrings of Python's standard library. Each run
leaves one file in the folder --out; what is there is not run again. Then come claims.md, with the tables, and the
pictures.
"""

import argparse
import multiprocessing
import pathlib
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing

from claims_grid import FULL, SHORT, VARIANTS, Run, grid
from claims_plots import save_plots
from claims_report import report
from tqdm import tqdm

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="a few steps of a few variants, one seed")
    parser.add_argument("--tasks", nargs="+", choices=list(FULL), default=list(FULL))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, help="runs of each variant and task")
    parser.add_argument(
        "--corpus", type=pathlib.Path, metavar="DIR", help="*.txt, *.md and *.rst instead of docstrings"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/claims"), metavar="DIR")
    return parser


def execute_all(runs: list[Run], workers: int) -> Iterator[None]:
    """Yields behind each run. Whatever ends it early, Ctrl-C too, ends the workers with what they are at."""
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the workers inherit: Ctrl-C is not for them
    futures = [executor.submit(run.execute) for run in runs]
    signal.signal(signal.SIGINT, handler)
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for worker in multiprocessing.active_children():
            worker.terminate()
        executor.shutdown(cancel_futures=True)


def main(argv: Sequence[str]) -> int:
    """Run what is missing, tabulate, draw; 0 whatever came out, 130 after Ctrl-C, 1 if a worker died."""
    parser = options()
    args = parser.parse_args(argv)
    for name in ("seeds", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    form = SHORT if args.short else FULL
    try:
        runs = grid(args.out, form, args.tasks, args.variants, args.seeds, args.corpus)
        missing = [run for run in runs if run.result() is None]
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them in {args.out} already")
    try:
        with closing(execute_all(missing, args.workers)) as finished:
            for _ in tqdm(finished, total=len(missing), unit="run", smoothing=0, disable=None):
                pass
    except (KeyboardInterrupt, BrokenProcessPool) as error:
        done = sum(run.result() is not None for run in runs)
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else "a worker died"
        print(f"{what}: {done} of {len(runs)} runs are done; the same command goes on from there")
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    results = [run.result() for run in runs]
    texts = next((run for run in runs if run.settings["task"] == "text"), None)
    text = report(results, texts and texts.task().without_context())
    (args.out / "claims.md").write_text(text)
    print(text)
    for picture in save_plots(results, args.out):
        print(f"picture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
