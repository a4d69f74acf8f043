# Commands for working on pcnb. Each makes the environment it needs in .venv on its first run.
#   make train ARGS="--epochs 3"    options for `pcnb train`; ARGS=--resume continues the last run
#   make train RECIPE=mnist-mlp     another recipe
#   make test EXTRAS=dev,cuda       install for an NVIDIA GPU too
#   make test PYTHON=python3.12     a Python of your choice for .venv

PYTHON     ?=
EXTRAS     ?= dev
RECIPE     ?= digits
OUT        ?= runs/$(RECIPE)
ARGS       ?=
NB         ?=
NB_WORKERS ?= 2

# Compiles in half the time on a CPU; left out where XLA does not know it.
PLAIN := --xla_cpu_use_fusion_emitters=false

BIN   := .venv/bin
comma := ,
READY := .venv/.installed-$(subst $(comma),-,$(EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help train test notebooks export readme docs clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

train: $(READY) ## train a small network on the digits set; results in runs/digits
	$(BIN)/pcnb train $(RECIPE) --out $(OUT) $(if $(findstring --resume,$(ARGS)),,--overwrite) $(ARGS)

# The workers share a GPU where there is one, so none of them may claim all its memory at the start.
test: export XLA_PYTHON_CLIENT_PREALLOCATE ?= false
# Nor may it round what it multiplies: the tests compare to float32.
test: export JAX_DEFAULT_MATMUL_PRECISION ?= float32
# Most of the time goes into compiling programs that run once: the machine code need not be fast, and what is compiled is kept.
test: export JAX_DISABLE_MOST_OPTIMIZATIONS ?= 1
test: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax-cache
test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
test: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
test: $(READY) ## run the tests in the notebooks, then those in tests/
	@if XLA_FLAGS="$(PLAIN)" $(BIN)/python -c 'import jax; jax.devices()' >/dev/null 2>&1; then export XLA_FLAGS="$$XLA_FLAGS $(PLAIN)"; fi; set -ex; \
	$(BIN)/nbdev_test --n_workers $(NB_WORKERS); \
	$(BIN)/python -m pytest -q -n $(NB_WORKERS) --dist loadfile --no-loadscope-reorder tests

notebooks: $(READY) ## run all notebooks, or NB="00_network 01_energy", and store their outputs
	$(BIN)/python tools/run_notebooks.py $(NB)

export: $(READY) ## write pcnb/ from the notebooks, and clean their metadata
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: $(READY) ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

docs: $(READY) ## write the notebooks as HTML pages to _docs/
	$(BIN)/python tools/docs.py

clean: ## remove what was built, but neither .venv nor runs/
	rm -rf build dist _proc _docs *.egg-info .hypothesis .pytest_cache .jax-cache nbs/nbdev.yml nbs/sidebar.yml
	find pcnb nbs tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +

# python3 comes first, so that an activated environment is respected.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "$$python -m venv .venv"; exec $$python -m venv .venv; \
	  fi; \
	done; \
	echo "pcnb needs Python 3.11 or newer with venv (on Debian and Ubuntu the package python3-venv); $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1 | head -n 1)." >&2; \
	echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1

$(READY): settings.ini setup.py | $(BIN)/python
	@echo "installing pcnb with its dependencies in .venv: a minute or more"
	$(BIN)/python -m pip install -qq -e '.[$(EXTRAS)]'
	@touch $@
