"""Graph to machine: precision and backend passes over a bundle's ONNX graphs. Never imports torch."""
