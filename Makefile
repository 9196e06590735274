# Everything a developer does here, by name; `make` alone lists it.

PYTHON ?= python3
ARGS ?=
# How long `make soak` lasts.
MINUTES ?= 30
# How often `make chaos` plays each fault of its table.
ROUNDS ?= 3
# A CPU-only wheel index to take torch from, where the CUDA libraries (gigabytes on Linux) are of no use.
TORCH_INDEX_URL ?=
IMAGE ?= llm-service
# cpu or cuda: the target of the Dockerfile.
TARGET ?= cpu
# What formats and checks the chat page's JavaScript; a new version formats differently.
BIOME := @biomejs/biome@2.6.8

# Set in many containers; here every service and worker that a test starts would compile the code again.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
comma := ,
PY := $(VENV)/bin/python
# Twice quiet: errors only.
QUIET := --quiet --quiet --disable-pip-version-check
PIP_INSTALL := $(PY) -m pip install $(QUIET) --constraint constraints.txt
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
TORCH = $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

# Empty when $(PYTHON) can make the virtual environment, else what is wrong with it.
PYTHON_PROBLEM = $(strip $(shell \
	command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found"; exit; }; \
	$(PYTHON) -c 'import sys, importlib.util as u; \
		fit = (3, 11) <= sys.version_info[:2] < (3, 14); \
		print("$(PYTHON) is %d.%d" % sys.version_info[:2] if not fit else \
			"" if u.find_spec("ensurepip") else "$(PYTHON) has no venv module (Debian: apt-get install python3-venv)")' \
		2>/dev/null || echo "$(PYTHON) does not run"))
NEED_PYTHON = $(if $(PYTHON_PROBLEM),$(error Needs Python 3.11, 3.12 or 3.13, but $(PYTHON_PROBLEM). Name another with PYTHON=python3.12))

.DEFAULT_GOAL := help
.PHONY: help install run test coverage test-native test-triton check check-all format-check lint lint-page vendor-page type-check imports lock-check format lock bench bench-overhead bench-remote bench-access load soak test-long test-clients test-vllm mlflow-server chaos fuzz \
	build-docker run-docker stop-docker logs audit sbom licenses wheel docs clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed ## Make .venv and install the service (TORCH_INDEX_URL=... takes torch from there)
	@echo "Installed: make run starts the service"

run: $(VENV)/.installed ## Start the service, after installing it if need be (ARGS="--port 9000")
	@exec $(PY) -m app serve $(ARGS)

# Four for two cores: many tests wait for a process that starts, a clock or a disk.
PYTEST := $(PY) -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-dev ## Run the tests (ARGS="tests/unit -k cache")
	@$(PYTEST) $(ARGS)

coverage: $(VENV)/.installed-dev ## Run the same tests, and fail where they run less than 95 % of the code
	@$(PYTEST) --cov=app --cov-report=term --cov-report=html $(ARGS)

mlflow-server: $(VENV)/.installed-dev ## Install the MLflow server that some tests start, in .cache (850 MB); without it they are skipped
	@$(PY) -m tests.services.mlflow_server

test-native: $(VENV)/.installed-dev ## Run the C++ tests of the kernels under sanitizers (needs g++, clang, libomp)
	@$(PY) -m tests.native.run

test-triton: $(VENV)/.installed-dev ## Run the GPU's Triton kernels interpreted, and compile them for GPUs (Triton is installed in .cache, 700 MB; no GPU needed)
	@$(PY) -m tests.triton.run $(ARGS)

# In the order of cost.
check: lock-check format-check lint lint-page imports type-check ## Run every check that is not a test

check-all: check test ## Run every check, and the tests

lock-check: $(VENV)/.installed-dev ## Is the lock in step with pyproject.toml, constraints.txt and requirements.txt?
	@$(PY) scripts/check_lock.py

format-check: $(VENV)/.installed-dev ## Is the code formatted?
	@$(PY) -m ruff format --check --output-format concise . || { echo "Not formatted: run make format" >&2; exit 1; }

lint: $(VENV)/.installed-dev ## Look for mistakes with ruff, and for words that are not the field's
	@$(PY) -m ruff check .
	@$(PY) scripts/check_words.py

lint-page: ## Is the chat page's JavaScript formatted, and free of mistakes that biome knows? (without npm it is not checked)
	@if command -v npm >/dev/null; then npx --yes $(BIOME) ci --error-on-warnings app/web/page; \
	else echo "There is no npm: the chat page's JavaScript is not checked." >&2; fi

imports: $(VENV)/.installed-dev ## Do imports follow the layers?
	@$(VENV)/bin/lint-imports --no-logo

type-check: $(VENV)/.installed-dev ## Check the types with mypy
	@$(PY) -m mypy

format: $(VENV)/.installed-dev ## Format the code and fix what ruff, and where npm is biome, can fix
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@if command -v npm >/dev/null; then npx --yes $(BIOME) check --write app/web/page; fi

vendor-page: $(VENV)/.installed ## Fetch the JavaScript libraries of the chat page, in the versions of scripts/vendor_page.py (needs npm)
	@$(PY) -m scripts.vendor_page

bench: $(VENV)/.installed-bench ## Measure the service beside vLLM, OpenVINO GenAI, llama.cpp (installed in .cache, 6 GB) and transformers: hours, or minutes with ARGS=--quick
	@peers=; for peer in vllm openvino llama-cpp; do \
		if folder=$$($(PY) -m tests.upstreams.environments $$peer); then peers="$$peers --$$peer $$folder"; \
		else echo "$$peer cannot be installed here, and is left out." >&2; fi; \
	done; \
	$(PY) -m bench.serve $$peers $(ARGS)

bench-overhead: $(VENV)/.installed-dev ## Measure what the service costs beside a bare route (ARGS="--profile FOLDER": where its time goes)
	@$(PY) -m bench.overhead $(ARGS)

load: $(VENV)/.installed-load ## Let 32 people use a running service for a minute (ARGS="--host http://... --users 64 --run-time 5m")
	@$(VENV)/bin/locust --locustfile bench/locustfile.py --headless --only-summary \
		--host http://127.0.0.1:8000 --users 32 --spawn-rate 8 --run-time 1m $(ARGS)

soak: $(VENV)/.installed-dev ## Keep the service busy and see that nothing is left behind (MINUTES=30)
	@$(PY) -m bench.soak --minutes $(MINUTES) $(ARGS)

test-long: $(VENV)/.installed-dev ## The tests that take minutes: whole sweeps, kills and races at full length, MLflow, many examples
	@$(PY) -m pytest --no-cov --hypothesis-profile=thorough -m "soak or hypothesis" $(ARGS)

chaos: $(VENV)/.installed-dev ## Kill, suspend, fill and lock what the service depends on, for minutes, and print what clients saw (ROUNDS=3)
	@$(PY) -m tests.services.fault_report --rounds $(ROUNDS)
	@$(PY) -m pytest --no-cov -m chaos $(ARGS)

fuzz: $(VENV)/.installed-dev ## Send the service thousands of requests, made of its OpenAPI document (FUZZ_SEED=2 makes others) or hostile
	@$(PY) -m pytest --no-cov -m fuzz $(ARGS)

test-clients: $(VENV)/.installed-dev ## Install real clients, OpenAI's to Open WebUI, in .cache and try them (needs node and chromium)
	@$(PY) -m pytest --no-cov -m clients $(ARGS)

test-vllm: $(VENV)/.installed-bench ## Install vLLM's CPU build in .cache (3 GB) and try the service in front of it and of `transformers serve`
	@REQUIRE_SERVICES=1 $(PY) -m pytest --no-cov -m upstreams $(ARGS)

bench-remote: $(VENV)/.installed-dev ## Measure what the service costs in front of another server, beside LiteLLM's proxy (installed in .cache)
	@litellm=$$($(PY) -m tests.upstreams.environments litellm) || echo "LiteLLM's proxy cannot be installed here." >&2; \
	$(PY) -m bench.remote $${litellm:+--litellm "$$litellm"} $(ARGS)

bench-access: $(VENV)/.installed-dev ## Measure what keys, limits, quotas and the log cost a request
	@$(PY) -m bench.access $(ARGS)

# --- Before a release ---

audit: $(VENV)/.installed-release ## Look for known faults of the pinned libraries (asks the package index)
	@$(VENV)/bin/pip-audit --no-deps --progress-spinner off --requirement requirements.txt

sbom: $(VENV)/.installed-release ## Write a bill of materials of the service, dist/sbom.json (CycloneDX)
	@mkdir -p dist
	@grep -v '^-c' requirements.txt | $(VENV)/bin/cyclonedx-py requirements --output-reproducible - > dist/sbom.json
	@echo "dist/sbom.json"

licenses: $(VENV)/.installed-release ## List the licences of the service's libraries
	@$(VENV)/bin/pip-licenses --order=license --format=markdown --packages $$(sed -n 's/^\([a-z0-9.-]*\)==.*/\1/p' requirements.txt)

wheel: $(VENV)/.installed-dev ## Build a wheel in dist; it serves from any folder: llm-service serve
	@$(PY) -m hatchling build --target wheel

docs: $(VENV)/.installed-docs ## Build the documentation as a site in site/; a dead link or anchor is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build
	@echo "To read it: python3 -m http.server --directory site"

clean: ## Remove what tools leave behind; keeps .venv and data
	@rm -rf build dist site htmlcov .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# --- Docker ---

build-docker: ## Build the image for a CPU, or with TARGET=cuda for a GPU, and print its size
	@docker build --target $(TARGET) --tag $(IMAGE) --label org.opencontainers.image.version=$(VERSION) \
		$(if $(TORCH_INDEX_URL),--build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL)) .
	@docker image inspect --format '{{.Size}}' $(IMAGE) | awk '{ printf "$(IMAGE): %.0f MB\n", $$1 / 1000000 }'

run-docker: ## Start the image in the background on 127.0.0.1:8000, with .env if there is one
	@docker run --detach --rm --init $(if $(filter cuda,$(TARGET)),--gpus all) --name $(IMAGE) --publish 127.0.0.1:8000:8000 \
		--read-only --tmpfs /tmp:exec --stop-timeout 40 --cap-drop ALL --security-opt no-new-privileges \
		--volume $(IMAGE)-data:/app/data $(if $(wildcard .env),--env-file .env) $(IMAGE)

logs: ## Follow the log of the running container
	@docker logs --follow $(IMAGE)

stop-docker: ## Stop the container; its data volume stays
	@docker stop $(IMAGE)

# --- Installing ---

# pip is what venv makes last: its absence also tells of one that was interrupted.
$(VENV)/bin/pip:
	@$(NEED_PYTHON)
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

# A line for each step: what is installed, how long it took and how large the environment has become.
define STEP
	@echo "Installing $(1) ..."; began=$$(date +%s); $(2) && \
		echo "  in $$(($$(date +%s) - began)) s; $(VENV) has $$(du -sm $(VENV) | cut -f1) MB"
endef

# torch first and alone, so that it alone may come from another index; --no-deps because such an index has no other library.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(call STEP,$(TORCH) (large: minutes the first time),$(PIP_INSTALL) --no-deps $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(TORCH))
	$(call STEP,the service and its libraries,$(PIP_INSTALL) --editable .)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(call STEP,the development tools,$(PIP_INSTALL) --editable '.[dev]')
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(call STEP,what the benchmark compares with,$(PIP_INSTALL) --editable '.[dev$(comma)bench]')
	@touch $@

$(VENV)/.installed-load: $(VENV)/.installed-dev
	$(call STEP,what makes load,$(PIP_INSTALL) --editable '.[dev$(comma)load]')
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(call STEP,what builds the documentation,$(PIP_INSTALL) --editable '.[dev$(comma)docs]')
	@touch $@

$(VENV)/.installed-release: $(VENV)/.installed-dev
	$(call STEP,what examines a release,$(PIP_INSTALL) --editable '.[dev$(comma)release]')
	@touch $@

# --- Locking ---

POETRY := .cache/poetry/bin/poetry

$(POETRY):
	@$(NEED_PYTHON)
	@echo "Installing poetry in .cache ..."
	@$(PYTHON) -m venv .cache/poetry
	@.cache/poetry/bin/pip install $(QUIET) 'poetry>=2.3,<3' poetry-plugin-export poetry-plugin-pypi-mirror

# poetry does not read pip's settings: the plugin hands it the index that pip uses and keeps that address out of poetry.lock.
lock: $(POETRY) ## Renew poetry.lock, constraints.txt and requirements.txt after a change of pyproject.toml (ARGS=--regenerate takes newer versions)
	@index=$${PIP_INDEX_URL:-$$(.cache/poetry/bin/pip config get global.index-url 2>/dev/null \
		|| .cache/poetry/bin/python -c 'from pip._internal.models.index import PyPI; print(PyPI.simple_url)')}; \
	export POETRY_PYPI_MIRROR_URL=$${index%/}/ POETRY_VIRTUALENVS_CREATE=false; \
	$(POETRY) lock --no-interaction $(ARGS) && \
	{ echo "# Made from poetry.lock by \`make lock\`: not to be edited."; \
	  $(POETRY) export --format constraints.txt --all-extras --without-hashes --without-urls; } > constraints.txt.new && \
	mv constraints.txt.new constraints.txt && \
	{ echo "# Made from poetry.lock by \`make lock\`: not to be edited.  torch asks for the CUDA libraries itself where it needs them."; \
	  echo "-c constraints.txt"; \
	  $(POETRY) export --format requirements.txt --without-hashes --without-urls | grep -Ev '^(nvidia-|cuda-|triton==)'; } \
		> requirements.txt.new && \
	mv requirements.txt.new requirements.txt
	@.cache/poetry/bin/python scripts/check_lock.py
