# Convoy. `make help` lists the targets; each builds what it needs in .venv, and does nothing twice.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Stamps of what is installed; they are remade when the lists of dependencies change.
RUNTIME := $(VENV)/.training.stamp
DEV := $(VENV)/.dev.stamp
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

.PHONY: demo
demo: $(RUNTIME) ## train on real digits, serve the model, classify over gRPC
	@$(BIN)/convoy demo

.PHONY: test
test: lint ## lint, type-check and run every test, with branch coverage
	@$(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile --cov --cov-report=term --cov-report=html:build/coverage

.PHONY: install-check
install-check: $(RUNTIME) ## install the service alone and serve from it, without torch
	@test -d .demo/models/digits || $(BIN)/convoy demo --train-only >/dev/null
	@tests/install_check.sh .demo/models

.PHONY: lint
lint: $(DEV) ## ruff, mypy, import contracts, fresh stubs
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@PYTHONPATH=protos:. $(BIN)/lint-imports --no-logo
	@$(BIN)/python protos/generate.py --check

.PHONY: format
format: $(DEV) ## format, and mend what ruff can mend
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format --quiet .

.PHONY: serve
serve: $(RUNTIME) ## serve the demo's model until Ctrl-C
	@test -d .demo/models/digits || $(BIN)/convoy demo --train-only
	@$(BIN)/convoy serve --repository .demo/models

.PHONY: bench
bench: $(DEV) ## measure the service against the floor of this machine
	@$(BIN)/python tests/benchmarks/serving.py

.PHONY: soak
soak: $(DEV) ## reload a model every second under load: errors, latency, memory
	@$(BIN)/python tests/benchmarks/reloads.py

.PHONY: architectures
architectures: $(DEV) ## train a little, export and serve every architecture at its default size
	@$(BIN)/python tests/benchmarks/architectures.py

.PHONY: accuracy
accuracy: $(DEV) ## 5-fold accuracy of the demo's recipe on the digits
	@$(BIN)/python tests/benchmarks/digits_kfold.py

.PHONY: proto
proto: $(DEV) ## generate the stubs from the .proto files
	@$(BIN)/python protos/generate.py

include deploy/images.mk

.PHONY: clean
clean: ## remove the environment and everything that was made
	rm -rf $(VENV) .demo runs build dist .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; install Python 3.11 or newer, or say make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Convoy needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); say make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: python's venv module is missing; on Debian: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 2; }

$(RUNTIME): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing Convoy and PyTorch into $(VENV) (once; a minute or two) ..."
	@$(PIP) --editable '.[training]'
	@touch $@

$(DEV): pyproject.toml constraints.txt $(RUNTIME)
	@echo "installing the development tools into $(VENV) (once) ..."
	@$(PIP) --editable '.[training,openvino,dev]'
	@touch $@
