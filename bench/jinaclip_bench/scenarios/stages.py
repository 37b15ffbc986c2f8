"""The kind of case that measures the stages of one call of jinaclip, and the first call of a new session.

Torch is not measured. The host's stages are timed directly. The device's stages are measured in a second, profiled run
with the same inputs, so that profiling does not affect the host's times.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

from jinaclip.encoders import ENCODERS, Encoder, TextEncoder
from jinaclip_bench.cases.inputs import texts_of
from jinaclip_bench.cases.settings import BenchSettings, Embed, OpenCase
from jinaclip_bench.cases.table import Case, photo_jpeg
from jinaclip_bench.measuring.device_profile import UNAVAILABLE, device_stages
from jinaclip_bench.measuring.timing import Sample

HOST_STAGES = {"text": "tokenise", "image": "decode and resize"}


@contextmanager
def stages(case: Case, settings: BenchSettings, torch: Mapping[str, Embed]) -> Iterator[OpenCase]:
    """Compute the vector of one text or JPEG, with the time of each stage."""
    bundle, texts = settings.bundle, list[str]()
    shape: tuple[int, ...] = (1, bundle.preprocessing.size, bundle.preprocessing.size, 3)
    if case.tower == "text":
        assert case.tokens is not None  # the table of cases gives texts their length
        texts, shape = texts_of(bundle, bundle.open_tokenizer(), [case.tokens]), (1, case.tokens)
    sides, first_calls = {}, {}
    with ExitStack() as stack:
        for name, backend, precision in settings.jinaclip_sides(case.tower):
            # Not with ClipModel, whose self-test would be the session's first call.
            session, _ = backend.open(bundle, case.tower, precision, threads=settings.threads)
            stack.enter_context(closing(session))
            encoder = ENCODERS[case.tower](bundle, precision, session)
            inputs = _prepare(encoder, texts)
            start = time.perf_counter()
            encoder.run(inputs)
            first_calls[name] = time.perf_counter() - start
            encoder.check(always=False)
            sides[name] = partial(_one_call, encoder, texts, HOST_STAGES[case.tower], on_gpu=backend.gpu is not None)
        yield OpenCase(sides, shape, case.tokens, first_calls=first_calls)


def _prepare(encoder: Encoder, texts: Sequence[str]) -> Any:
    """Inputs of `encoder.run`: the texts, or one JPEG."""
    return encoder.prepare(texts) if isinstance(encoder, TextEncoder) else [encoder.prepare(photo_jpeg())]


def _one_call(encoder: Encoder, texts: Sequence[str], first_stage: str, *, on_gpu: bool) -> Sample:
    if on_gpu:
        encoder.run(_prepare(encoder, texts))  # an idle GPU has lowered its clocks
    begin = time.perf_counter()
    inputs = _prepare(encoder, texts)
    prepared = time.perf_counter()
    vectors = encoder.run(inputs)
    done = time.perf_counter()
    device = device_stages(lambda: encoder.run(inputs)) if on_gpu else UNAVAILABLE
    return Sample(
        seconds=done - begin,
        output=vectors,
        device_s=device["run"],
        stages={first_stage: prepared - begin, "session": done - prepared, **device},
    )
