# make train   sets up .venv and trains the nano model on the CPU, with nothing downloaded but packages
# make test    sets up .venv and runs the suite a contributor runs (minutes)
# make check   the slow proofs: killed processes, full disks, notebook, wheel, planted bugs
# make gpu     what needs a GPU
# make lint    ruff

VENV ?= .venv
PY := $(VENV)/bin/python
WORKDIR ?= runs/nano
CONFIG ?= configs/nano.py
# Two test processes: a test compiles on one core most of the time.
WORKERS ?= 2

.PHONY: train test check gpu lint clean

train: $(VENV)/.ready
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(PY) -m experiments.train --config=$(CONFIG) --workdir=$(WORKDIR)

test: $(VENV)/.dev
	JAX_PLATFORMS=cpu $(PY) -m pytest -q -n $(WORKERS) -m "not check and not gpu"

check: $(VENV)/.dev
	JAX_PLATFORMS=cpu $(PY) -m pytest -q -n $(WORKERS) -m check

gpu: $(VENV)/.dev
	$(PY) -m pip install -q -e ".[cuda13]"
	$(PY) -m pytest -q -m gpu

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(VENV)/.ready: setup.py constraints.txt
	@for python in "$(PYTHON)" python3.12 python3.13 python3; do \
	  if [ -n "$$python" ] && $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
	    echo "setting up $(VENV) with $$($$python --version)"; $$python -m venv $(VENV) && exit 0; exit 1; fi; done; \
	  echo "error: k2jax needs Python 3.12 or newer; install it, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1
	$(PY) -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.ready
	$(PY) -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache
