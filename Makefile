# Everything a clone needs is Python 3.11+ and a package registry that pip knows; `make run` is the short way in.

PYTHON ?= python3
UV ?= uv
VENV := .venv
BIN := $(VENV)/bin
# Options of the command behind a target, for example: make run ARGS="--api-port 9000"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install install-dev run test check bench bench-full drills lock

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## make .venv with exactly the locked packages, and .venv/bin/scrip

install-dev: $(VENV)/.installed-dev ## the same, with what tests and checks need

run: install ## start everything: Postgres, Temporal with its UI, the worker and the API (Ctrl-C stops it)
	@exec $(BIN)/scrip up $(ARGS)

test: install-dev ## run all tests on real servers
	$(BIN)/pytest -q -n 2

check: install-dev ## lint, format, types, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/lint-imports

bench: install-dev ## the headline figures, about five minutes
	$(BIN)/python -m benchmarks

bench-full: install-dev ## every figure
	$(BIN)/python -m benchmarks --full

drills: install-dev ## break a running system on purpose and prove that nothing happened, about half an hour
	$(BIN)/python -m drills $(ARGS)

lock: ## write the lock files again from pyproject.toml (needs uv; ARGS=--upgrade takes the newest packages)
	echo 'setuptools>=78' | $(UV) pip compile pyproject.toml - $(LOCK_OPTIONS) -o requirements.lock
	echo 'setuptools>=78' | $(UV) pip compile pyproject.toml - --extra dev -c requirements.lock $(LOCK_OPTIONS) \
		-o requirements-dev.lock

# One lock for every platform, with hashes and without a registry's address: pip's own configuration decides that.
LOCK_OPTIONS = --quiet --generate-hashes --universal --python-version 3.11 \
	--no-emit-index-url --no-annotate --custom-compile-command "make lock" $(ARGS)

# The package itself is built with the pinned setuptools, so that nothing outside the lock is ever fetched.
INSTALL_SELF := $(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Scrip needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.lock pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	$(INSTALL_SELF)
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	$(BIN)/pip install --quiet --require-hashes -r requirements-dev.lock
	@$(INSTALL_HLEDGER)
	@touch $@

# The tests of the ledger's export ask hledger too. It is no Python package: where it can't be had, they skip that.
INSTALL_HLEDGER := command -v hledger >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] \
	|| timeout 120 apt-get install -qq -y --no-install-recommends hledger >/dev/null 2>&1 || true
