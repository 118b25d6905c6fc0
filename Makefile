# Everything lives in $(VENV); nothing outside the checkout is touched (pip's and npm's caches aside).
#
#   make demo                        draw with the shipped model and its 1.58-bit student
#   make test PYTEST_ARGS="-k vae"   a part of the tests
#   make demo PYTHON=/path/to/python3.12

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= a red circle above a blue square
OUT ?= demo.png
PYTEST_ARGS ?=

# Probed by running: a name on the PATH may be a shim for a version that is not installed.
PYTHON_OK := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
find_python = $(firstword $(foreach name,python3.12 python3.11 python3.13 python3 python, \
	$(shell command -v $(name) >/dev/null 2>&1 && $(name) -c '$(PYTHON_OK)' >/dev/null 2>&1 \
	&& echo $(name))))
ifeq ($(origin PYTHON),undefined)
PYTHON = $(eval PYTHON := $$(find_python))$(PYTHON)
endif

# Constraints pin every version, per Python: JAX 0.11 wants Python 3.12.
constraints = requirements/constraints-$(shell $(BIN)/python -c \
	'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
PIP = $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml $(wildcard requirements/*.txt)

.PHONY: help demo test test-long lint format bench full-size tables docs notebooks install-demo install-test lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s%s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## install, then draw one prompt with the shipped model and its 1.58-bit student
	@FLUX_JAX_COMPILATION_CACHE="$(abspath $(VENV))/compiled" $(BIN)/python -m flux_jax demo "$(PROMPT)" --out "$(OUT)"
	@echo "The image is in $(abspath $(OUT)). Next: source $(BIN)/activate, and docs/quickstart.md"

test: $(VENV)/.installed-test $(VENV)/.browser ## install what the tests need, then run them (two at a time)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not long" $(PYTEST_ARGS)

test-long: $(VENV)/.installed-test ## the slowest tests: notebooks, killed jobs, benchmarks at tiny size
	$(BIN)/python -m pytest -n 2 --dist load -m long $(PYTEST_ARGS)

lint: $(VENV)/.installed-test ## ruff (format and rules) and pyright
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-test ## rewrite the sources as ruff wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-test ## time a FLUX.1-dev step on this machine's GPU, with its peers
	$(BIN)/python -m benchmarks.transformer_step --peers
	$(BIN)/python -m benchmarks.render_tables

full-size: $(VENV)/.installed-test ## the whole pipeline at full size on a GPU, with peers and plots; WORK=FOLDER with 16 GB
	$(PIP) install -q -c $(constraints) --no-build-isolation -e ".[notebooks]"
	$(BIN)/python -m benchmarks.full_size --work "$(or $(WORK),$(error name a folder with 16 GB: WORK=FOLDER))"
	for result in benchmarks/results/full_size_*.json; do $(BIN)/python -m benchmarks.full_size_plot "$$result"; done
	$(BIN)/python -m benchmarks.render_tables

tables: $(VENV)/.installed-test ## rewrite what is generated in README and docs: tables, commands, settings, public names
	$(BIN)/python -m benchmarks.render_tables
	$(BIN)/python -m tools.commands
	$(BIN)/python -m tools.public_api
	$(BIN)/python -m tools.settings

docs: $(VENV)/.installed-test ## build the documentation into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(VENV)/.installed-test ## run the notebooks and keep their outputs (some minutes)
	JAX_PLATFORMS=cpu $(BIN)/python -m tools.notebooks

install-demo: $(VENV)/.installed ## only install, what `make demo` needs
install-test: $(VENV)/.installed-test $(VENV)/.browser ## only install, what `make test` and `make lint` need

lock: $(VENV)/.installed-test ## write the constraints file of this Python from what is installed
	$(PIP) install -e ".[test,parity,lint,notebooks,docs]"
	@head -1 $(constraints) > $(constraints).new
	$(PIP) list --format=freeze --exclude flux-jax --exclude pip \
		| sed "s/+cpu$$//" >> $(constraints).new
	@mv $(constraints).new $(constraints)

clean: ## remove the virtual environment and the caches
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info

# The stamps make a second run quick; a change of the requirements installs again.
$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c '$(PYTHON_OK)' 2>/dev/null; then \
		echo "error: this needs Python 3.11 or newer with the venv module; found" \
			"'$(if $(PYTHON),$(PYTHON),none)'. Install one (on Debian: python3-venv)" \
			"or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(INPUTS)
	@echo "Installing into $(VENV) with the versions of $(constraints) ..."
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	@$(PIP) install -q -c $(constraints) setuptools
	@$(PIP) install -q -c $(constraints) --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing the test requirements (torch among them) ..."
	@$(PIP) install -q -c $(constraints) --no-build-isolation -e ".[test,parity,lint,notebooks,docs]"
	@touch $@

# Headless Chromium, for the tests that look at pages. Where none can be had they are skipped.
$(VENV)/.browser: $(VENV)/.installed-test tests/browser.py
	@$(BIN)/python tests/browser.py $(VENV)/browser
	@touch $@
