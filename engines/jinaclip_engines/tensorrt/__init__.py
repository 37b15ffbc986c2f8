"""TensorRT and TensorRT-RTX: the graph that they compile, the engine, and what the compiler made of it."""
