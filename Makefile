# The commands of the README; .ci/run calls the same ones.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Model store, logs and instance file of this checkout.
export PAGODA_HOME ?= $(CURDIR)/.pagoda
# torch for this machine: 2.11 or newer, with or without CUDA.
TORCH ?= torch==2.13.0

.PHONY: serve test check install clean bench-compare bench-kernels

serve: $(VENV)/.serve  ## start Triton and the OpenAI frontend with the embedded default model
	@$(BIN)/pagoda pull
	@$(BIN)/pagoda serve --model-repository model_repository $(ARGS)

# Services one after another, as they want the whole machine; everything else on all cores, one thread each. Where a
# test has two threads, the one that waits does not spin on a core that another test wants.
test: $(VENV)/.dev  ## everything in tests/ that this machine can run
	$(BIN)/pagoda pull
	@status=0; \
	$(BIN)/python -m pytest tests/triton $(ARGS) || status=1; \
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --dist worksteal \
	  --ignore tests/triton $(ARGS) || status=1; \
	exit $$status

check: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-compare: $(VENV)/.dev  ## Pagoda beside transformers on this machine
	$(BIN)/pagoda bench compare $(ARGS)

bench-kernels: $(VENV)/.dev  ## every kernel checked, then timed beside its floor and PyTorch (on a CPU: its operations)
	$(BIN)/python -m pagoda_kernels.bench $(ARGS)

install: $(VENV)/.serve

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints/constraints.txt constraints/no-deps.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$(TORCH)" -c constraints/constraints.txt
	$(BIN)/python -m pip install --quiet -e ".[engine,server]" -c constraints/constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps -r constraints/no-deps.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/python -m pip install --quiet -e ".[engine,server,bench,dev]" -c constraints/constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) .pagoda build *.egg-info .mypy_cache .ruff_cache .pytest_cache
