#!/usr/bin/env bash
# Installs the package as a user does, away from the source tree, and runs a layer forward and backward:
# with build isolation and the CUDA compiler from PyPI, then without it beside the installed torch from a source
# distribution, then without kernels.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work" # a copy: nothing that was built here before
cd "$work"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check -q "$@"; }

check() { # expected values of build_info()["native"] and of ["cuda_architectures"]
  (cd / && "$work/venv/bin/python" -W error - "$@") <<'PY'
import subprocess
import sys

import torch

import widenet_kernels as wk

info = wk.build_info()
assert (str(info["native"]), info.get("cuda_architectures", "")) == tuple(sys.argv[1:]), info
assert wk.available_backends("moe_ffn", "cpu")[0] == ("native" if info["native"] else "reference")
layer = wk.MoELayer(16, 32, 4)
y, aux = layer(torch.randn(2, 5, 16))
(y.square().mean() + aux.balance_loss).backward()
assert all(p.grad.isfinite().all() for p in layer.parameters())
cuda = info.get("cuda_toolkit") or "none"
assert subprocess.run([sys.executable, "-m", "widenet_kernels", "bench", "--list"], capture_output=True).returncode == 0
print(f"installed: native={info['native']}, CUDA kernels by {cuda}, torch {info['torch']}")
PY
}

"$PYTHON" -m venv venv
pip install -c constraints.txt torch triton numpy
without_nvcc() { env -u CUDA_HOME PATH=/usr/bin:/bin "$@"; } # no toolkit in sight
export CUDAARCHS=90a-real # one is enough here
export WIDENET_CUDA=ON
without_nvcc "$work/venv/bin/python" -m pip --disable-pip-version-check -q install -c constraints.txt .
check True 90a-real
pip uninstall -y widenet-kernels

pip install -c constraints.txt setuptools wheel cmake ninja
if without_nvcc "$work/venv/bin/python" -m pip wheel --no-build-isolation --no-deps . >refused.log 2>&1; then exit 1; fi
grep -m 1 "WIDENET_CUDA=ON needs an nvcc of CUDA 12.8 or later" refused.log

"$work/venv/bin/python" setup.py -q sdist --dist-dir dist
WIDENET_CUDA=OFF pip wheel --no-build-isolation --no-deps -w dist dist/widenet_kernels-*.tar.gz
ls -l dist/widenet_kernels-*-py3-none-linux_*.whl
pip install --no-index --no-deps dist/*.whl
check True ""
pip uninstall -y widenet-kernels

WIDENET_NATIVE=OFF pip install --no-build-isolation --no-deps .
check False ""
