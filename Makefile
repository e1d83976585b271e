# Everything happens in .venv; nothing outside this folder is touched but pip's and Tilescan's caches.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# libtpu is published for Linux on x86-64 alone; elsewhere the ahead-of-time TPU tests skip and say so.
AOT := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),-r requirements-aot.lock)

.DEFAULT_GOAL := help
.PHONY: help install reproduce test test-slow lint notebooks report docs clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 18

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "Tilescan needs Python 3.12 or newer, and '$(PYTHON)' is $$($(PYTHON) --version). Say which: make PYTHON=/path/to/python3.13 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.python requirements.lock setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.lock requirements-aot.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock $(AOT)
	@touch $@

install: $(VENV)/.installed  ## create .venv with the locked packages

reproduce: export JAX_PLATFORMS ?= cpu
reproduce: $(VENV)/.installed  ## measure FlashAttention's tables on this machine and print them
	$(BIN)/python -m tilescan.experiments.run --config=configs/flash_attention.py:cpu --workdir=runs/flash_attention/cpu

test: $(VENV)/.installed-dev  ## run the test suite, print its ten slowest tests
	$(BIN)/python -m pytest -n auto --dist loadfile --durations=10

test-slow: $(VENV)/.installed-dev  ## run the long tests as well
	$(BIN)/python -m pytest -n auto --dist loadfile -m slow

lint: $(VENV)/.installed-dev  ## check style
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

notebooks: $(VENV)/.installed-dev  ## run the notebooks and keep their outputs
	$(BIN)/python notebooks/build.py

report: $(VENV)/.installed  ## rebuild RESULTS.md and results/index.html from the committed records
	$(BIN)/python -m tilescan.experiments.report

docs: $(VENV)/.installed-dev  ## build the API reference from docstrings, into build/docs
	JAX_PLATFORMS=cpu $(BIN)/python docs/api.py

clean:  ## remove .venv and build leftovers
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
