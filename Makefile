# Each target does all it needs on a machine that has only make and Python 3.11 or newer (with venv).
# Variables one may set on the command line:
#   PYTHON        the interpreter that .venv is made with
#   TORCH_INDEX   an extra package index to take another build of torch from (see the README on GPUs)
#   PYTEST_ARGS   further arguments for pytest, e.g. PYTEST_ARGS='-k cayley'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo docs test test-all coverage test-mcu dist test-dist lint format types clean

BIN := .venv/bin
STAMP := .venv/.installed
EXTRAS := train,data,report,bench,export,docs,dev
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt
# One thread per worker: the workers share the cores among them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	"$$p" -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r t d; do printf '%-9s %s\n' "$$t" "$$d"; done

setup: $(STAMP) ## create .venv and install the pinned dependencies

# torch comes first and alone, so that no other requirement can choose its build.
$(STAMP): pyproject.toml constraints.txt
	@$(if $(PYTHON),,echo 'Python 3.11 or newer is needed and none was found: install one, or name it with make PYTHON=/path/to/python' >&2; exit 1)
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || { echo '$(PYTHON) is no Python 3.11 or newer: name one with make PYTHON=/path/to/python' >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP) ## train on the digits, quantize 8 to 1 bits, certify, choose; writes demo/report.html
	$(BIN)/equipoise demo --out demo --force

docs: $(STAMP) ## the pages of docs/ as a site in build/site, built strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: lint types ## lint, types, and every test but the slow ones
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: lint types ## the same with the slow tests and many more random examples
	$(PYTEST) --hypothesis-profile=thorough $(PYTEST_ARGS)

coverage: $(STAMP) ## the tests of `make test`, counting branches of src; fails under 92 %
	mkdir -p build/coverage
	$(PYTEST) -m 'not slow' --cov= $(PYTEST_ARGS)

test-mcu: $(STAMP) ## exported networks on a Cortex-M in QEMU, bit for bit (needs arm-none-eabi-gcc, qemu-system-arm)
	$(BIN)/python examples/mcu/run.py

dist: $(STAMP) ## the source archive, and the wheel made from it, in dist/
	rm -rf dist
	$(BIN)/python -m build

test-dist: dist ## the wheel in fresh environments of every Python found, with each extra alone (takes long)
	@for p in python3.11 python3.12 python3.13; do \
		if "$$p" -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then "$$p" tests/dist_smoke.py dist || exit 1; \
		else echo "$$p is not there: left out"; fi; done

lint: $(STAMP) ## ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy
	$(BIN)/mypy

clean: ## remove .venv and everything generated
	rm -rf .venv demo build dist src/equipoise.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +
