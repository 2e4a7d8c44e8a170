# Every target makes its own environment: nothing is asked of the machine but Python 3.11 or newer and g++.
# PYTHON: the interpreter that makes the environment.   PYTEST: extra arguments, e.g. make test PYTEST="-x -k layout";
# not -m, which says what `make test` runs.

PYTHON ?= python3
VENV   ?= .venv
PYTEST ?=
RUN    := $(VENV)/bin/python
READY  := $(VENV)/.installed
# Tests share the processor's cores, except those that start runs and look at the clock, which come after the others.
# Where PYTEST chooses tests of only one kind, pytest ends with 5 for the other: there are none.
both = a=0; $(RUN) -m pytest -n logical --dist loadfile -m $(1) $(3) $(PYTEST) || a=$$?; \
	test $$a -eq 0 -o $$a -eq 5 || exit $$a; \
	b=0; $(RUN) -m pytest -m $(2) $(3) $(PYTEST) || b=$$?; \
	test $$b -eq 5 && exit $$a || exit $$b

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo data test lint kernels verify faults soak gpu-check clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

demo: $(READY) data ## a short real run: train on two processes, kill a rank, resume, sample, report
	$(RUN) -m launch.demo

data: $(READY) ## build the demo corpus, tokenizer and token stores in data/demo
	$(RUN) -m dataio.demo data/demo

test: lint ## every promise in a form that can fail, on CPU
	$(call both,"not verify and not alone","not verify and alone")

lint: $(READY) ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m mypy

kernels: $(READY) ## compile the kernels for this processor and, with nvcc, for GPUs: registers, spills, seconds
	$(RUN) -m kernels.toolchain

verify: lint ## the whole of it, long tests included
	$(RUN) -m kernels.toolchain --check
	$(call both,"not alone","alone",--hypothesis-profile verify)

gpu-check: $(READY) ## the tests that need a GPU; skips with the reason where there is none
	$(RUN) -m pytest -m gpu -s -rs $(PYTEST)

faults: $(READY) ## the fault matrix, played on real runs: docs/fault-matrix.md
	$(RUN) -m tests.faults

soak: $(READY) ## half an hour of random faults; the curve must be the undisturbed one: docs/measurements/soak.md
	$(RUN) -m tests.faults.soak

clean: ## remove caches and build output (never data/, runs/ or the environment)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find stoker dataio parallel kernels pretrain launch tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A machine without a GPU takes torch's CPU wheel where its index offers one: the plain wheel brings gigabytes of CUDA.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Stoker needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null || $(RUN) -m pip show --quiet torch 2>/dev/null \
	  || $(RUN) -m pip install --quiet 'torch==2.13.0+cpu' 2>/dev/null \
	  || echo "No CPU wheel of torch in this package index: the plain one follows, which is gigabytes larger." >&2
	$(RUN) -m pip install --quiet --editable '.[test,native,data,html]'
	@touch $@
