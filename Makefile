# Two commands set everything up on a machine that has Python 3.11 or newer, and make:
#   make demo                          checkpoint -> bundle -> embeddings of photos and sentences
#   make test                          the test suite
# PIP_ARGS goes to every pip install, for instance to choose an index with CPU builds of torch (README).

PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv
CHECKPOINT ?=
CONTAINER_ARGS ?=
PY := $(VENV)/bin/python
GPU_PYTHON ?= $(if $(wildcard $(PY)),$(PY),$(PYTHON))
PIP := $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

.PHONY: demo test test-slow gpu-test container-test lint parity certificates clean

demo: $(VENV)/.demo
	@$(PY) examples/demo.py $(CHECKPOINT)

test: $(VENV)/.test
	JINACLIP_OTHER_PILLOW=$(abspath $(VENV))/other-pillow $(PY) -m pytest

test-slow: $(VENV)/.test
	JINACLIP_OTHER_PILLOW=$(abspath $(VENV))/other-pillow $(PY) -m pytest -m slow

# On a machine with an NVIDIA GPU. Needs nothing but the checkout and a Python that has the libraries: torch, onnx,
# onnxscript, tokenizers, safetensors, pytest, and what is to be tested: onnxruntime-gpu, tensorrt-rtx, tensorrt.
gpu-test:
	JINACLIP_REQUIRE_GPU=1 $(GPU_PYTHON) tests/from_checkout.py -m pytest -m gpu tests/gpu tests/test_bench_gpu.py

# The Containerfile's own steps, run without a container engine. Needs root and the command debootstrap, and reaches
# for Debian's and Python's packages; CONTAINER_ARGS gives it a mirror, certificates, or pip's settings (--help).
container-test: $(VENV)/.test
	$(PY) -m tests.containerfile $(CONTAINER_ARGS)

lint: $(VENV)/.dev
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

# The README's parity table, measured again.
parity: $(VENV)/.test
	$(PY) -m tests.parity --full --write

# docs/certificates.md, measured again.
certificates: $(VENV)/.test
	$(PY) -m tests.certificates --full --write

clean:
	rm -rf $(VENV) demo dist

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
