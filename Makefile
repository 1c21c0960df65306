# Everything a newcomer needs: `make run` asks a real question, `make test` proves the whole.
#
# On a machine with a GPU the first install brings the CUDA build of torch. For the CPU build:
#   make run PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin
QUESTION ?= What is the capital of France, and what is it known for?

.DEFAULT_GOAL := help
.PHONY: help run test check format protos clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# torch first and alone, so that no other package's requirement can pull in another build of it.
$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a minute or two; about 2 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) --progress-bar on -c constraints.txt torch
	$(BIN)/pip install $(PIP_FLAGS) --progress-bar on -c constraints.txt -e '.[dev]'
	@touch $@

run: $(VENV)/installed ## start a cluster on this machine, ask it a question, show where the time went
	@$(BIN)/python -m launch.demo "$(QUESTION)"

test: $(VENV)/installed ## run the whole test suite
	$(BIN)/python -m pytest

check: $(VENV)/installed ## format, lint, types, imports between rooms, generated stubs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m protos.generate --check

format: $(VENV)/installed ## format the code and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/installed ## generate the stubs from the .proto files
	$(BIN)/python -m protos.generate

clean: ## remove the virtual environment and what tools left behind
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
