# make demo   builds the example model, checks it, generates text with plain onnxruntime
# make test   linter, type checker and tests
# make ops    the library of fused operators, build/ops/liblhcompile_ops.so (runtimes/ops); CUDA=OFF leaves out the GPU
# The first two create the environment in .venv first. PYTHON names another interpreter, VENV another place; JOBS is
# how many files are tested at once.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXAMPLE := examples/pysource
OUT := build/pysource

.PHONY: demo test lint ops clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/lhcompile build $(EXAMPLE)/model.pt --config $(EXAMPLE)/config.yaml \
		--calibration $(EXAMPLE)/heldout.txt -o $(OUT) --force
	$(BIN)/lhcompile verify $(OUT)
	$(BIN)/python $(EXAMPLE)/generate.py $(OUT)
	@echo
	@echo "The report is $(CURDIR)/$(OUT)/report.html"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	MYPYPATH=runtimes/python $(BIN)/mypy

# For the GPU where there is a CUDA compiler, unless CUDA says otherwise.
ops:
	headers=$$(runtimes/ops/headers.sh build/ops-headers) && \
	cmake -S runtimes/ops -B build/ops -DORT_INCLUDE="$$headers" $(if $(CUDA),-DLHCOMPILE_CUDA=$(CUDA))
	cmake --build build/ops --parallel

$(INSTALLED): pyproject.toml constraints.txt runtimes/python/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e runtimes/python -e ".[test]"
	@touch $@

# The environment stays; remove $(VENV) by hand to build it anew.
clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
