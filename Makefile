# Each target sets itself up from nothing: a virtual environment in .venv, the pinned packages, the compiled ops.
# For torch's smaller CPU build, point pip at an index that has it (PIP_INDEX_URL or pip's configuration).

PYTHON ?= python3
EPOCHS ?= 30

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
SOURCES := setup.py pyproject.toml CMakeLists.txt constraints.txt requirements-nvcc.txt $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: demo claims test report bench lint wheel test-install test-abi clean

demo: OUT ?= out/digits
demo: $(VENV)/installed  ## train a WideNet on real handwritten digits through the compiled ops
	$(BIN)/python examples/train_digits.py --epochs $(EPOCHS) --out $(OUT)

claims: OUT ?= out/claims
claims: $(VENV)/installed  ## the paper's ablations on digits and text, a table and pictures; forty minutes, resumed if cut off
	$(BIN)/python examples/paper_claims.py --out $(OUT)

test: $(VENV)/installed  ## the whole test suite, sanitizers included; then the Triton kernels under their interpreter
	$(BIN)/python -m pytest -n 2 --dist loadfile
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2

report: $(VENV)/installed  ## the Triton kernels compiled for every target: registers, shared memory, tensor cores
	$(BIN)/python -m widenet_kernels.triton.report

bench: $(VENV)/installed  ## the layer and its stages against peers and the physical limit, in under ten minutes
	$(BIN)/python -m widenet_kernels bench

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
	$(BIN)/mypy

test-install:  ## build and install the wheel as a user does, with and without compiled kernels
	PYTHON=$(PYTHON) bash tests/install.sh

wheel: $(VENV)/installed  ## dist/*.whl with the CUDA kernels for every architecture
	rm -rf dist
	PATH="$(CURDIR)/$(BIN):$$PATH" WIDENET_CUDA=ON $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

test-abi: wheel  ## that wheel under the torch it was built beside, and under an older one with CUDA's libraries
	PYTHON=$(PYTHON) bash tests/abi.sh dist/*.whl

$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch triton setuptools wheel cmake ninja pybind11
	$(PIP) -r requirements-nvcc.txt
	PATH="$(CURDIR)/$(BIN):$$PATH" WIDENET_CUDA=ON $(PIP) --no-build-isolation -e '.[examples,bench,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info widenet_kernels/_C.so
