#!/usr/bin/env bash
# Runs on a machine with a GPU and measures there what the CUDA backend does: tests/gpu/prove.sh first|second
# [--kit DIR] [--output DIR] [--parts a,b] [--budget SECONDS]; --help describes them. Needs the kit of tests/gpu/pack_kit.py
# and a Python 3.12 (PYTHON, default python3) with torch, onnx, onnx-ir, safetensors, tokenizers and Pillow.
set -u
cd "$(dirname "$0")/../.." || exit 1
exec "${PYTHON:-python3}" -u -m tests.gpu.proof "$@"
