# Two commands matter: `make demo` and `make test`. `make help` lists the rest.
# Tests come in three tiers, which the markers in pyproject.toml decide: check, test, test-all.
.DEFAULT_GOAL := help
.PHONY: help demo serve check lint types unit test test-all lock quantizing bench bench-forgetful bench-settings rehearse-7b gpu-check train-demo clean
SHELL := /bin/bash

ifneq (1,$(words $(CURDIR)))
$(error make cannot work in a folder whose path has spaces ($(CURDIR)): move the checkout)
endif

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := out
EXPORT_DEMO = $(BIN)/python export/build_engines.py --checkpoint training/demo --clip-checkpoint training/demo/clip \
  --target cpu --repository model_repository
# The environment of the image in deploy/, or any other that has vLLM and TensorRT; here it says what is missing.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# The CPU build of torch: from a local wheel folder if PIP_FIND_LINKS names one that holds it for this Python, else from
# PyTorch's own CPU index.
TAG := $(shell $(PYTHON) -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
LOCAL_TORCH := $(firstword $(foreach folder,$(PIP_FIND_LINKS),$(wildcard $(folder)/torch-*cpu-$(TAG)-*.whl)))
TORCH_FROM := $(if $(LOCAL_TORCH),$(addprefix --find-links ,$(PIP_FIND_LINKS)),--torch-backend cpu)
# The exact versions that are tested; `make LOCK= ...` takes the newest releases instead.
LOCK ?= locks/cpu.txt
INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python $(TORCH_FROM) --override overrides.txt \
  $(if $(LOCK),--constraints $(LOCK) --build-constraints $(LOCK))
# llm-compressor wants other versions of transformers, compressed-tensors and NumPy than vLLM and Triton.
QUANTIZING := $(VENV)/quantizing

help:  ## list what can be made
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/serving  ## export the demo model, serve it, ask about a real MRI scan, draw a mask, rank reports, stop
	@$(EXPORT_DEMO)
	@$(BIN)/python examples/first_answer.py --repository model_repository --out $(OUT)

serve: $(VENV)/serving  ## export the demo model and serve it until Ctrl-C
	@$(EXPORT_DEMO)
	@$(BIN)/m3d serve --target cpu --repository model_repository

check: $(VENV)/testing  ## lint, format, types and unit tests (90 seconds)
	@$(MAKE) --no-print-directory --jobs --output-sync=target lint types unit

lint:
	@$(BIN)/ruff check --quiet && $(BIN)/ruff format --check --quiet && echo "ruff: nothing to mend"

types:
	@$(BIN)/python -m mypy

unit:
	@$(BIN)/python -m pytest -m "not integration and not slow"

test: $(VENV)/testing  ## run the test suite: unit tests, and a real Triton, vLLM and export (20 minutes)
	@$(BIN)/python -m pytest

# Only quantization needs llm-compressor's environment.
test-all: $(VENV)/testing $(if $(filter-out quantization,$(GROUP)),,$(QUANTIZING)/ready)  ## run what takes long: all of it, or GROUP=matrix, sizes, quantization, pythons, fuzz, soak, faults or releases
	@$(BIN)/python -m pytest -m "slow$(if $(GROUP),(group='$(GROUP)'))"

lock: $(VENV)/testing  ## write locks/, the exact versions that are installed; UPGRADE=1 takes the newest releases
	@$(BIN)/python locks/lock.py $(if $(UPGRADE),--upgrade)

quantizing: $(QUANTIZING)/ready  ## install llm-compressor, in an environment of its own, for --llm-quantization

gpu-check:  ## what holds on this GPU, in 8 minutes: runs what the machine has, and lists what was not run (deploy/README.md)
	@$(GPU_PYTHON) deploy/gpu_check.py --out $(OUT)/gpu-check

bench: $(VENV)/testing  ## measure latency against eager PyTorch and the machine's floor (10 to 25 minutes, nothing beside it)
	@$(BIN)/python benchmarks/make_checkpoint.py --llm 135m $(OUT)/bench/checkpoint --clip $(OUT)/bench/clip
	@$(BIN)/python benchmarks/latency.py --checkpoint $(OUT)/bench/checkpoint --clip-checkpoint $(OUT)/bench/clip \
	  --repository $(OUT)/bench/model_repository --json $(OUT)/bench/latency.json --plots $(OUT)/bench

bench-forgetful: $(VENV)/testing  ## after `make bench`: the same, short, with room for one study: the follow-up must miss its target
	@rm -rf $(OUT)/bench/forgetful && cp -r $(OUT)/bench/model_repository $(OUT)/bench/forgetful
	@printf '[study]\nstudy_store_mb = 16\n' > $(OUT)/bench/forgetful/settings.toml
	@$(BIN)/python benchmarks/latency.py --checkpoint $(OUT)/bench/checkpoint --clip-checkpoint $(OUT)/bench/clip \
	  --repository $(OUT)/bench/forgetful --baseline fp32 --repeats 3 --tokens 16 --concurrency 1 --seconds 0 \
	  | tee $(OUT)/bench/forgetful.txt || true  # what needs two scans at once fails
	@grep -q 'follow-up, time to first token.*MISSED' $(OUT)/bench/forgetful.txt && echo 'the follow-up misses, as it must'

bench-settings: $(VENV)/testing  ## after `make bench`: precisions of the encoders, vLLM's settings (10 minutes, nothing beside it)
	@$(BIN)/python benchmarks/encoders.py --checkpoint $(OUT)/bench/checkpoint --repository $(OUT)/bench/model_repository \
	  --json $(OUT)/bench/encoders.json
	@$(BIN)/python benchmarks/decode.py --repository $(OUT)/bench/model_repository --json $(OUT)/bench/decode.json

rehearse-7b: $(VENV)/testing  ## export, serve and ask a random model of the published 7B's size (20 GB of memory, 40 of disk)
	@$(BIN)/python benchmarks/make_checkpoint.py --llm 7b $(OUT)/7b/checkpoint
	@$(BIN)/python benchmarks/latency.py --checkpoint $(OUT)/7b/checkpoint --baseline '' --repeats 1 --warm-up 0 \
	  --tokens 16 --concurrency 1 --seconds 0 --json $(OUT)/7b/latency.json

# Processes of one thread each are faster on a CPU than one of several threads: nothing spins at barriers. Memory is kept
# and comes in huge pages: else a third of a step goes into page faults.
TRAIN := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE THP_MEM_ALLOC_ENABLE=1 MALLOC_MMAP_MAX_=0 \
  MALLOC_TRIM_THRESHOLD_=100000000000 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2
DEMO := training/configs/demo

train-demo: $(VENV)/testing  ## train the demo model again, all stages, going on where it stopped; then measure it (long)
	@$(TRAIN) training/pretrain_segvol.py $(DEMO)/1_pretrain_segvol.json
	@$(TRAIN) training/pretrain_segvol.py $(DEMO)/2_refine_segvol.json
	@$(TRAIN) training/align_projector.py $(DEMO)/3_align_projector.json
	@$(TRAIN) training/finetune.py $(DEMO)/4_learn_boxes.json
	@$(TRAIN) training/finetune.py $(DEMO)/5_finetune.json
	@$(BIN)/python training/merge_lora.py $(DEMO)/6_merge_lora.json
	@$(TRAIN) training/pretrain_clip.py $(DEMO)/7_pretrain_clip.json
	@mkdir -p training/demo/clip
	@find $(OUT)/training/demo/6_merged -type f ! -name run.json -exec cp {} training/demo/ \;
	@cp $(OUT)/training/demo/7_pretrain_clip/final/* training/demo/clip/
	@$(TRAIN) training/evaluate.py $(DEMO)/8_evaluate.json

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(OUT) model_repository/manifest.json model_repository/*/1/model.onnx* model_repository/*/1/*.plan \
	  model_repository/*/1/layers.txt model_repository/*/configs/tensorrt.pbtxt \
	  model_repository/decoder/1/llm model_repository/retrieval/1/tokenizer

$(VENV)/bin/uv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)) and \
	  f"Python 3.11 or 3.12 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@echo "making the environment in $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet uv $(addprefix --constraint ,$(LOCK))

$(VENV)/serving: pyproject.toml overrides.txt $(LOCK) engine/runtime/cpu/decode_kernel.c | $(VENV)/bin/uv
	@echo "installing what serving on a CPU needs ..."
	@$(INSTALL) --editable '.[cpu]'
	@$(BIN)/python -m engine.runtime.cpu.compile_kernel || true  # it says why not, and all works without
	@touch $@

$(VENV)/testing: $(VENV)/serving
	@echo "installing what training, benchmarks and tests need ..."
	@$(INSTALL) --editable '.[cpu,train,bench,test,tensorrt-rtx]'
	@touch $@

$(QUANTIZING)/ready: export/quantizing.txt locks/quantizing.txt | $(VENV)/bin/uv
	@echo "installing llm-compressor in $(QUANTIZING) ..."
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python $(QUANTIZING)
	@$(BIN)/uv pip install --quiet --python $(QUANTIZING)/bin/python $(TORCH_FROM) --override export/quantizing.txt \
	  --constraints locks/quantizing.txt --requirements export/quantizing.txt
	@touch $@
