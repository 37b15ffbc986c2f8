# Two commands set everything up on a machine that has Python 3.11 or newer, and make:
#   make demo                          checkpoint -> bundle -> embeddings of photos and sentences
#   make test                          the test suite
# PIP_ARGS goes to every pip install, for instance to choose an index with CPU builds of torch (README).

PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv
CHECKPOINT ?=
CONTAINER_ARGS ?=
# Processes of `make test`: each takes up to 4 GB of memory.
TEST_WORKERS ?= 2
# Tests of `make check`: those of the runtime that need few seconds.
QUICK := project/test_layering project/test_types runtime/test_packing runtime/test_threads runtime/bundle/test_bundle \
  runtime/preprocessing/test_text runtime/backends/test_packed_texts runtime/backends/test_cuda_libraries \
  runtime/backends/test_exact_sums runtime/server/test_batching
# Files that the bundle of `make gpu-dry-run` is made by.
PACKAGES := $(shell find runtime/jinaclip engines/jinaclip_engines export/jinaclip_export -name '*.py')
GPU_VENV ?= .venv-gpu
CUDA_VENV ?= .venv-cuda
CUDA_ARCH ?=
OPERATORS = $(if $(JINACLIP_CUDA_OPERATORS),,$(patsubst %,JINACLIP_CUDA_OPERATORS=$(CURDIR)/%,$(wildcard runtime/jinaclip/native/libjinaclip_cuda.so)))
PY := $(VENV)/bin/python
GPU_PYTHON ?= $(if $(wildcard $(PY)),$(PY),$(PYTHON))
GPU_PY := $(GPU_VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

.PHONY: demo check docs test test-slow gpu-test gpu-dry-run cuda-operators container-test lint parity certificates trained clean

demo: $(VENV)/.demo
	@$(PY) examples/demo.py $(CHECKPOINT)

# What to run before every commit: 90 seconds once mypy and the fixtures have run before.
check: $(VENV)/.dev
	$(PY) -m ruff format
	$(PY) -m ruff check
	$(PY) -m mypy
	$(PY) -m pytest -q -n $(TEST_WORKERS) $(QUICK:%=tests/%.py)

test: $(VENV)/.test
	JINACLIP_OTHER_PILLOW=$(abspath $(VENV))/other-pillow $(PY) -m pytest -n $(TEST_WORKERS)

test-slow: $(VENV)/.test
	JINACLIP_OTHER_PILLOW=$(abspath $(VENV))/other-pillow $(PY) -m pytest -m slow

# On a machine with an NVIDIA GPU. Needs nothing but the checkout and a Python that has the libraries: torch, onnx,
# onnxscript, tokenizers, safetensors, pytest, and what is to be tested: onnxruntime-gpu, tensorrt-rtx, tensorrt.
gpu-test:
	JINACLIP_REQUIRE_GPU=1 $(GPU_PYTHON) tests/support/from_checkout.py \
	  -m pytest -m gpu tests/gpu tests/bench/test_bench_gpu.py

# The GPU path without a GPU: the real onnxruntime-gpu over libraries that stand in for CUDA's (tests/gpu/stand_in). What
# is called, when and how often is tested; no value is computed. Needs g++, Linux and x86-64.
gpu-dry-run: $(GPU_VENV)/.installed $(GPU_VENV)/bundle
	$(GPU_PY) tests/gpu/stand_in/build.py $(GPU_VENV)/stand-in --headers $(GPU_VENV)/cuda/nvidia/cu13/include
	rm -f $(GPU_VENV)/journal
	LD_LIBRARY_PATH=$(abspath $(GPU_VENV))/stand-in STAND_IN_JOURNAL=$(abspath $(GPU_VENV))/journal \
	  JINACLIP_DRY_RUN_BUNDLE=$(abspath $(GPU_VENV))/bundle $(OPERATORS) \
	  $(GPU_PY) -m pytest --confcutdir=tests/gpu/dry_run -m dry_run tests/gpu/dry_run
	@echo "No value was computed: make gpu-test checks the vectors on a GPU."

# jinaclip's own CUDA operators, into the package: graphs that are prepared afterwards have them (docs/gpu.md). Compiled
# by the nvcc of NVIDIA's Python packages, of CUDA 13.0: what a later one makes does not load under a driver for 13.0.
# CUDA_ARCH=90 compiles for one architecture.
cuda-operators: $(CUDA_VENV)/.installed
	PATH="$$($(CUDA_VENV)/bin/python -c 'import nvidia.cu13 as p; print(p.__path__[0])')/bin:$$PATH" \
	  $(CUDA_VENV)/bin/python runtime/c-library/cuda/build.py --output runtime/jinaclip/native $(CUDA_ARCH:%=--arch %)

# The Containerfile's own steps, run without a container engine. Needs root and the command debootstrap, and reaches
# for Debian's and Python's packages; CONTAINER_ARGS gives it a mirror, certificates, or pip's settings (--help).
container-test: $(VENV)/.test
	$(PY) -m tests.project.containerfile $(CONTAINER_ARGS)

lint: $(VENV)/.dev
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

# The documentation site, into site/. Warnings, such as links that lead nowhere, are errors.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# The table of docs/parity.md, measured again.
parity: $(VENV)/.test
	$(PY) -m tests.support.parity --full --write

# docs/certificates.md, measured again.
certificates: $(VENV)/.test
	$(PY) -m tests.support.certificates --full --write

# docs/trained.md, measured again: fp16 and int8 on trained weights, from Python packages. Needs the network the first
# time, and apt-get.
trained: $(VENV)/.test
	$(PY) -m tests.trained --write

clean:
	rm -rf $(VENV) $(GPU_VENV) $(CUDA_VENV) runtime/jinaclip/native demo dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jinaclip needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --upgrade 'pip>=25.1'

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV): 1.3 GB with a CPU build of torch, several more with the CUDA build that"
	@echo "pip takes by default on Linux. PIP_ARGS='--index-url ...' chooses another (README, Install)."
	@$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV): 2.7 GB with a CPU build of torch, several more with the CUDA build that"
	@echo "pip takes by default on Linux. PIP_ARGS='--index-url ...' chooses another (README, Install)."
	@$(PIP) -e '.[cpu,export,bulk,bench,server]' --group test
	@rm -rf $(VENV)/other-pillow
	@$(PIP) --target $(VENV)/other-pillow --no-deps \
	  "pillow==$$($(PY) -c 'import PIL; print(12 if int(PIL.__version__.split(".")[0]) >= 13 else 13)').*"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.test
	@$(PIP) --group dev
	@touch $@

# Python 3.12 where there is one that starts, as on most hosts with a GPU. The headers lie in a folder of their own: the
# libraries of their package would be loaded in place of those that stand in for them.
$(GPU_VENV)/.installed: pyproject.toml
	@rm -rf $(GPU_VENV)
	@python=$(PYTHON); python3.12 -c 'import ensurepip, venv' 2>/dev/null && python=python3.12; $$python -m venv $(GPU_VENV)
	@echo "Installing into $(GPU_VENV): 0.6 GB, onnxruntime-gpu without CUDA's packages."
	@$(GPU_PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --upgrade 'pip>=25.1'
	@$(GPU_PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[server]' --group gpu-dry-run
	@$(GPU_PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --target $(GPU_VENV)/cuda \
	  'nvidia-cuda-runtime==13.*' 'nvidia-cuda-crt==13.*'
	@touch $@

$(CUDA_VENV)/.installed: Makefile
	@rm -rf $(CUDA_VENV)
	@$(PYTHON) -m venv $(CUDA_VENV)
	@echo "Installing into $(CUDA_VENV): 0.9 GB, the CUDA compiler."
	@$(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) 'nvidia-cuda-nvcc==13.0.*' \
	  'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-cccl==13.0.*' 'nvidia-cuda-runtime==13.0.*' \
	  'nvidia-cublas==13.0.*'
	@touch $@

$(GPU_VENV)/bundle: $(GPU_VENV)/.installed $(VENV)/.test $(PACKAGES)
	@rm -rf $@
	@$(PY) -m jinaclip export --random small --precision fp32,fp16 --output $@
	@touch $@
