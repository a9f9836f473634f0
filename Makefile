# LCNN Lab. `make lab` and `make test` do everything, set-up included; `make` alone lists the targets.
#
# The first of them makes .venv with the exact versions of requirements.lock, each file checked by its hash (about 3 GB
# to download, 6 GB on disk); after that everything starts at once, until requirements.lock or pyproject.toml changes.
#
#   make lab LAB_ARGS=--read                       the originals, with their outputs; --instructor: with the solutions
#   make lab LAB_ARGS="--no-browser --port 9999"   what `lcnn lab` doesn't know goes to Jupyter
#   make figures FIGURES_ARGS="--only NAME"        only this figure or table, with what is made together with it
#   make test PYTHON=python3.13                    the Python (3.11 or newer) that .venv is made from
#   make test PY=python                            use that Python as it is and make no .venv: for an active conda
#                                                  environment made from environment.yml, say
#   make lab VENV=../elsewhere                     the environment's folder, outside this one
#   make lock LOCK_ARGS=--upgrade                  move every locked version to the newest

PYTHON ?= python3
VENV = .venv
READY :=
ifeq ($(origin PY),undefined)
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif

.PHONY: help lab test figures doctor notebooks lock clean
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } /^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

lab: $(READY) ## open JupyterLab on your own copy of notebook 01, in my_notebooks/
	@$(PY) -m lcnn_utils lab $(LAB_ARGS)

test: $(READY) ## lint, types, unit tests, every notebook, the browser test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest tests/notebooks tests/browser tests/unit -n logical --dist worksteal $(TEST_ARGS)

figures: $(READY) ## make all figures and tables in figures/ (about three minutes)
	@$(PY) -m lcnn_utils figures $(FIGURES_ARGS)

doctor: $(READY) ## check Python, versions, device, disk and datasets
	@$(PY) -m lcnn_utils doctor

notebooks: $(READY) ## run every notebook again and store it with its outputs
	$(PY) tests/notebooks/execute.py

# Names no package server and no machine: it serves pip and uv, on Linux, macOS and Windows.
lock: $(READY) ## write requirements.lock again from pyproject.toml
	$(PY) -m pip install --quiet uv
	$(PY) -m uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-header \
	  --quiet $(LOCK_ARGS) -o requirements.lock

clean: ## remove the environment and the caches (datasets, figures and trained models stay)
	@if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# The stamp is written last: an interrupted set-up leaves none, and the next call goes on where it stopped.
$(VENV)/.installed: requirements.lock pyproject.toml
	@rm -f $@
	@if ! $(VENV)/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "LCNN Lab needs Python 3.11 or newer, but $(PYTHON) -V says '$$("$(PYTHON)" -V 2>&1 | tail -n 1)': install one and name it, as in: make lab PYTHON=python3.12" >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments (its venv or ensurepip is missing): install them (Debian, Ubuntu: apt install python3-venv), or name another Python, as in: make lab PYTHON=python3.12" >&2; exit 1; }; \
	  echo "== making $(VENV) with $$("$(PYTHON)" -V)"; \
	  if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi; \
	  "$(PYTHON)" -m venv $(VENV) || exit 1; \
	fi
	@echo "== installing requirements.lock into $(VENV): once, about 3 GB to download"
	@trap 'exit 130' INT; \
	{ $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv \
	  && $(VENV)/bin/python -m uv pip install --python $(VENV)/bin/python --compile-bytecode --require-hashes -r requirements.lock; } || { \
	  echo "== uv could not be had, or failed (see above): going on with pip, which takes some minutes"; \
	  $(VENV)/bin/python -m pip install --disable-pip-version-check --require-hashes -r requirements.lock; }
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
