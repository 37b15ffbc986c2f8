"""Accuracy of fp16 and int8 on trained weights: `make trained` measures it and writes docs/trained.md.

Three trained models that Python packages carry are mapped into the towers: MiniLM and E5 into the text tower, DINO into
the image tower. They go through the project's own export, precisions, preparation and certificates. The packages are
downloaded at run time. They are not shipped, and the quick tests do not need them.
"""
