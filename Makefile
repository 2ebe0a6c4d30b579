# make demo   train the embedded organisms, compare, grade and report them (no key, no network, no GPU)
# make test   all tests
# make ui     Dagster web UI and report on 127.0.0.1
# make bench  benchmarks; writes $DIFFING_HOME/bench.json and docs/benchmarks.md
#
# Each makes its environment first. PYTHON chooses the interpreter (3.11 to 3.13).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export DIFFING_HOME ?= $(CURDIR)/var
# Modules are compiled once, not in every process, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test ui bench
demo: $(READY)
	$(BIN)/diffing demo

test: $(READY)
	$(BIN)/python -m pytest

ui: $(READY)
	$(BIN)/diffing ui

bench: $(READY)
	$(BIN)/python -m benchmarks

$(READY): pyproject.toml constraints.txt deploy/install.sh
	sh deploy/install.sh $(PYTHON) $(VENV)
	touch $@
