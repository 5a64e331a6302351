# One command each: `make quickstart` runs the tutorial, `make test` the test-suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart examples test check contracts distributed survives format bench clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart.py

examples: $(STAMP)
	runs=$$(mktemp -d) && \
	$(BIN)/sat train --config examples/pretrain_gpt.yaml --output $$runs/gpt && \
	$(BIN)/sat generate $$runs/gpt/final --prompt "And Jesus said unto" --max-new-tokens 200 --temperature 0.5 && \
	$(BIN)/python examples/vit_digits.py --output $$runs/digits && \
	$(BIN)/python examples/t5_span_corruption.py --output $$runs/t5 && \
	$(BIN)/python examples/classify_verses.py --output $$runs/verses && \
	$(BIN)/python examples/gemma_lora.py --output $$runs/gemma

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

contracts: $(STAMP)
	$(BIN)/python -m pytest -m contracts tests/contracts
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
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/adapter_rows.py

clean:
	rm -rf $(VENV) build *.egg-info
