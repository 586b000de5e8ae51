# `make demo` opens the app on the shipped checkpoint, `make test` runs the tests; both set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKERS ?= 2
CHECK := import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")

.PHONY: help demo test lint exactness bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## open the live-memory app (ARGS="--port 8000" for another port)
	$(BIN)/python -m serve.app $(ARGS)

test: $(VENV)/dev.stamp ## run the tests, two files at a time (SLOW=1 for the slow ones, too, ARGS="-k generation" for some)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(if $(SLOW),,-m "not slow") $(ARGS)

lint: $(VENV)/dev.stamp ## check format and style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

exactness: $(VENV)/dev.stamp ## print every exactness claim with its measured error
	$(BIN)/python -m benchmarks.exactness $(ARGS)

bench: $(VENV)/dev.stamp ## print how fast the layer is, beside its peers (ARGS="--help" for what there is)
	$(BIN)/python -m benchmarks.speed $(ARGS)

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

$(VENV)/demo.stamp: EXTRAS := cpu,serve
$(VENV)/demo.stamp: STAMPS := demo.stamp
$(VENV)/dev.stamp: EXTRAS := cpu,serve,train,search,tensorboard,traces,keras,ecosystem,dev
$(VENV)/dev.stamp: STAMPS := dev.stamp demo.stamp # all that the demo needs is there, too
$(VENV)/%.stamp: pyproject.toml constraints.txt
	@$(BIN)/python -c 'import pip; $(CHECK)' 2>/dev/null || { $(PYTHON) -c '$(CHECK)' && $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $(addprefix $(VENV)/,$(STAMPS))
