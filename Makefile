# One command each: `make quickstart` runs the tutorial, `make test` the test-suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test check contracts distributed survives format bench clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

contracts: $(STAMP)
	$(BIN)/python -W ignore -m tests.contracts.run

distributed: $(STAMP)
	$(BIN)/python -m pytest -m distributed tests/distributed

survives: $(STAMP)
	$(BIN)/python -m tests.training.survives 24

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/hook_overhead.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/generation.py

clean:
	rm -rf $(VENV) build *.egg-info
