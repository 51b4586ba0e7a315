"""The tests that need a GPU, each file in a process of its own, several at a time: most of their time is compiling.

    python benchmarks/gpu_tests.py --jobs 8

What is tested is the package that Python finds without the checkout's folder: the installed one.
"""

import argparse
import concurrent.futures
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
FOLDERS = ("conformance", "ops", "nn", "models")  # the contract first; the others test what runs on a CPU
NO_TESTS = 5  # pytest's exit code for a file without a test that needs a GPU


def failed(path: Path) -> bool:
    options = ["-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    code = subprocess.run([sys.executable, "-P", "-m", "pytest", *options, path], cwd=TESTS.parent).returncode
    if code not in (0, NO_TESTS):
        print(f"gpu_tests.py: {path.relative_to(TESTS)} failed ({code})", flush=True)
    return code not in (0, NO_TESTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=8, help="files at a time")
    files = [path for folder in FOLDERS for path in sorted((TESTS / folder).glob("test_*.py"))]
    with concurrent.futures.ThreadPoolExecutor(parser.parse_args().jobs) as pool:
        sys.exit(any(list(pool.map(failed, files))))


if __name__ == "__main__":
    main()
