"""What runs graphs: sessions of ONNX Runtime and TensorRT, on CPUs and GPUs, and the choice between them.

Imports jinaclip.errors, preprocessing, embeddings and bundle. Knows no texts or pictures but those of the self-test.
"""
