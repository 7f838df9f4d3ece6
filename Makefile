# `make run` does the course's main job, `make test` checks everything. Both install what they need.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg --nbval-cell-timeout 120
PARALLEL := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help run test quick test-all lab notebooks exercises pretrained experiments bench clean

help:           ## this list
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

run: .venv/ready            ## from raw text to a model that answers, in about five minutes, into runs/first (ARGS="--fresh", ALIGN="--method dpo")
	$(PY) -m minillm train --out runs/first $(ARGS)
	$(PY) -m minillm align runs/first $(ALIGN)

test: .venv/ready-to-test   ## everything that must hold: unit tests, parity with other libraries, notebooks, a short run
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) tests
	OMP_NUM_THREADS=1 MINILLM_PROGRESS= $(PY) -m pytest $(PARALLEL) $(NBVAL) notebooks solutions

quick: .venv/ready-to-test  ## the minute that one runs while working: unit tests, without notebooks and runs
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) tests --ignore tests/test_run.py --ignore tests/test_resume.py

test-all: .venv/ready-to-test  ## what `make test` leaves out because it takes long (CI runs both)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(PARALLEL) tests -m slow

lab: .venv/ready            ## open the course in JupyterLab
	$(PY) -m jupyterlab notebooks/00_start_here.ipynb

notebooks: .venv/ready      ## execute every notebook again and store its outputs
	$(PY) -m minillm.course.notebooks notebooks/*.ipynb solutions/*.ipynb

exercises: .venv/ready      ## make the students' notebooks from those with the solutions
	$(PY) -m minillm exercises

pretrained: .venv/ready     ## train the course's own checkpoints again
	$(PY) -m minillm.course.pretrained

experiments: .venv/ready   ## run the long comparisons again that lessons draw (about an hour on two cores)
	OMP_NUM_THREADS=1 $(PY) -m minillm.course.experiments positions families scaling spikes staleness tuning classifying instructing alignment writing

bench: .venv/ready-to-test  ## side by side with other libraries: tokenizers, training, generation, growth, parallel, alignment, grading
	@for name in tokenization training generation growth parallel alignment grading; do OMP_NUM_THREADS=1 $(PY) benchmarks/$$name.py || exit 1; done

clean:          ## remove the environment, caches and build files; runs/ stays
	rm -rf .venv build minillm.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "minillm needs Python 3.11 or newer, and there is no python3 here."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "minillm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "On Debian and Ubuntu: apt install python3-venv"; exit 1; }

.venv/ready: requirements.txt pyproject.toml | .venv/bin/python
	@echo "installing into .venv, once: some hundred MB; on Linux torch also brings its GPU libraries, some GB ..."
	@$(PIP) -r requirements.txt
	@$(PIP) 'setuptools>=77' wheel
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/ready-to-test: .venv/ready
	@echo "installing the test tools into .venv ..."
	@$(PIP) --no-build-isolation --editable '.[test,teach]'
	@touch $@
