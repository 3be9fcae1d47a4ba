# Each target finds a Python that has what it needs, or makes .venv with pip first (a minute or two, once).
#   make train    the network learns the embedded digits      ARGS="--epochs 5" passes flags on
#   make test     the tests, in one process more than there are cores (JOBS=4: in four); make test-all adds the long ones
#   CONSTRAINTS=  installs the newest of everything instead of the versions of constraints.txt
#   make bench    the benchmarks; make report turns their records into tables

SHELL := /bin/bash
comma := ,
VENV := .venv

# Versions that the tests passed with; CONSTRAINTS= takes the newest that there are.
CONSTRAINTS := constraints.txt

# Asks the Python $(1) whether it has the modules $(2) and a PyTorch that pyproject.toml allows; tomllib came with 3.11.
has = $(1) -c 'import re, sys, tomllib, importlib.metadata as m, importlib.util as u; \
	numbers = lambda text: [*map(int, re.search(r"(\d+)\.(\d+)", text).groups())]; \
	least = re.search("torch>=[0-9.]+", open("pyproject.toml").read())[0]; \
	sys.exit(not all(map(u.find_spec, "$(2)".split())) or numbers(m.version("torch")) < numbers(least))' 2>/dev/null
RUN_MODULES := torch numpy pandas tabulate matplotlib PIL safetensors tqdm $(if $(filter Linux,$(shell uname -s)),triton)
TEST_MODULES := $(RUN_MODULES) pytest pytest_benchmark pytest_timeout hypothesis xdist onnx onnxruntime
# The number of test processes: one more than there are cores, since some tests wait.
JOBS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
SHARED := -n $(JOBS) --maxprocesses 16 --dist worksteal
LINT_MODULES := $(RUN_MODULES) ruff mypy pytest

# Sets the shell variable python: $(VENV) if it has the modules $(1), else the Python that is there if it has them, else
# $(VENV) after installing $(2) into it.
define find_python
set -e; \
if $(call has,$(VENV)/bin/python,$(1)); then python=$(VENV)/bin/python; \
elif [ -z "$(FRESH)" ] && $(call has,python3,$(1)); then python=python3; \
else \
	if ! $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
		for base in python3 python3.14 python3.13 python3.12 python3.11; do \
			$$base -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; base=; \
		done; \
		if [ -z "$$base" ]; then echo "error: Python 3.11 or newer is needed and none is on the PATH" >&2; exit 1; fi; \
		echo "making $(VENV) with $$($$base --version)"; $$base -m venv --clear $(VENV); \
	fi; \
	echo "installing $(2) and what it needs into $(VENV)$(if $(CONSTRAINTS),$(comma) versions of $(CONSTRAINTS))"; \
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '$(2)'; \
	python=$(VENV)/bin/python; \
fi
endef

.PHONY: train test test-all lint bench report clean

train:
	@$(call find_python,$(RUN_MODULES),.); $$python -m net.train $(ARGS)

test:
	@$(call find_python,$(TEST_MODULES),.[test]); $$python -m pytest $(SHARED) $(ARGS)

test-all:
	@$(call find_python,$(TEST_MODULES),.[test]); $$python -m pytest $(SHARED) -m "slow or not slow" $(ARGS)

lint:
	@$(call find_python,$(LINT_MODULES),.[test]); \
	$$python -m ruff format --check . && $$python -m ruff check . && $$python -m mypy

bench:
	@$(call find_python,$(TEST_MODULES),.[test]); $$python -m pytest --benchmark-only $(ARGS)

report:
	@$(call find_python,$(TEST_MODULES),.[test]); $$python -m bench.report $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
