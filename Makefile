# make demo | test | setup | lint | e2e | bench: each prepares what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := models/SmolLM2-135M-Instruct

.PHONY: setup demo test lint e2e bench clean

setup: $(READY) $(MODEL)/config.json

$(READY): pyproject.toml constraints.txt tools/setup.sh tools/llama_cpp/build.py $(wildcard tools/llama_cpp/*.patch)
	PYTHON=$(PYTHON) bash tools/setup.sh $(VENV)
	touch $@

$(MODEL)/config.json: $(READY) tools/fetch_demo_model.py
	$(BIN)/python tools/fetch_demo_model.py --link $(MODEL)

demo: setup
	$(BIN)/svdexport run recipes/quickstart.yaml --out out/quickstart

lint: $(READY)
	$(BIN)/ruff check svdexport tests tools
	$(BIN)/ruff format --check svdexport tests tools
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/audit.py

test: setup lint
	$(BIN)/python -m pytest tests

e2e: setup
	$(BIN)/python -m pytest tests/e2e

bench: setup
	$(BIN)/python tools/llama_cpp/benchmark.py

clean:
	rm -rf $(VENV) out models
