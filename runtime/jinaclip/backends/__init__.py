"""Inference: sessions of ONNX Runtime and TensorRT on CPUs and GPUs, the choice of a backend, and the self-test.

Imports jinaclip.errors, preprocessing, embeddings and bundle. Only the self-test deals with texts and images.
"""
