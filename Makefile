# make quickstart   train on text of this machine and write a report, from a fresh clone
# make test         run the whole test suite
# make lint         check style and types
# make venv         only make the environment that the others use
#
# PYTHON=python3.12 picks the interpreter that .venv is made with; ARGS goes to pytest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check
ARGS ?=

.PHONY: quickstart test lint venv clean

quickstart: $(STAMP)
	@bash examples/quickstart.sh

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=10 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(STAMP)

# Again when what is built or depended on has changed; Python files are installed as they lie.
$(STAMP): pyproject.toml $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON);" \
	  "install Python 3.10 or later, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error:" \
	  "$$($(PYTHON) --version) is too old; Python 3.10 or later is needed:" \
	  "make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version) (downloads on the first run)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# Without an NVIDIA driver, a version known to run on the CPU; with one, the host's choice.
	@if nvidia-smi -L >/dev/null 2>&1; then torch='torch>=2.6'; else torch=torch==2.13.0; fi; \
	  $(PIP) --quiet "$$torch"
	@$(PIP) --quiet 'setuptools>=77' wheel 'pybind11>=2.12' ninja numpy
	@echo "building and installing megatron-acodm"
	@$(PIP) --verbose --no-build-isolation --editable '.[dev]' >$(VENV)/install.log 2>&1 || \
	  { tail -n 40 $(VENV)/install.log >&2; exit 1; }
	@sed -n 's/^ *megatron-acodm: /  /p' $(VENV)/install.log | sort -u
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build quickstart *.egg-info megatron_acodm/*.so
