# Every target makes what it needs from nothing: Python 3.11 or newer and a network to PyPI.

VENV ?= .venv
# Processes that run tests. Those of a file stay together, for they share what they start.
JOBS ?= 2
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint types layers check bench h2spec docs lock clean

help:  ## what there is to make
	@sed -n 's/^\([a-z0-9]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)  ## two services behind sidecars with real traffic, then a mesh of four with its control plane (KEEP=1: the first alone, and it stays up)
	@$(BIN)/python examples/demo/run.py $(if $(KEEP),--keep)
	@$(if $(KEEP),,$(BIN)/python examples/mesh/run.py)

test: $(READY)  ## all tests, with the real Envoy as the judge (ARGS="-k name" for some, JOBS=0 for one process)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)  ## mypy
	$(BIN)/mypy

layers: $(READY)  ## who may import whom
	$(BIN)/lint-imports

check: lint types layers  ## lint, types and layers

bench: $(READY)  ## us, Envoy, nginx and HAProxy, paired; writes benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks $(ARGS)

h2spec: $(READY)  ## h2spec against our HTTP/2 server; needs Go to install it
	@if command -v go >/dev/null; then GOBIN="$(abspath $(BIN))" go install github.com/summerwind/h2spec/cmd/h2spec@af83a65 || echo "H2SPEC COULD NOT BE INSTALLED"; \
	else echo "THERE IS NO GO TOOLCHAIN: h2spec cannot be installed"; fi
	$(BIN)/python -m pytest -rs tests/interop/test_h2spec.py

docs: $(READY)  ## generated documentation
	$(BIN)/python -m meshproxy.api.support > docs/api-support.md

lock: $(READY)  ## requirements.lock anew, from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/lock

clean:  ## remove everything that was made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
