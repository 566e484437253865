# make run: ask the demo model about the demo picture. make test: a selection of every check that needs no GPU.
# make test-all: the same checks with all parameter combinations, GPU architectures and mutants. REST=--rest leaves out what
# make test has done.
# make gpu: tests, times and tuning on a GPU, in stages, with a report; PYTHON=python3 uses that interpreter as it is and
# installs nothing, ARGS="--stage kernels" passes flags to tools/gpu.py.
# make witness: train and compare look-ahead rows on a real language model, SmolLM2-135M; an hour, installs 93 MB.
PYTHON ?= python3
BIN = .venv/bin
.PHONY: run test test-all mutants gpu witness lint clean

run: .venv/run.stamp
	$(BIN)/python run.py --image assets/demo.png --prompt "Describe the picture."

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python tests/mutants.py --tested --tenth

test-all: .venv/test.stamp .venv/triton-3.6.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	TRITON_36=$(CURDIR)/.venv/triton-3.6 $(BIN)/python -m pytest --all $(REST) -n 2 --dist worksteal
	$(BIN)/python tests/mutants.py --tested $(REST)

mutants: .venv/test.stamp
	$(BIN)/python tests/mutants.py

ifeq ($(origin PYTHON),file)
gpu: .venv/test.stamp
	$(BIN)/python tools/gpu.py $(ARGS)
else
gpu:
	$(PYTHON) tools/gpu.py $(ARGS)
endif

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

# The oldest version that the kernels are meant for. tests/test_inspect.py compiles them with it.
.venv/triton-3.6.stamp: .venv/test.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/triton-3.6 \
		'triton==3.6.0; sys_platform == "linux" and platform_machine == "x86_64"'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
