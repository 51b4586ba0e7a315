#!/usr/bin/env bash
# One wheel for every torch from 2.10: the tests that need no GPU, with this wheel installed, once under the torch whose
# headers built it and once under an older one, which comes with CUDA's libraries (several gigabytes).
#
#     tests/abi.sh dist/widenet_kernels-*.whl
set -euo pipefail
wheel=$(realpath "$1")
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r tests pyproject.toml "$work" # away from the checkout, whose package would be imported in place of the wheel's

for torch in 2.13.0 2.11.0; do
  "$PYTHON" -m venv "$work/venv-$torch"
  pip=("$work/venv-$torch/bin/python" -m pip --disable-pip-version-check -q install)
  "${pip[@]}" "torch==$torch" numpy pytest pytest-xdist hypothesis mpmath safetensors
  "${pip[@]}" "$wheel"
  cd "$work"
  "venv-$torch/bin/python" -W error -m widenet_kernels info
  "venv-$torch/bin/python" -m pytest -q -n 2 tests/ops tests/nn tests/models tests/conformance tests/test_routing.py
  rm -rf "venv-$torch"
done
