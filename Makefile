# ft-ray: `make demo` and `make test` set up what is missing. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export PYTHONPATH := $(CURDIR)
ENV := scripts/env.sh | tail -n 1
ARGS ?=
TESTS ?= tests

.PHONY: help env demo test test-faults lint types imports format tree wheel hooks clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

env: ## set up the environment (once, outside the checkout); prints its bin folder as the last line
	@scripts/env.sh

demo: ## everything once on real parts: data, QLoRA, merge, proof, evaluation, endpoint (ARGS="--keep --seed 1")
	@bin=$$($(ENV)); exec "$$bin/python" -m ft_ray demo $(ARGS)

test: ## the test suite, one test at a time (TESTS=tests/unit, ARGS="-k name")
	@bin=$$($(ENV)); PATH="$$bin:$$PATH" exec "$$bin/python" -m pytest -p no:cacheprovider -m "not faults" $(ARGS) $(TESTS)

test-faults: ## machines killed, cut off and filled up for real: all fault and load tests, and how many of them ran
	@bin=$$($(ENV)); FT_RAY_NO_SKIPS=1 PATH="$$bin:$$PATH" exec "$$bin/python" -m pytest -p no:cacheprovider -m "faults or injected" $(ARGS) $(TESTS)

lint: ## ruff: faults
	@bin=$$($(ENV)); "$$bin/ruff" check --quiet ft_ray tests benchmarks scripts && echo "lint: clean"

types: ## mypy --strict on ft_ray
	@bin=$$($(ENV)); "$$bin/mypy"

imports: ## the layers of ft_ray import downwards only
	@bin=$$($(ENV)); "$$bin/lint-imports" --no-logo 2>/dev/null || "$$bin/lint-imports"

format: ## ruff: mend what it can, and sort imports
	@bin=$$($(ENV)); "$$bin/ruff" check --fix ft_ray tests benchmarks scripts

tree: ## rewrite the README's tree of files
	@bin=$$($(ENV)); "$$bin/python" scripts/tree.py

wheel: ## build the wheel into dist/
	@bin=$$($(ENV)); "$$bin/python" -m build --wheel --no-isolation --outdir dist

hooks: ## run the checks of lint, types and imports before every commit
	@bin=$$($(ENV)); PATH="$$bin:$$PATH" "$$bin/pre-commit" install

clean: ## remove what was built or run here (the environment stays: make env says where it is)
	@if [[ -e demo/.ft-ray-demo ]]; then rm -rf demo; fi
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache ./*.egg-info
	@find ft_ray tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
