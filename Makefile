# posttrain: `make run` does the main job, `make test` proves it; both set themselves up.
RECIPE ?= quickstart
PROFILE ?=
FAMILY ?= smollm2-stdlib
BENCH ?= pico training llama.cpp
FORMAT ?= gguf:Q4_K_M
TO ?= ./pulled
posttrain := .venv/bin/posttrain
# A value of the user's as one word for the shell, whatever it holds.
quoted = '$(subst ','\'',$(1))'
profile = $(if $(PROFILE),--profile $(call quoted,$(PROFILE)))

.PHONY: help setup run plan test test-fast test-recipes lint format bench pull up down status doctor schema lock clean

help: ## Say what each target does
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: .venv/.ready ## Make .venv from the lock

# A checkout that was moved or copied still has the paths of its old place in .venv.
ifneq ($(shell head -n 1 .venv/.ready 2>/dev/null),$(CURDIR))
.PHONY: .venv/.ready
endif

# MADE_FROM in infra/setup/__main__.py names the same.
.venv/.ready: requirements.lock pyproject.toml infra/setup.sh $(wildcard infra/setup/*.py infra/*.lock)
	@infra/setup.sh

run: setup ## Run RECIPE (quickstart), in its PROFILE where one is given: from data to publication
	@$(posttrain) run $(call quoted,$(RECIPE)) $(profile)

plan: setup ## Show what `make run` would do
	@$(posttrain) plan $(call quoted,$(RECIPE)) $(profile)

pull: setup ## Fetch FAMILY in FORMAT into TO
	@$(posttrain) pull $(call quoted,$(FAMILY)) --format $(call quoted,$(FORMAT)) --to $(call quoted,$(TO))

test: setup ## Run all tests, those of steps beside all others
	@.venv/bin/python -m pytest -n 2

test-fast: setup ## Run the tests that train nothing
	@.venv/bin/python -m pytest tests/flows tests/registry -m "not slow"

test-recipes: setup ## Run the long tests of the night: every recipe whole in its pico profile, every loss
	@.venv/bin/python -m pytest -m recipes

lint: setup ## Check style, types and who imports whom
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/pyright
	@.venv/bin/lint-imports --no-cache

format: setup ## Format the code
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

bench: setup ## Measure our overhead beside the bare libraries, in one run
	@.venv/bin/python -m tests.bench $(BENCH)

up: setup ## Start Prefect, MLflow and a worker on this machine
	@$(posttrain) up

down: setup ## Stop them
	@$(posttrain) down

status: setup ## Show them
	@$(posttrain) status

doctor: setup ## Prove every native library on this machine
	@$(posttrain) doctor

schema: setup ## Write the JSON Schema that recipes point editors to
	@$(posttrain) schema --to recipes/recipe.schema.json

lock: setup ## Write the lock anew from what is installed
	@.venv/bin/python -m infra.setup.packages

clean: ## Remove .venv (artifacts in .posttrain stay)
	@rm -rf .venv
