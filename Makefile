# One set-up for everything: an environment in $(VENV) with torch, the tools and this package.
#   make build PYTHON=python3.12 VENV=.venv-2.13 TORCH=torch==2.13.0

PYTHON ?= python3
VENV ?= .venv
# A pip requirement. An environment that already satisfies it keeps its torch.
TORCH ?= torch>=2.10
PYTEST_ARGS ?=
PAPER_ARGS ?=
PUBLISHED_ARGS ?=
STOCHASTIC_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
CPP_FILES = $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')

# The extension lies in the source tree (an editable install), so it belongs to one environment at
# a time: installing into another removes this one's stamp.
TOOLS := $(VENV)/.fuse_ext-tools
INSTALLED := build/installed-in-$(subst /,_,$(abspath $(VENV)))
BUILD_INPUTS := setup.py build_backend.py pyproject.toml fuse_ext/_version.py csrc/sources.txt \
    $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')

export FUSE_EXT_WERROR := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help build demo bench paper published stochastic docs integrations test lint format cpp-test sanitize gpu-check clean

help:
	@echo 'make build     set up $(VENV) and build the extension into it; quick when nothing changed'
	@echo 'make demo      train on real data, test functions and a PINN; pictures in examples/out'
	@echo 'make bench     measure against torch on this machine; rewrites benchmarks/README.md (minutes)'
	@echo 'make paper     reproduce the results of the paper; rewrites benchmarks/results/paper (an hour)'
	@echo 'make published published results beside ours; rewrites benchmarks/results/published (a day)'
	@echo 'make stochastic  minibatches: AdamW and others with schedules beside FusePV (half a day)'
	@echo 'make docs      the site of all pages, in build/docs; a warning is an error'
	@echo 'make integrations  tests of FusePV inside Lightning, DeepXDE and others, which it installs'
	@echo 'make test      build, lint, the C++ tests and the Python tests'
	@echo 'make lint      ruff, mypy and clang-format, changing nothing'
	@echo 'make format    let ruff and clang-format rewrite the sources'
	@echo 'make cpp-test  the C++ tests alone; make sanitize runs them under ASan and UBSan'
	@echo 'make gpu-check on a machine with a GPU: CUDA tests, sanitizers, times; writes build/gpu-check.md'
	@echo 'make clean     remove what was built; the environment stays'
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) PYTEST_ARGS=$(PYTEST_ARGS) PAPER_ARGS=$(PAPER_ARGS) PUBLISHED_ARGS=$(PUBLISHED_ARGS) STOCHASTIC_ARGS=$(STOCHASTIC_ARGS)'

build: $(INSTALLED)

# A torch asked for by name is installed even where the environment has another.
ifneq ($(origin TORCH),file)
ifneq ($(shell cat $(TOOLS) 2>/dev/null),$(TORCH))
.PHONY: $(TOOLS)
endif
endif

$(TOOLS):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'error: PYTHON=$(PYTHON) is no Python >= 3.10; name one with make PYTHON=...' >&2; \
	      exit 1; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    echo 'Creating $(VENV)'; $(PYTHON) -m venv '$(VENV)'; fi
	@echo 'Installing $(TORCH) and the build tools into $(VENV) (minutes, the first time)'
	@$(PIP) install -qq '$(TORCH)' 'setuptools>=77' wheel ninja
	@echo '$(TORCH)' > $@

# The extension may also have been removed, or built from elsewhere.
ifeq ($(wildcard fuse_ext/_C.*.so),)
.PHONY: $(INSTALLED)
endif

$(INSTALLED): $(TOOLS) $(BUILD_INPUTS)
	@echo 'Building fuse_ext into $(VENV)'
	@rm -f build/installed-in-*
	@$(PIP) install -qq --no-build-isolation --editable '.[dev]'
	@mkdir -p $(@D) && touch $@

demo: build
	$(BIN)/python examples/digits.py
	$(BIN)/python examples/functions.py
	$(BIN)/python examples/resampling.py

# One after the other, on an otherwise idle machine. The last two count evaluations, not seconds:
# all their cases, a quarter of an hour.
bench: build
	$(BIN)/python -m benchmarks.per_iteration --quick
	$(BIN)/python -m benchmarks.cost_kmd --quick
	$(BIN)/python -m benchmarks.memory --quick
	$(BIN)/python -m benchmarks.time_to_loss --quick
	$(BIN)/python -m benchmarks.robustness
	$(BIN)/python -m benchmarks.minimize
	$(BIN)/python -m benchmarks.switching
	$(BIN)/python -m benchmarks.scaling

# Resumable: runs that are stored in build/paper-cells and still fit are not repeated.
paper: build
	$(BIN)/python -m benchmarks.paper $(PAPER_ARGS)

# Likewise, in build/published-cells; PUBLISHED_ARGS='--rows poisson,heat --minutes 60' does a piece.
published: build
	$(BIN)/python -m benchmarks.published $(PUBLISHED_ARGS)

# Likewise, in build/paper-cells; rivals that are packages come with the extra `bench`.
stochastic: build
	$(BIN)/python -m benchmarks.stochastic $(STOCHASTIC_ARGS)

# fuse_ext is there already: this installs what its extra asks for besides.
docs: build
	$(PIP) install -qq 'fuse_ext[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -b html -c docs . build/docs
	@echo 'The site begins at build/docs/index.html'

# Other people's packages must not bring another torch or other tools than these.
integrations: build
	$(PIP) freeze --exclude-editable > build/constraints.txt
	$(PIP) install -qq --constraint build/constraints.txt 'fuse_ext[integrations]'
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests/integrations

test: build lint cpp-test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# The tools come with the first build; after that, sources that do not compile can be formatted.
.PHONY: tools
tools:
	@test -x $(BIN)/clang-format || $(MAKE) build

lint: tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fuse_ext
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

# $(call ctest,folder,options): configure, build and run the C++ tests.
define ctest
	$(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	    -DCMAKE_BUILD_TYPE=Release --log-level=WARNING $(2)
	$(BIN)/cmake --build $(1) -- --quiet
	$(BIN)/ctest --test-dir $(1) --output-on-failure
endef

cpp-test: build
	$(call ctest,build/cmake)

sanitize: build
	$(call ctest,build/cmake-sanitize,-DFUSE_EXT_SANITIZE=ON)

# Everything that needs a GPU; the report is build/gpu-check.md.
gpu-check: export FUSE_EXT_CUDA := 1
gpu-check: build
	$(BIN)/python -m benchmarks.cuda_check

clean:
	rm -rf build dist fuse_ext.egg-info fuse_ext/_C.*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis examples/out
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
