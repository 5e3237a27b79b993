# Two commands matter: `make figures` rewrites figures/phantom/, `make test` runs everything CI runs.
# Both make .venv first if it is missing or older than the lock; after that they need no network. `make book` installs
# Sphinx into it the first time.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
BOOK := $(VENV)/.book

# The notebooks behind the committed figures; `study` runs every section of the profile, the long ones too.
FIGURES := 00 01 02 03 08

export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help figures study test lint lab explore book clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

figures: $(READY)  ## make the phantom figures from the start (about 6 minutes on 2 cores)
	$(BIN)/prism run phantom --only $(FIGURES)

study: $(READY)  ## all notebooks of the profile, the long ones too (70 to 100 minutes on 2 cores)
	$(BIN)/prism run phantom

test: lint  ## lint and test in two processes of one thread, the notebooks included: what CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)  ## ruff on everything, mypy on the library and the benchmarks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: $(READY)  ## open the notebooks in JupyterLab
	HF_HUB_OFFLINE=0 TRANSFORMERS_OFFLINE=0 $(BIN)/jupyter lab --notebook-dir=notebooks

explore: $(READY)  ## open the explorer in a browser
	$(BIN)/prism explore

book: $(BOOK)  ## make the site of the executed notebooks and docs in build/book, after `make figures`
	$(BIN)/python docs/book.py

clean:  ## remove runs and caches; .venv, data and figures stay
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(READY): requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --requirement requirements.lock
	$(BIN)/python -m pip install --no-deps --editable .
	touch $@

$(BOOK): $(READY) docs/requirements.lock
	$(BIN)/python -m pip install --constraint requirements.lock --requirement docs/requirements.lock
	touch $@
