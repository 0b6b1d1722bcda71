# Every target sets up what it needs: a fresh machine wants only Python (3.10 to 3.13, with venv), make and git.
#   make demo    train, resume, evaluate, sample and caption with a small JetFormer on this machine
#   make test    the default test suite (CPU only)
#   make check   format, lint, types, architecture: seconds
#   make bench   measurements (tests/benchmarks); make bench-prep: data preparation against img2dataset
#   make bench-gpu       kernels, training step and sampling on one GPU, under eight minutes; bench-kernels: small, on a CPU
#   make peers   our data sets read by webdataset, energon, datasets, Ray Data and tar, which it installs beside .venv
#   make env     the environment in .venv, made once and again when setup.py changes
# Variables: PYTHON (python3), VENV (.venv), TORCH (torch==2.13.0; a local wheel or an index of CPU builds is taken when pip knows one),
# PEER_PYTHON (python3.11: img2dataset needs 3.12 or older), ARGS (more arguments for demo, test and the benches, e.g. make test ARGS="-k flow").

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
PEER_PYTHON ?= python3.11
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PACKAGES := configs data_prep launch model pipeline

.DEFAULT_GOAL := help
.PHONY: help env demo test check format bench bench-prep bench-gpu bench-kernels peers clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

env: $(VENV)/.installed

$(VENV)/.installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Jetway needs Python 3.10 or newer: make env PYTHON=python3.11")'
	@echo "Making the environment in $(VENV) (once; a few minutes of downloads)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install '$(TORCH)'
	@PYTHONWARNINGS=ignore $(PIP) install -e '.[dev,demo,s3]'
	@touch $@

demo: env
	@$(BIN)/jetway demo $(ARGS)

test: env
	@$(BIN)/python -m pytest $(ARGS)

check: env
	$(BIN)/ruff format --check $(PACKAGES) tests setup.py
	$(BIN)/ruff check $(PACKAGES) tests setup.py
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: env
	$(BIN)/ruff format $(PACKAGES) tests setup.py
	$(BIN)/ruff check --fix $(PACKAGES) tests setup.py

bench: env
	@echo "== engine"; $(BIN)/python -m tests.benchmarks.bench_engine $(ARGS)
	@$(MAKE) --no-print-directory bench-prep ARGS=

bench-prep: env
	@$(PIP) install -e '.[peers]'
	@$(BIN)/python -m tests.peers.environments --python $(PEER_PYTHON) img2dataset webdataset-0.2.111
	$(BIN)/python -m tests.benchmarks.bench_prep $(ARGS)

# A machine with a GPU has torch and Triton of its own: without .venv these take the Python that is there, and install nothing.
bench-gpu bench-kernels: BENCH_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
bench-gpu: SECTIONS = bench_gpu
bench-kernels: SECTIONS = bench_kernels --small
bench-gpu bench-kernels:
	@$(BENCH_PYTHON) -c 'import torch' || { echo "$(BENCH_PYTHON) has no torch: make env, or name another: make $@ PYTHON=..." >&2; exit 2; }
	@$(BENCH_PYTHON) -m tests.benchmarks.$(SECTIONS) $(ARGS)

peers: env
	@$(PIP) install -e '.[peers]'
	@$(BIN)/python -m tests.peers.environments
	$(BIN)/python -m pytest -m peers tests/peers $(ARGS)

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
