# Every target works on a fresh machine with Python 3.11, git and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files of tests side by side; a test starts up to four processes of its own.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup train finetune compare compare-same-lr compare-half compare-more compare-multipliers test test-quick support test-slow test-faults test-hosts test-gpu test-asan test-triton-versions test-tools test-megatron-new test-deepspeed-versions test-pythons wheel reliability checkpoint-matrix docs lint release clean bench bench-kernels bench-small bench-muon bench-gpu bench-communication bench-fused-step bench-safety-checks bench-checkpoints bench-end-to-end bench-data

setup: $(STAMP)

$(STAMP): constraints.txt setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[deepspeed,megatron,hf,launch,data,dev,docs]"
	touch $(STAMP)

train: setup
	$(BIN)/python launch/prepare_data.py --run configs/run/tiny.yaml
	GPUS_PER_NODE=2 launch/cluster/local.sh configs/run/tiny.yaml $(or $(ARGS),--overwrite)

# A Hugging Face LLaMA from a shape, trained on Python's library, then tuned on Python's manual; ARGS go to the tuning.
FINETUNE := --deepspeed configs/hf/finetune.json --per_device_train_batch_size 16 --warmup_steps 20 --save_steps 50 --eval_strategy steps --eval_steps 20
finetune: setup
	$(BIN)/python launch/prepare_data.py --run configs/run/tiny.yaml
	test -f runs/finetune/base/summary.json || $(BIN)/deepspeed --num_gpus 2 launch/finetune_hf.py $(FINETUNE) \
		--model configs/model/tiny.yaml --tokenizer data/tiny/tokenizer.json --source stdlib \
		--learning_rate 4e-3 --max_steps 300 --output_dir runs/finetune/base
	$(BIN)/deepspeed --num_gpus 2 launch/finetune_hf.py $(FINETUNE) \
		--model runs/finetune/base --source pydoc --learning_rate 1.6e-3 --max_steps 100 --output_dir runs/finetune/tuned $(ARGS)

# Eight optimizers, each with its own sweep, seeds and ablations; goes on where it was stopped. QUICK=1: 15 minutes.
# PLAN=warmup: three of them with a longer warm-up, PLAN=5m: with a larger model, in bf16; each about an hour.
compare: RUN = configs/run/compare$(if $(PLAN),_$(PLAN)).yaml
compare: setup
	$(BIN)/python launch/prepare_data.py --run $(RUN)
	$(BIN)/python -m benchmarks.compare.run --run $(RUN) $(if $(QUICK),--quick) $(ARGS)
	$(BIN)/python -m benchmarks.compare.summary

# An AdamW JSON with only its type changed, at three rates around AdamW's best: 22 runs beside those of the comparison.
compare-same-lr: setup
	$(BIN)/python launch/prepare_data.py --run configs/run/compare.yaml
	$(BIN)/python -m benchmarks.compare.questions.same_rate $(ARGS)

# Does Blockwise Muon reach tuned AdamW's loss in half of its steps? About two hours on two cores; goes on where it stopped.
# PLAN=5m: with four times the parameters; about an hour and a half.
compare-half: RUN = configs/run/compare$(if $(PLAN),_$(PLAN)).yaml
compare-half: setup
	$(BIN)/python launch/prepare_data.py --run $(RUN)
	$(BIN)/python -m benchmarks.compare.questions.half_steps $(if $(PLAN),--plan $(PLAN)) $(ARGS)
	$(BIN)/python -m benchmarks.compare.summary

# SOAP, Lion and the preset "tuned" beside tuned AdamW, 1.26M parameters: about three hours on two cores.
compare-more: setup
	$(BIN)/python launch/prepare_data.py --run configs/run/compare.yaml
	$(BIN)/python -m benchmarks.compare.questions.more_arms $(ARGS)

# Multipliers from the signal-to-noise ratio against "auto", and additions to "tuned": about ten runs of four minutes.
compare-multipliers: setup
	$(BIN)/python launch/prepare_data.py --run configs/run/compare.yaml
	$(BIN)/python -m benchmarks.compare.multipliers.run $(ARGS)

bench: bench-kernels bench-small bench-muon bench-communication bench-fused-step bench-safety-checks bench-checkpoints bench-end-to-end

bench-kernels: setup
	$(BIN)/python -m benchmarks.step.run --docs $(ARGS)

# LoRA, short rows, and thousands of small tensors.
bench-small: setup
	$(BIN)/python -m benchmarks.step.small --docs $(ARGS)

bench-muon: setup
	$(BIN)/python -m benchmarks.step.muon --docs $(ARGS)

bench-gpu: setup
	DS_ACCELERATOR=cuda $(BIN)/python -m benchmarks.step.run --device cuda --docs $(ARGS)

bench-communication: setup
	$(BIN)/python -m benchmarks.costs.communication --docs
	$(BIN)/python -m benchmarks.costs.communication_overhead --docs
	$(BIN)/python -m benchmarks.costs.muon_traffic --docs

bench-fused-step: setup
	$(BIN)/python -m benchmarks.costs.fused_step --docs $(ARGS)

# What the checks of tensors in each step take of it.
bench-safety-checks: setup
	$(BIN)/python -m benchmarks.costs.safety_checks --docs $(ARGS)

# Saves and loads of 1 GB, beside DeepSpeed's.
bench-checkpoints: setup
	$(BIN)/python -m benchmarks.costs.checkpoints --docs $(ARGS)

bench-end-to-end: setup
	$(BIN)/python -m benchmarks.costs.end_to_end --docs $(ARGS)

bench-data: setup
	$(BIN)/python -m benchmarks.costs.prepare_data --docs $(ARGS)

test: setup
	$(PYTEST) -m "not gpu and not slow and not faults and not hosts" tests $(ARGS)

# For the inner loop: without the tests that start processes.
test-quick: setup
	$(PYTEST) -m "not gpu and not slow and not faults and not hosts and not spawns" tests $(ARGS)

support: setup
	WRITE_SUPPORT=1 $(PYTEST) -m "not gpu and not slow and not faults and not hosts" --deselect tests/repo/test_support.py::test_the_page_has_the_rows tests $(ARGS)

test-slow: setup
	$(PYTEST) -m "slow and not gpu" tests $(ARGS)

test-faults: setup
	$(BIN)/python -m pytest -rP tests/launch/test_faults.py $(ARGS)

checkpoint-matrix: setup
	WRITE_CHECKPOINT_MATRIX=1 $(BIN)/python -m pytest -q tests/hosts/deepspeed/test_reshard.py $(ARGS)

# As root, with the packages iproute2 openssh-server pdsh util-linux.
test-hosts: setup
	$(BIN)/python -m pytest -rP tests/launch/test_two_hosts.py $(ARGS)

test-gpu: setup
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest -m gpu tests $(ARGS)

# The C++ kernels compiled with AddressSanitizer, on random segment tables and on replaced tensors; needs g++.
test-asan: setup
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=2 $(BIN)/python -m tests.helpers.asan tests/unit/kernels/test_cpp.py tests/unit/kernels/test_cpp_lion.py tests/unit/kernels/test_close_look.py tests/attacks/test_replaced_tensors.py $(ARGS)

# Every kernel compiled, without a GPU, by each Triton from 3.2 on; ONLY="oldest newest" takes two of them. 200 MB each.
test-triton-versions: setup
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m tests.helpers.gpu_code.versions $(ONLY)

# Megatron-core 0.17 to 0.19, each in a folder of its own; ONLY=newest takes one of them. 21 MB each.
test-megatron-new: setup
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m tests.helpers.versions.megatron $(ONLY)

# DeepSpeed from the oldest promised release on, each in a folder of its own; ONLY=oldest takes one of them.
test-deepspeed-versions: setup
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m tests.helpers.versions.deepspeed $(ONLY)

# Our wheel with DeepSpeed on Python 3.10 to 3.13, each in an environment of its own of up to 7 GB, deleted afterwards (KEEP=1
# keeps it); ONLY="3.10 3.12" takes two. Needs these Pythons, on PATH or by pyenv. Writes docs/versions.csv.
test-pythons: setup
	$(BIN)/python -m tests.helpers.versions.pythons $(ONLY)

# TRL, ms-swift, LLaMA-Factory and axolotl, by their pages in docs/tools, on two ranks each; ONLY=trl takes one. Writes docs/tools.csv.
test-tools: setup
	$(BIN)/python -m tests.helpers.tools.run $(ONLY)

# dist/: a wheel for Linux on x86-64 with compiled CPU kernels, which needs no compiler; and its tests. Needs g++.
wheel: setup
	DS_ACCELERATOR=cpu $(BIN)/python -m tests.helpers.wheels.compiled

# The attacks of tests/attacks; writes docs/reliability.md. TIMES=5: five times as many inputs.
reliability: setup
	ATTACK_TIMES=$(or $(TIMES),1) WRITE_RELIABILITY=1 $(PYTEST) tests/attacks $(ARGS)

# The site, into build/docs; writes the generated pages of docs/reference first. Every warning is an error (not with --quiet, which hides them from --strict too).
docs: setup
	$(BIN)/python -m tests.helpers.pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# sdist and wheel of the present commit in build/release, checked as a user gets them, with notes; nothing is uploaded.
release: setup
	$(BIN)/python -m tests.helpers.wheels.release

clean:
	rm -rf runs data build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
