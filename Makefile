# Every target makes .venv by itself; `make PYTHON=python3.12 test` takes another interpreter.
PYTHON ?= python3
BIN = .venv/bin
INSTALLED = .venv/.installed
READY = .venv/.ready

.PHONY: test test-slow lint docs format bench bench-gpu demo clean

test: $(READY)  ## the tests of every day
	$(BIN)/python -m pytest

test-slow: $(READY)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: $(READY)  ## format, style, types, layers, the site's links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) docs

docs: $(READY)  ## the site, in docs/_build/html; a dead link or a name that is gone ends it
	$(BIN)/python -m sphinx --quiet --fail-on-warning --nitpicky docs docs/_build/html

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## the budgets, as ratios measured in one run; writes benchmarks/results/
	$(BIN)/python -m benchmarks

bench-gpu: $(READY)  ## the same on a GPU, after a check of its bits; under eight minutes
	$(BIN)/python -m benchmarks gpu

demo: $(INSTALLED)  ## a whole federation in half a minute, with a tiny model that comes along
	$(BIN)/fedkseed demo

clean:
	rm -rf .venv build dist docs/_build

# torch by its exact version first, of which pip takes a build for the CPU alone where it is shown one (docs/quickstart.md)
$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into .venv what fedkseed needs: some minutes the first time; on Linux torch alone may be gigabytes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $(INSTALLED)

# what tests, documents and baselines need beside it
$(READY): $(INSTALLED)
	@echo "installing into .venv what tests and documents need"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,flower,baselines]'
	touch $(READY)
