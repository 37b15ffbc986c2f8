"""The kind of case that measures the stages of one call of jinaclip, and the first call of a new session.

Torch is not measured. The host's stages are timed directly. The device's stages are measured in a second, profiled run
with the same inputs, so that profiling does not affect the host's times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import numpy as np

from jinaclip.backends.base import Session
from jinaclip.backends.self_test import run_self_test
from jinaclip.preprocessing.image import preprocess
from jinaclip_bench.cases.inputs import texts_of
from jinaclip_bench.cases.settings import Embed, Opened, Settings, feed
from jinaclip_bench.cases.table import Case, photo_jpeg
from jinaclip_bench.measuring.device_profile import NOT_TOLD, device_stages
from jinaclip_bench.measuring.timing import Sample

MOST_ROUNDS = 5
HOST_STAGES = {"text": "tokenise", "image": "decode and resize"}


@contextmanager
def stages(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """Compute the vector of one text or JPEG, with the time of each stage."""
    bundle, tower = settings.bundle, case.tower
    tokenizer = bundle.open_tokenizer() if tower == "text" else None
    if tokenizer is not None:
        assert case.tokens is not None  # the table of cases gives texts their length
        texts = texts_of(bundle, tokenizer, [case.tokens])

    def read() -> np.ndarray:
        if tokenizer is not None:
            return tokenizer.padded(tokenizer.encode(texts))
        return preprocess(photo_jpeg(), bundle.preprocessing)[None]

    inputs = read()
    sides, first_calls = {}, {}
    with ExitStack() as stack:
        for name, backend, precision in settings.ours(tower):
            opened, _ = backend.open(bundle, tower, precision, threads=settings.threads)
            session = stack.enter_context(closing(opened))
            start = time.perf_counter()
            session.run(feed(bundle, tower, inputs))
            first_calls[name] = time.perf_counter() - start
            run_self_test(bundle, tower, precision, session, tokenizer=tokenizer)
            on_gpu = backend.gpu is not None
            sides[name] = partial(_one_call, session, read, tower, partial(feed, bundle, tower), on_gpu)
        yield Opened(
            sides=sides,
            shape=inputs.shape,
            tokens=inputs.size if tower == "text" else None,
            threads=settings.threads,
            rounds=min(settings.repeats, MOST_ROUNDS),
            first_calls=first_calls,
        )


def _one_call(
    session: Session, read: Callable[[], np.ndarray], tower: str, fed: Callable[[np.ndarray], dict[str, np.ndarray]],
    on_gpu: bool,
) -> Sample:  # fmt: skip
    if on_gpu:
        session.run(fed(read()))  # an idle GPU has lowered its clocks
    begin = time.perf_counter()
    values = read()
    ready = time.perf_counter()
    outputs = session.run(fed(values))
    done = time.perf_counter()
    device = device_stages(lambda: session.run(fed(values))) if on_gpu else NOT_TOLD
    return Sample(
        seconds=done - begin,
        output=outputs[f"l2norm_{tower}_embeddings"],
        device_s=device["run"],
        stages={HOST_STAGES[tower]: ready - begin, "session": done - ready, **device},
    )
