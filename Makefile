# `make` lists the targets. Each one sets up .venv by itself the first time; nothing is installed outside this folder.
#
#   make demo PYTHON=python3.12       choose the Python (3.11 or newer)
#   make demo PIP_ARGS='...'          hand options to pip
#
# On Linux with an x86_64 processor, pip's default build of torch is the one for NVIDIA GPUs: several gigabytes. No GPU is
# needed here. For the small CPU build, put the address that PyTorch's installation page shows for "CPU" into
#   make demo PIP_ARGS='--extra-index-url ADDRESS'
# pip then prefers the CPU build of the pinned release. A pip.conf or PIP_EXTRA_INDEX_URL does the same for good.

PYTHON   ?=
PIP_ARGS ?=
# Test workers: as many as there are cores, at most this many. Each may hold the language model (1 GB).
WORKERS  ?= 4

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help demo labs run-labs test check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## build lab 1, grade a sample class of twelve, write the class report
	@$(BIN)/fewer demo

labs: $(STAMP) ## build the students' notebooks from solutions/
	@$(BIN)/fewer build

run-labs: $(STAMP) ## run every lab from top to bottom with its solutions, timed
	@failed=; \
	for lab in solutions/lab*.py; do \
	  echo "== $$lab"; begin=$$(date +%s); \
	  MPLBACKEND=Agg $(BIN)/python "$$lab" || failed="$$failed $$lab"; \
	  echo "== $$lab: $$(( $$(date +%s) - begin )) s"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

# One thread each: the workers already fill the cores, and two threads beside a busy neighbour can be slower than one.
test: $(STAMP) ## run all tests and doctests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses $(WORKERS) --dist loadgroup

# Every step runs, so that one look shows everything there is to mend.
check: $(STAMP) ## format, lint, types, and that no generated file is stale
	@failed=; \
	step() { echo "== $$*"; "$(BIN)/$$@" || failed="$$failed; $$*"; }; \
	step ruff format --check . ; \
	step ruff check --output-format concise . ; \
	step mypy ; \
	step fewer build --check ; \
	if [ -n "$$failed" ]; then echo "make check failed in:$${failed#;}"; exit 1; fi; \
	echo "make check: all is well"

format: $(STAMP) ## format the code and mend what the linter can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean: ## remove .venv, caches and build output; never anybody's work
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lib autograder tests solutions benchmarks slides -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp is written last: an interrupted installation is taken up again by the next make.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	new_enough() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	if ! new_enough $(BIN)/python; then \
	  for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    if new_enough "$$python"; then break; fi; python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "fewer needs Python 3.11 or newer, and found none as: $(or $(PYTHON),python3 python3.13 python3.12 python3.11)"; \
	    echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(firstword $(MAKECMDGOALS))"; exit 1; \
	  fi; \
	  if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	    echo "$$python cannot make virtual environments (its venv or ensurepip module is missing)."; \
	    echo "On Debian and Ubuntu: sudo apt install python3-venv"; exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV); \
	fi; \
	begin=$$(date +%s); \
	echo "Installing the course into $(VENV): 2 to 5 minutes the first time, seconds afterwards (see the Makefile's head for pip options)"; \
	$(PIP) -e '.[dev]'; \
	$(PIP) -e '.[dev,peers]' || { \
	  echo "The optional peers (transformers, torchao, scipy, ml_dtypes) could not be installed; pip says why above."; \
	  echo "All goes on without them: the tests that compare with them are skipped."; }; \
	touch $@; \
	echo "Installed in $$(( $$(date +%s) - begin )) s"
