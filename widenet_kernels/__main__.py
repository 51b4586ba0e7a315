"""The command line: ``python -m widenet_kernels info`` and ``bench``."""

import argparse
import platform
import sys
from collections import defaultdict
from importlib import metadata
from importlib.util import find_spec

import torch

from widenet_kernels.ops.native import build_info
from widenet_kernels.ops.registry import BACKENDS, PUBLIC_OPS, available_backends, why_not

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def print_info() -> None:
    """What was built in, which backend each op takes on each device of this machine, and why not another."""
    built = build_info()
    packages = ", ".join(f"{name} {version_of(name)}" for name in ("torch", "triton", "numpy"))
    print(f"widenet_kernels {built['version']}, Python {platform.python_version()}, {packages}")
    if built["native"]:
        print(f"library       {built['library']}, on the stable ABI of LibTorch {built['stable_abi']}")
        print(f"CPU kernels   baseline, avx2, avx512, avx512_bf16; this CPU runs {built['cpu_level']}")
        print(f"CUDA kernels  {cuda_kernels(built)}")
    else:
        print(f"library       none: {built['reason']}")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices[1:]:
        major, minor = torch.cuda.get_device_capability(device)
        print(f"{device}        {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}")
    if len(devices) == 1:
        print("GPUs          none that torch can use")

    print(f"\n{'op':14}{'native kernels for':20}" + "".join(f"{f'takes on {device}':20}" for device in devices))
    for op in PUBLIC_OPS:
        native = ", ".join(device for device, ops in built["native_ops"].items() if op in ops) or "-"
        print(f"{op:14}{native:20}" + "".join(f"{available_backends(op, device)[0]:20}" for device in devices))
    print("\nnot available")
    for (backend, where, reason), ops in absent(devices).items():
        print(f"  {backend} on {where}: {reason} ({'every op' if len(ops) == len(PUBLIC_OPS) else ', '.join(ops)})")


def cuda_kernels(built: dict) -> str:
    if not built["cuda_toolkit"]:
        return "none (WIDENET_CUDA=ON pip install . builds them)"
    names = built["cuda_architectures"].split(",")
    machine_code = [name.removesuffix("-real") for name in names if not name.endswith("-virtual")]
    ptx = [name.removesuffix("-virtual") for name in names if not name.endswith("-real")]
    forms = [f"sm_{name}" for name in machine_code] + [f"PTX of compute_{name}" for name in ptx]
    text = f"by CUDA {built['cuda_toolkit']}: {', '.join(forms)}"
    return f"{text}; not used here: {built['cuda_problem']}" if built["cuda_problem"] else text


def absent(devices: list[torch.device]) -> dict[tuple[str, str, str], list[str]]:
    """(backend, device, reason) -> the ops that it keeps this backend from serving there."""
    reasons = defaultdict(list)
    for device in devices:
        for backend in BACKENDS:
            for op in PUBLIC_OPS:
                reason = why_not(backend, op, device, torch.float32)
                if reason is not None:
                    reasons[backend, str(device), reason].append(op)
    return reasons


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m widenet_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what was built in, and what this machine uses and why")
    info.set_defaults(run=lambda options: print_info())
    if find_spec("widenet_kernels.benchmarks"):  # not in a checkout that is not installed: its folder stands beside
        from widenet_kernels.benchmarks import cli

        cli.add_commands(commands.add_parser("bench", help="measure the kernels against others and against the limit"))
    options = parser.parse_args()
    try:
        options.run(options)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
