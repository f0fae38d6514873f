# canopy: everything a newcomer needs is one word after `make`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO_AREA := --bbox 44.083,-71.296 --size-m 1000
# Tests run in N processes of one thread; a file's tests stay together, and share what is dear to make.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(or $(N),2) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test-quick test check bench lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## create .venv from the lock and install canopy into it

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "canopy needs Python 3.11 or newer; $$($(PYTHON) --version) was found. Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	@echo "Setting up $(VENV) from requirements.lock (some minutes; PyTorch alone is a few GB on Linux) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --quiet --require-hashes -r requirements.lock
	@$(PIP) install --quiet --quiet --no-deps --no-build-isolation -e .
	@touch $(STAMP)
	@echo "Ready: $(BIN)/canopy --help"

demo: $(STAMP)  ## map the embedded demo area; leaves demo/chm.tif and demo/chm.png
	@mkdir -p demo
	$(BIN)/canopy predict --imagery demo $(DEMO_AREA) -o demo/chm.tif --quicklook --overwrite
	@echo
	@echo "demo/chm.tif  canopy height in metres, a georeferenced GeoTIFF: open it in QGIS"
	@echo "demo/chm.png  the same as a picture: bright = tall trees, dark = bare ground, roads and water"
	@echo "The scene is a synthetic forest with exact truth; \`$(BIN)/canopy data synth -o demo/truth\` writes the truth beside it."

test-quick: $(STAMP)  ## the tests for every commit: what the commands do, under two minutes on two cores
	$(TESTS) -m "not slow" tests/behaviour tests/cli tests/geo tests/test_*.py

test: $(STAMP)  ## all tests: four to ten minutes on two cores (N=8: on eight)
	$(TESTS)

check: $(STAMP)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## run the benchmarks, then the table of targets (SIZE=full: hours; JSON in bench/)
	$(BIN)/python benchmarks/run.py --out bench --size $(or $(SIZE),quick)

lock: $(STAMP)  ## rewrite requirements.lock from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --constraint constraints.txt -o requirements.lock

clean:  ## remove what the demo, tests and benchmarks made (not .venv)
	rm -rf demo bench bench_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
