"""The tests that need a GPU, shared out over processes: most of their time goes into compiling kernels.

    python benchmarks/gpu_tests.py --jobs 16

What is tested is the package that Python finds without the checkout's folder: the installed one.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("conformance", "ops", "nn", "models", "training")  # the contract first; the others test what runs on a CPU
PYTEST = [sys.executable, "-P", "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]


def collected() -> list[str]:
    folders = [str(ROOT / "tests" / folder) for folder in FOLDERS]
    options = ["--collect-only", "-q", "--continue-on-collection-errors"]
    found = subprocess.run([*PYTEST, *options, *folders], cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        print(found.stdout[-4000:], found.stderr[-4000:], sep="\n", flush=True)
    return [line for line in found.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    jobs = parser.parse_args().jobs
    tests = collected()
    print(f"{len(tests)} tests in {jobs} processes", flush=True)
    shares = [share for share in (tests[job::jobs] for job in range(jobs)) if share]
    running = [subprocess.Popen([*PYTEST, "-v", "--tb=short", *share], cwd=ROOT) for share in shares]
    codes = [process.wait() for process in running]
    sys.exit(any(codes) or not tests)


if __name__ == "__main__":
    main()
