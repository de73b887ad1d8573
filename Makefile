# `make` lists the targets. Each creates the environment first (scripts/bootstrap.sh); set
# MUOMNI_VENV=DIR to use an existing environment instead of .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := $(abspath $(or $(MUOMNI_VENV),.venv))
# For ninja and the deepspeed launcher; and an existing environment may not have muomni installed.
export PATH := $(VENV)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
# Ranks share the cores, so more threads would only compete.
export OMP_NUM_THREADS ?= 1

# For the test of the demo, apart from the environment: Gradio needs an older Pillow than the lock has.
DEMO_PACKAGES := gradio==6.31.0 playwright==1.65.2

# Tests without the marker `gpu` use CPU ranks even if there is a GPU.
test test-slow parity: export DS_ACCELERATOR := cpu
PYTEST = python -m pytest $(PYTEST_ARGS)
TEST_WORKERS ?= 2

.PHONY: help install quickstart test test-slow test-slurm test-gpu parity fuzz lint types docs fmt lock bench bench-gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## create .venv with the locked versions (once; several GB)
	@scripts/bootstrap.sh

quickstart: install  ## train all stages at nano size on sample data, evaluate, and answer questions
	@scripts/quickstart.sh

test: install  ## the default tests, on CPU (select some with PYTEST_ARGS="-k name")
	@$(PYTEST) -m "not slow and not gpu and not slurm" --numprocesses $(TEST_WORKERS) --dist loadgroup --durations 15

test-slow: install build/demo  ## tests that take minutes each
	@$(PYTEST) -m "slow and not gpu and not slurm"

build/demo: | install
	@python -m pip install --quiet --target $@ $(DEMO_PACKAGES)

test-slurm: install  ## tests that submit jobs to a Slurm cluster of two nodes
	@$(PYTEST) -m slurm

test-gpu: install  ## tests that need CUDA devices; lists each one, and what was skipped
	@$(PYTEST) -m gpu -v -rs

parity: install  ## compare all training layouts with plain PyTorch, into docs/parity.md (PARITY_ARGS="--only sft bf16")
	@python -m tests.parity $(PARITY_ARGS)

fuzz: install  ## decode 10,000 mutated images and audio clips, as sharding and training do (FUZZ_ARGS="--seed 1")
	@python -m tests.data_prep.media.fuzz $(FUZZ_ARGS)

lint: install types docs  ## style, types, spelling, terms, and links, as in CI
	@ruff check .
	@ruff format --check .
	@codespell
	@python scripts/check_terms.py

types: install  ## static types
	@pyright

docs: install  ## the documentation site, into build/site
	@NO_MKDOCS_2_WARNING=1 mkdocs build --strict

fmt: install  ## format the code and apply safe fixes
	@ruff check --fix .
	@ruff format .

lock:  ## upgrade requirements/lock.txt (then run all tests)
	@command -v uv >/dev/null || { echo "make lock needs uv; install it with: pip install uv" >&2; exit 1; }
	@uv pip compile pyproject.toml --extra dev --universal --python-version 3.10 --upgrade --quiet --no-annotate \
		--constraint requirements/pinned.txt --custom-compile-command "make lock" --output-file requirements/lock.txt

bench: install  ## the benchmarks of the README, into benchmarks/results (after quickstart)
	@mkdir -p benchmarks/results
	@python benchmarks/padding.py --json benchmarks/results/padding.json
	@python benchmarks/plan_scale.py --work build/plan_scale --json benchmarks/results/plan_scale.json
	@python benchmarks/reading.py --parts raw --json benchmarks/results/reading_raw.json
	@python benchmarks/reading.py --parts images,audio --json benchmarks/results/reading_decoded.json
	@python benchmarks/resume.py --json benchmarks/results/resume.json
	@python benchmarks/soak.py --data data/sample --json benchmarks/results/soak.json
	@deepspeed --num_gpus 2 benchmarks/step_overhead.py --json benchmarks/results/step_overhead.json
	@deepspeed --num_gpus 2 benchmarks/step_overhead.py --preset tiny --rounds 30 --steps 4 --json benchmarks/results/step_overhead_tiny.json
	@python benchmarks/step_overhead.py --preset tiny --rounds 30 --steps 4 --json benchmarks/results/step_overhead_tiny_one_rank.json
	@deepspeed --num_gpus 2 benchmarks/moe.py --json benchmarks/results/moe.json
	@python -m pip install --quiet --upgrade --no-deps --target build/peers accelerate==1.15.0
	@PYTHONPATH=$(PYTHONPATH):build/peers python benchmarks/thinker_speed.py --json benchmarks/results/thinker_speed_tiny.json
	@PYTHONPATH=$(PYTHONPATH):build/peers python benchmarks/thinker_speed.py --shape gpt2 --no-packing --rounds 8 --steps 1 --json benchmarks/results/thinker_speed_gpt2.json
	@python benchmarks/scaling.py --json benchmarks/results/scaling.json
	@python benchmarks/scaling.py --zero 0 --json benchmarks/results/scaling_zero0.json
	@python benchmarks/perception_speed.py --json benchmarks/results/perception_speed.json
	@python benchmarks/loader.py --run runs/quickstart --json benchmarks/results/loader_nano.json
	@python launch/pipeline.py --preset tiny --run runs/bench_tiny -- --max-steps 10 training.log_every=5
	@python benchmarks/memory.py --upstream runs/bench_tiny --json benchmarks/results/memory.json
	@python benchmarks/loader.py --preset tiny --run runs/bench_tiny --json benchmarks/results/loader_tiny.json

bench-gpu: install  ## what a GPU must decide: attention, compilation, ZeRO settings (GPU_RANKS=2 for two GPUs)
	@mkdir -p benchmarks/results
	@python benchmarks/gpu.py --ranks $(or $(GPU_RANKS),1) --json benchmarks/results/gpu.json

clean:  ## remove caches; keeps .venv, data/ and runs/
	@rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
