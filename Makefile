# The whole developer interface. `make help` lists it; repeated makes only do what is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
MODEL ?= models/TurboSparse-SmolLM2-135M-Q4_0.gguf
PYTEST := $(BIN)/python -m pytest
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo picture test test-models lint format bench clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.runtime ## install the run-time package, then answer, see and compare on the shipped model
	$(BIN)/turbosparse demo --model $(MODEL) --data examples/sample.jsonl

picture: $(VENV)/.runtime ## save the demo's output as docs/images/demo.svg, on a quiet machine
	mkdir -p docs/images
	$(BIN)/turbosparse demo --model $(MODEL) --data examples/sample.jsonl --svg docs/images/demo.svg

test: $(VENV)/.dev ## everything that needs no download
	$(PYTEST)

# Without TURBOSPARSE_TEST_WIKITEXT=FILE (WikiText-2's test.txt) or the extra `bench`, what needs them is skipped.
test-models: $(VENV)/.dev ## what needs the real models: TURBOSPARSE_TEST_MODELS=FOLDER
	@test -d "$$TURBOSPARSE_TEST_MODELS" || { echo "set TURBOSPARSE_TEST_MODELS to the folder of the real GGUF models"; exit 2; }
	$(PYTEST) -m models -rs

lint: $(VENV)/.dev ## ruff, mypy and clang-format, as in CI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.hpp' | xargs -r $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.dev ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.hpp' | xargs -r $(BIN)/clang-format -i

bench: $(VENV)/.runtime ## time the modes on MODEL=FILE
	$(BIN)/turbosparse bench $(MODEL)

clean: ## remove everything that make made
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One environment, made in up to two steps: the run-time package with its native module; for tests, all the rest as well.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "TurboSparse needs Python 3.11 or newer; name one with: make PYTHON=..."; exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "TurboSparse needs a C++20 compiler; install g++ or clang"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: pyproject.toml constraints.txt $(NATIVE_SOURCES) | $(VENV)/.created
	$(PIP) -e .
	@touch $@

# torch by itself first and pinned: resolved together with the rest, pip may choose a build with gigabytes of CUDA packages.
$(VENV)/.dev: pyproject.toml constraints.txt $(NATIVE_SOURCES) | $(VENV)/.created
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.runtime $@
