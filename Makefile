PYTHON ?= python3
BIN = .venv/bin
READY = .venv/.ready
LOWEST = .venv-lowest/bin
LOWEST_READY = .venv-lowest/.ready

.PHONY: setup demo test test-quick test-lowest lint families clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 setup")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint]'
	touch $(READY)

$(LOWEST_READY): pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lowest.txt --editable '.[test]'
	touch $(LOWEST_READY)

demo: setup
	$(BIN)/python bert-evaluation.py --infer --evaluate --transform

# A process on each core, with one thread of torch each: twice as fast as one process with all threads.
PYTEST = -m pytest --numprocesses auto --dist loadfile

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m 'not slow'

# The lowest versions that pyproject.toml allows, but for torch's: quick tests of what calls the other packages.
CALLERS = tests/squad tests/report tests/test_capturing.py tests/test_checkpoints.py tests/test_cli.py \
	tests/test_family_tokenizers.py tests/test_requirements.py tests/test_stats.py tests/test_store.py

test-lowest: $(LOWEST_READY)
	OMP_NUM_THREADS=1 $(LOWEST)/python $(PYTEST) -m 'not slow' $(CALLERS)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

families: setup
	$(BIN)/python -W ignore tests/family_table.py > docs/families.md

clean:
	rm -rf .venv .venv-lowest .pytest_cache .mypy_cache .ruff_cache
