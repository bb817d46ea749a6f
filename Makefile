# `make demo` and `make test` are all that a fresh machine needs: both set up first.
PYTHON ?= python3.11
VENV := .venv
UV := $(VENV)/bin/uv
RUN := $(VENV)/bin

.PHONY: setup demo test check format bench chaos clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml uv.lock
	test -x $(UV) || { $(PYTHON) -m venv $(VENV) && $(VENV)/bin/pip install -q --disable-pip-version-check uv; }
	$(UV) sync -q --frozen --compile-bytecode
	touch $@

demo: setup
	PATH="$(CURDIR)/$(RUN):$$PATH" sh examples/demo.sh

test: setup
	$(RUN)/pytest -n 4

check: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

format: setup
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

bench: setup
	$(RUN)/python benchmarks/run.py

chaos: setup
	$(RUN)/python tests/chaos/storm.py

clean:
	rm -rf $(VENV)
