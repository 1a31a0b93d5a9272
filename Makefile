# make setup | demo | demo-real | compare | test | test-fast | test-modern | test-te | test-gpu | test-cluster | bench | docs | lint | clean
# test-cluster: several nodes from namespaces, needs root or user namespaces, minutes
# Variables: SEED=1 RUN=runs/quickstart PYTHON=python3.11

SEED ?= 1
RUN ?= runs/quickstart
VENV := .venv
MODERN := .venv-modern
TE := .venv-te
MODERN_SITE := $(CURDIR)/$(MODERN)/lib/python3.12/site-packages
TE_SITE := $(CURDIR)/$(TE)/lib/python3.12/site-packages
# Transformer Engine looks for CUDA's libraries beside itself or where these variables say.
CUDA_WHEELS := CUDA_HOME=$(MODERN_SITE)/nvidia/cu13 CUDNN_HOME=$(MODERN_SITE)/nvidia/cudnn \
	LD_LIBRARY_PATH=$(MODERN_SITE)/nvidia/cudnn/lib:$(MODERN_SITE)/nvidia/cu13/lib:$(MODERN_SITE)/nvidia/nccl/lib
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-deps --no-compile
# Importing what ranks and engines import checks the packages and compiles only the modules in use: in half the time that
# pip needs for all modules. An engine then starts in half the time where Python may not write bytecode itself.
IMPORTS := import logging; logging.disable(logging.WARNING); import torch, ray, transformers, matplotlib.pyplot, \
	vllm.v1.engine.llm_engine, vllm.v1.worker.cpu_worker, megatron_entropy.trainer.loop, megatron_entropy.rollout.vllm_receiver

comma := ,
# $(call find_python,3.11): the first interpreter of that version on PATH or among pyenv's, or nothing.
find_python = for candidate in python$(1) "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$(1)*/bin/python3 python3; do \
	"$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != ($(subst .,$(comma),$(1))))' >/dev/null 2>&1 \
	&& echo "$$candidate" && break; done

.PHONY: setup demo demo-real compare test test-fast test-modern test-te test-gpu test-cluster bench docs lint clean

setup: $(VENV)/.setup

$(VENV)/.setup: requirements/cpu.txt setup.py
	@python="$(PYTHON)"; [ -n "$$python" ] || python="$$($(call find_python,3.11))"; \
	if [ -z "$$python" ]; then \
		echo "error: no Python 3.11 found; install python3.11, or name one: make setup PYTHON=/path/to/python3.11" >&2; exit 2; \
	fi; \
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then \
		echo "error: $$python is not Python 3.11, for which requirements/cpu.txt is pinned" >&2; exit 2; \
	fi; \
	echo "setting up $(VENV) with $$python ..."; \
	"$$python" -m venv $(VENV)
	@$(VENV)/bin/python $(PIP_INSTALL) -r requirements/cpu.txt
	@$(VENV)/bin/python $(PIP_INSTALL) --no-build-isolation --editable .
	@PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -W ignore -c "$(IMPORTS)" >/dev/null
	@touch $@

$(VENV)/.setup-dev: $(VENV)/.setup requirements/dev.txt requirements/reasoning-gym.txt
	@$(VENV)/bin/python $(PIP_INSTALL) -r requirements/dev.txt
	@$(VENV)/bin/python $(PIP_INSTALL) -r requirements/reasoning-gym.txt \
		|| echo "reasoning-gym is not installed, its tests are skipped: pycosat needs a C compiler" >&2
	@touch $@

DEMO_FLAGS = --overwrite --seed=$(SEED) --model.path=$(RUN)/inputs/model \
	--data.train='["$(RUN)/inputs/train.jsonl"]' --data.eval='["$(RUN)/inputs/eval.jsonl"]'

demo: setup
	$(VENV)/bin/python examples/make_arithmetic.py --out $(RUN)/inputs --seed $(SEED)
	$(VENV)/bin/megatron-entropy train examples/quickstart.toml examples/quickstart_plain.toml --output=$(RUN)-plain $(DEMO_FLAGS)
	$(VENV)/bin/megatron-entropy train examples/quickstart.toml --output=$(RUN) $(DEMO_FLAGS)
	$(VENV)/bin/megatron-entropy report $(RUN) $(RUN)-plain

demo-real: setup
	$(VENV)/bin/python examples/smollm2/prepare.py --out runs/smollm2/inputs --subjects times_tables --seed $(SEED)
	$(VENV)/bin/megatron-entropy train examples/smollm2/times_tables_dapo.toml --overwrite --seed=$(SEED)

compare: setup
	$(VENV)/bin/python tools/compare.py --seeds 1 2 3 --jobs 2 --out runs/compare --page examples/compare

test: $(VENV)/.setup-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile tests/unit tests/kernels tests/fuzz tests/distributed
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile tests/engines

test-cluster: $(VENV)/.setup-dev
	$(VENV)/bin/python -m pytest -q -rP --durations=0 tests/cluster

test-fast: $(VENV)/.setup-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile tests/unit tests/kernels -m "not exhaustive and not slow" --ignore=tests/kernels/test_triton.py

# What this machine measures, on one page: build/bench/README.md. NOTE="what else runs here" goes to the page.
BENCH := build/bench
bench: setup
	$(VENV)/bin/python -W ignore tools/benchmark_scaling.py --out $(BENCH)/scaling --note "$(NOTE)"
	$(VENV)/bin/python -W ignore tools/benchmark_resharding.py --sizes 0.1 --bare-receivers --json $(BENCH)/resharding.json
	$(VENV)/bin/python -W ignore tools/benchmark_memory.py --out $(BENCH)/memory.json
	$(VENV)/bin/python -W ignore kernels/benchmark.py --json $(BENCH)/kernel.json
	$(VENV)/bin/python tools/benchmark_rows.py $(BENCH)

docs: $(VENV)/.setup-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet -d build/docs

$(VENV)/.setup-docs: $(VENV)/.setup requirements/docs.txt
	@$(VENV)/bin/python $(PIP_INSTALL) -r requirements/docs.txt
	@touch $@

test-modern: $(MODERN)/.setup
	$(MODERN)/bin/python -m pytest -q \
		tests/distributed/test_actor.py tests/distributed/test_layouts.py tests/distributed/test_reference.py tests/distributed/test_lora.py tests/distributed/test_checkpoint.py \
		tests/distributed/test_conversion.py tests/distributed/test_fp8_weights.py tests/distributed/test_head_check.py \
		tests/kernels/test_exactness.py

$(MODERN)/.setup: requirements/modern.txt setup.py
	@python="$(PYTHON312)"; [ -n "$$python" ] || python="$$($(call find_python,3.12))"; \
	if [ -z "$$python" ]; then \
		echo "error: no Python 3.12 found; install python3.12, or name one: make test-modern PYTHON312=/path/to/python3.12" >&2; \
		exit 2; \
	fi; \
	echo "setting up $(MODERN) with $$python ..."; \
	"$$python" -m venv $(MODERN)
	@$(MODERN)/bin/python $(PIP_INSTALL) -r requirements/modern.txt
	@$(MODERN)/bin/python $(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

# On a GPU machine: what is installed there, for instance from tools/gpu_bundle.sh. PYTHON=python3 unless .venv is here.
test-gpu:
	@python="$(PYTHON)"; [ -n "$$python" ] || python="$(VENV)/bin/python"; [ -x "$$python" ] || python="$$(command -v "$$python" || echo python3)"; \
	GPU_RESULTS=build/gpu timeout --foreground 1500 "$$python" -m pytest -q -rs -p no:cacheprovider tests/gpu; \
	code=$$?; echo "results: build/gpu/results.md"; exit $$code

test-te: $(TE)/.setup
	$(CUDA_WHEELS) $(TE)/bin/python -m pytest -q tests/te

$(TE)/.setup: $(MODERN)/.setup requirements/te.txt
	@echo "setting up $(TE) (Transformer Engine is compiled once, for minutes) ..."
	@$(MODERN)/bin/python -m venv $(TE)
	@echo "import site; site.addsitedir('$(MODERN_SITE)')" > $(TE_SITE)/modern.pth
	@grep -v transformer-engine-torch requirements/te.txt > $(TE)/wheels.txt
	@$(TE)/bin/python $(PIP_INSTALL) -r $(TE)/wheels.txt
	@NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 \
		CPLUS_INCLUDE_PATH="$$(printf '%s:' $(TE_SITE)/nvidia/*/include $(MODERN_SITE)/nvidia/*/include)" \
		$(TE)/bin/python $(PIP_INSTALL) --no-build-isolation "$$(grep transformer-engine-torch== requirements/te.txt)"
	@touch $@

lint: $(VENV)/.setup-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) $(MODERN) $(TE) build dist *.egg-info kernels/build kernels/*.egg-info .pytest_cache .ruff_cache .hypothesis
