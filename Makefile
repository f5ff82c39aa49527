# `make help` lists the targets. Each one makes the .venv it needs, once.

PYTHON ?= python3
BENCHMARKS ?= $(addprefix tests/benchmarks/,eight_schools.py hmc.py svi.py train.py evaluate.py digits.py)
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Files of tests run side by side, one a core, and tutorials one by one (tests/conftest.py). With
# threads of their own besides, torch's operations on ten numbers would wait for one another.
# PYTEST_ARGS="-n 0" runs all in one process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test check bench lint style types clean FORCE

help:  ## List the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.has-base  ## Run the main job: four guides beside HMC on Eight Schools
	$(BIN)/pyro-vae compare eight_schools_avb

test: $(VENV)/.has-test  ## Run every test, the slow ones too
	$(PYTEST) $(PYTEST_ARGS)

check: $(VENV)/.has-test  ## Run the tests that take seconds
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

bench: $(VENV)/.has-bench  ## Run the benchmarks (BENCHMARKS="path ..." chooses)
	@set -e; for script in $(BENCHMARKS); do \
		echo "== $$script"; $(BIN)/python $$script; \
	done

lint: style types  ## Check style, format and types

style: $(VENV)/.has-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads neither an editable installation nor `package-dir`: it gets the package installed
# into a folder, where models/ and guides/ have the names under which users import them.
types: $(VENV)/.has-test
	@rm -rf build
	@$(PIP_INSTALL) --no-deps --no-build-isolation --target build/installed .
	cd build && MYPYPATH=installed ../$(BIN)/mypy --config-file ../pyproject.toml \
		--cache-dir ../.mypy_cache -p pyro_vae
	cd build && MYPYPATH=installed:../tests/benchmarks ../$(BIN)/mypy \
		--config-file ../pyproject.toml --cache-dir ../.mypy_cache \
		--allow-untyped-defs --no-warn-unused-ignores ../tests/benchmarks/*.py

clean:  ## Remove the environment, builds and caches (out/ stays)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find pyro_vae models guides tests -name __pycache__ -type d -prune -exec rm -rf {} +

# --- the environment -----------------------------------------------------------------------------
# One .venv; `.has-X` says that the project is installed in it with extra X. `.sound` is absent
# while pip works, so that an installation which was interrupted is started again from nothing.

PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --quiet -c constraints.txt

ifeq ($(wildcard $(VENV)/.sound),)
$(VENV)/.has-base $(VENV)/.has-test $(VENV)/.has-bench: FORCE
endif

$(VENV)/.has-%: pyproject.toml constraints.txt
	@test -e $(VENV)/.sound || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	@rm -f $(VENV)/.sound
	@echo "installing pyro_vae ($*) and what it needs into $(VENV)"
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) --no-build-isolation -e ".$(patsubst [base],,[$*])"
	@touch $(VENV)/.sound $(VENV)/.has-base $@
