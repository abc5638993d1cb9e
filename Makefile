# Needs Python 3.11 or newer, git and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: verify test check format report bench clean

verify: $(READY)  ## hold every claim of the papers against real layers, GPT-2 small's sizes
	$(BIN)/nope verify --out runs/default

report: runs/default/run.json  ## the report of `make verify`'s run
	$(BIN)/nope report runs/default

runs/default/run.json:
	$(MAKE) verify

test: $(READY)  ## the tests, on every core
	$(BIN)/pytest -n auto --dist worksteal -q

bench: $(READY)  ## speed and memory, each against a baseline in the same run
	$(BIN)/python -m benchmarks.theory
	$(BIN)/python -m benchmarks.sampler
	$(BIN)/python -m benchmarks.collapsed

check: $(READY)  ## lint, format, types, the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache runs
