# `make train` and `make test` set up what they need: the Python at hand serves if it has torch 2.11 and what is listed in
# WANTED, so that a CUDA machine without network works; otherwise .venv is made and requirements.txt installed in it.
PYTHON ?= python3
VENV := .venv

WANTED := torch numpy setuptools ninja sklearn matplotlib tqdm pytest pytest_benchmark hypothesis scipy
LINTERS := ruff mypy clang_format
has = $(shell $(PYTHON) -c "import sys; from importlib.metadata import version; from importlib.util import find_spec; \
  found = all(map(find_spec, sys.argv[1:])) and tuple(map(int, version('torch').split('.')[:2])) >= (2, 11); \
  print('yes' if found else 'no')" $(1))

ifneq ($(wildcard $(VENV)/installed),)
  PY := $(VENV)/bin/python
else ifeq ($(call has,$(WANTED)),yes)
  PY := $(PYTHON)
else
  PY := $(VENV)/bin/python
endif
ifeq ($(PY),$(PYTHON))
  READY :=
  LINT_PY := $(if $(filter yes,$(call has,$(LINTERS))),$(PY),$(VENV)/bin/python)
  LINT_READY := $(if $(filter $(PY),$(LINT_PY)),,$(VENV)/installed)
else
  READY := $(VENV)/installed
  LINT_PY := $(PY)
  LINT_READY := $(READY)
endif

CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CLANG_FORMAT = $(LINT_PY) -c "import clang_format; clang_format.clang_format()"
export PYTHONPATH := $(CURDIR)

.PHONY: help train test mutants bench lint format build clean
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

train: build  ## set up, then train a WGAN-GP on handwritten digits (ARGS="--data swissroll ..." to change it)
	$(PY) examples/train.py $(ARGS)

test: build  ## set up, then run the tests (ARGS="-k spectral" to choose)
	$(PY) -m pytest $(ARGS)

mutants: $(READY)  ## seed faults into the CUDA sources and demand that the tests find each (minutes; ARGS="spectral")
	$(PY) tests/cuda_on_cpu/mutants.py $(ARGS)

bench: build  ## measure against PyTorch and the peers that are installed; tables of ratios and JSON
	$(PY) benchmarks/report.py --run $(ARGS)

lint: $(LINT_READY)  ## what CI and pre-commit run: ruff, mypy --strict, clang-format
	$(LINT_PY) -m ruff check .
	$(LINT_PY) -m ruff format --check .
	$(LINT_PY) -m mypy
	@$(CLANG_FORMAT) --dry-run --Werror $(CPP)

format: $(LINT_READY)  ## rewrite the sources as lint wants them
	$(LINT_PY) -m ruff check --fix .
	$(LINT_PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

build: $(READY)  ## build the extension in place; only what changed
	@mkdir -p build
	@$(PY) setup.py -q build_ext --inplace > build/log 2>&1 || { cat build/log; exit 1; }

clean:  ## remove everything that was built or installed here
	rm -rf $(VENV) build *.egg-info wgan_ext/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
