# Needs Python 3.11 or newer, git and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
PEERS := .venv-peers

.PHONY: verify test test-nightly planted mutants check format report bench bench-peers clean

verify: $(READY)  ## hold every claim of the papers against real layers, GPT-2 small's sizes
	$(BIN)/nope verify --out runs/default

report: runs/default/run.json  ## the report of `make verify`'s run
	$(BIN)/nope report runs/default

runs/default/run.json:
	$(MAKE) verify

test: $(READY)  ## the tests, on every core
	$(BIN)/pytest -n auto --dist worksteal -q

planted: $(READY)  ## plant every error of tests/planted/catalogue.py: each must be caught
	$(BIN)/python -m tests.planted

mutants: $(READY)  ## change the statistics one operator at a time: its tests must notice; an hour
	$(BIN)/python -m pip install --quiet 'cosmic-ray>=8.4'
	$(BIN)/python -m tests.mutation

test-nightly: $(READY)  ## thousands of drawn architectures, theory against layers; two hours
	$(BIN)/pytest tests/properties --hypothesis-profile=nightly -n auto --dist worksteal -q \
		-o faulthandler_timeout=0

bench: $(READY)  ## speed and memory, each against a baseline in the same run
	$(BIN)/python -m benchmarks.theory
	$(BIN)/python -m benchmarks.sampler
	$(BIN)/python -m benchmarks.collapsed

bench-peers: $(PEERS)/.installed  ## speed beside other libraries, in an environment of its own
	$(PEERS)/bin/python -m benchmarks.peers

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

# neural-tangents needs this jax, and asks for a TensorFlow that it can do without; newer wheels of
# tensorflow-probability lack the module that is compared with.
$(PEERS)/.installed: pyproject.toml constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(PEERS)/bin/python -m pip install --quiet \
		--editable . jax==0.5.3 jaxlib==0.5.3 ml_dtypes==0.6.0 opt_einsum==3.4.0 frozendict==2.5.1
	$(PEERS)/bin/python -m pip install --quiet --no-deps \
		neural-tangents==0.6.5 tensorflow-probability==0.6.0
	touch $@

clean:
	rm -rf .venv $(PEERS) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache runs
