# Two commands are meant for you: `make demo` and `make test`. Each does all its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
SCENARIOS ?= all

export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test lint bench bench-peers gpu install clean

demo: $(STAMP)  ## train four adapters, push, serve, fuse, swap: the whole of it on the embedded base
	@$(BIN)/hub demo $(DEMO)

test: $(STAMP)  ## every test, two files at a time; pass PYTEST="-k name" to choose, WORKERS=0 for one at a time
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST)

lint: $(STAMP)  ## ruff, mypy --strict, and the storeys of the house
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(STAMP)  ## ours alone: throughput with adapters and without, one stream, memory, cold adapters (minutes)
	@$(BIN)/python -m benchmarks.serving w1 w2 memory cold --only ours --rounds 3 $(BENCH)

bench-peers: $(STAMP)  ## every scenario beside vLLM, llama.cpp, PEFT and OpenVINO, which it installs under .bench (hours)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@$(BIN)/python -m benchmarks.install
	@$(BIN)/python -m benchmarks.serving $(SCENARIOS) $(BENCH)
	@$(BIN)/python -m benchmarks.page

gpu: $(STAMP)  ## all that only a GPU can show: proofs, then figures (under ten minutes)
	@$(BIN)/python -m benchmarks.gpu $(GPU)

install: $(STAMP)

$(STAMP): pyproject.toml server/kernels/native.c server/kernels/native_loops.h \
	server/kernels/native_tiles.h server/kernels/native_coded.h server/kernels/native_terms.h server/kernels/native_adapted.h \
	server/kernels/native_panels.h
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) -V). Try make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
