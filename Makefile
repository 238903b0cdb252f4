# Two commands to know: `make demo` and `make test`. Both set up everything that they need and say what they do.
SHELL := /bin/bash
BIN := .venv/bin
PYTEST := $(BIN)/pytest -q --no-header

.PHONY: help setup demo test test-unit test-faults chaos e2e-cluster lint format crds bench bench-fleet up down clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: ## create .venv and install what is pinned
	@tools/setup

demo: setup ## the tour: cluster up, fine-tune, serve, promote a better adapter, roll back a bad one
	@examples/quickstart/demo

test: setup ## unit, integration (real API server, KubeRay, Ray), end to end; the long faults are test-faults
	@$(BIN)/finetune local build
	@$(BIN)/python -m finetune_local.models
	@$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "not faults"

test-faults: setup ## kills at named points and KILLS (default 50) random ones, API faults, OUTAGE (default 600 s) of the API server, leadership, JOBS (default 3000) passing through: over an hour
	@$(BIN)/finetune local build
	@FINETUNE_TEST_KILLS=$(or $(KILLS),50) FINETUNE_TEST_JOBS=$(or $(JOBS),3000) FINETUNE_OUTAGE_SECONDS=$(or $(OUTAGE),600) $(PYTEST) -m faults

test-unit: setup ## the tests that need no cluster and train nothing
	@$(PYTEST) -n 4 --dist loadfile --no-loadscope-reorder tests/unit

chaos: setup ## faults at random over two fleets of jobs; SEED=n repeats a run, FAULTS=n (default 200) draws more
	@FINETUNE_CHAOS_SEED=$(or $(SEED),$$RANDOM) FINETUNE_CHAOS_FAULTS=$(or $(FAULTS),200) $(PYTEST) -s tests/chaos

e2e-cluster: setup ## real pods: the chart on the cluster that KUBECONFIG (or E2E_CLUSTER, see tools/e2e-cluster) names
	@tools/e2e-cluster

lint: setup ## ruff, mypy --strict, import layers, generated files
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache | tail -n 12
	@$(BIN)/python -m finetune_operator.api.crds --check crds
	@$(BIN)/python -m finetune_operator.api.reference --check
	@$(BIN)/python -m finetune_cli.reference --check
	@$(BIN)/python -m tests.unit.operator.edge_pages --check
	@$(BIN)/python -m tools.chart_pages --check

format: setup ## rewrite the code in the one format
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

crds: setup ## generate crds/, docs/reference/, docs/failure-modes.md and what follows from the chart's rules and values
	@$(BIN)/python -m finetune_operator.api.crds --write crds
	@$(BIN)/python -m finetune_operator.api.reference --write
	@$(BIN)/python -m finetune_cli.reference --write
	@$(BIN)/python -m tests.unit.operator.edge_pages --write
	@$(BIN)/python -m tools.chart_pages --write

bench: up ## measure refusals, and FineTuneJob beside a plain TRL script; writes docs/benchmarks.md
	@$(BIN)/python -m benchmarks.refusals
	@$(BIN)/python -m benchmarks.overhead

bench-fleet: setup ## up to 5,000 jobs at once, KubeRay as the peer and as the real one, 1,000 jobs that report; quiet machine
	@$(BIN)/python -m benchmarks.fleet --jobs 1000 100 1000 5000 --peer 1000 --real 200 --write
	@$(BIN)/python -m benchmarks.report_storm --write

up: setup ## start the laptop cluster
	@$(BIN)/finetune local up

down: ## stop what `make up` started
	@if [ -x $(BIN)/finetune ]; then $(BIN)/finetune local down; fi

clean: down ## stop the cluster and remove .venv and caches of tools; keeps artifacts
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
