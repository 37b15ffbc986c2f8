"""The kinds of cases. `kind(case, settings, torch)` is a context manager that opens a case's sides and frees them.

Every side of a case has the same input (ids, pixels, texts or a file) and must return the same unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import numpy as np

from jinaclip.backends.base import Backend
from jinaclip.backends.self_test import run_self_test
from jinaclip.encoders import TextEncoder
from jinaclip.model import ClipModel
from jinaclip.preprocessing.image import preprocess
from jinaclip_bench.cases.inputs import lengths_of, texts_of
from jinaclip_bench.cases.settings import BenchSettings, Embed, Kind, OpenCase
from jinaclip_bench.cases.table import AUTOTUNED_CASE, PHOTO_SIZE, QUERY, Case, photo_jpeg, random_ids
from jinaclip_bench.measuring.timing import AUTOTUNED, CAPTURED, COMPILED, JINACLIP, UNPADDED, Side, timed
from jinaclip_bench.scenarios.flops import flops_and_matmul_rate
from jinaclip_bench.scenarios.new_process import long_text, process
from jinaclip_bench.scenarios.served import serve
from jinaclip_bench.scenarios.stages import stages

PUBLISHER_BATCH = 32  # batch size of the publisher's encode_text, which pads each batch to its longest text
UNPADDED_BATCH = 512  # batch size without padding, large enough to keep a GPU busy
Calls = dict[str, Callable[[], np.ndarray]]


@contextmanager
def graph(case: Case, settings: BenchSettings, torch: Mapping[str, Embed]) -> Iterator[OpenCase]:
    """Ids or pixels to unit vectors, without tokenizer and image decoding."""
    bundle = settings.bundle
    if case.tower == "text":
        inputs = random_ids(bundle, case.rows, _tokens(case))  # [B, T]
    else:
        inputs = np.stack([preprocess(photo_jpeg(), bundle.preprocessing)] * case.rows)  # [B, S, S, 3]
    with ExitStack() as stack:
        embedders: dict[str, Embed] = {}
        for name, backend, precision in settings.jinaclip_sides(case.tower):
            embedders[name] = stack.enter_context(_open_graph(settings, case.tower, backend, precision))
        # CUDA graphs save launch overhead for a single row; for many rows they make no difference.
        unwanted = [COMPILED if case.rows == 1 else CAPTURED, *([] if case.name == AUTOTUNED_CASE else [AUTOTUNED])]
        embedders |= {name: embed for name, embed in torch.items() if not name.endswith(tuple(unwanted))}
        if case.name == "text-1x32":
            embedders |= _fused(settings, stack)
        flops, matmul_tflops = flops_and_matmul_rate(settings, case, [inputs.shape[1]] * case.rows)
        yield OpenCase(
            sides={name: _side(settings, partial(embed, inputs), embed) for name, embed in embedders.items()},
            shape=inputs.shape,
            tokens=inputs.size if case.tower == "text" else None,
            flops=flops,
            matmul_tflops=matmul_tflops,
        )


@contextmanager
def encode(case: Case, settings: BenchSettings, torch: Mapping[str, Embed]) -> Iterator[OpenCase]:
    """A text to its vector, tokenizer included. Other sides use the same tokenizer.

    They are torch's towers, and for the kind "query" the fused graph with its dummy image.
    """
    with ExitStack() as stack:
        models, encoder = _open_models(case, settings, stack)
        texts, others = [QUERY], torch
        if case.kind == "query":
            texts = texts_of(settings.bundle, encoder.tokenizer, [_tokens(case)])
            others = _fused(settings, stack)

        def embed_texts(embed: Embed) -> np.ndarray:
            return embed(encoder.tokenizer.padded(encoder.prepare(texts)))

        calls: Calls = {name: partial(model.encode_text, texts) for name, model in models.items()}
        calls |= {name: partial(embed_texts, embed) for name, embed in others.items()}
        tokens = len(encoder.prepare(texts)[0])
        yield OpenCase({name: timed(call) for name, call in calls.items()}, shape=(1, tokens), tokens=tokens)


@contextmanager
def mix(case: Case, settings: BenchSettings, torch: Mapping[str, Embed]) -> Iterator[OpenCase]:
    """Texts of mixed lengths to vectors, tokenizer included.

    Torch works as in the publisher's implementation: texts are sorted by their number of characters, in padded batches
    of PUBLISHER_BATCH. torch-fp32-unsorted uses the caller's order. Torch without padding uses larger batches.
    """
    lengths, longest = lengths_of(case), _tokens(case)
    with ExitStack() as stack:
        models, encoder = _open_models(case, settings, stack)
        texts = texts_of(settings.bundle, encoder.tokenizer, lengths)

        def embed_texts(embed: Embed, *, batch_size: int = PUBLISHER_BATCH, by_characters: bool = False) -> np.ndarray:
            order = sorted(range(len(texts)), key=lambda i: -len(texts[i])) if by_characters else range(len(texts))
            vectors = []
            for start in range(0, len(order), batch_size):
                rows = encoder.prepare([texts[i] for i in order[start : start + batch_size]], max_length=longest)
                vectors.append(embed(encoder.tokenizer.padded(rows)))
            return np.concatenate(vectors)[np.argsort(order)]

        calls: Calls = {name: partial(model.encode_text, texts, max_length=longest) for name, model in models.items()}
        for name, embed in torch.items():
            if name.startswith(UNPADDED):
                calls[name] = partial(embed_texts, embed, batch_size=UNPADDED_BATCH)
            elif not name.endswith(CAPTURED):  # it would capture a graph for every shape
                calls[name] = partial(embed_texts, embed, by_characters=True)
            if name == "torch-fp32":
                calls["torch-fp32-unsorted"] = partial(embed_texts, embed)
        flops, matmul_tflops = flops_and_matmul_rate(settings, case, lengths)
        yield OpenCase(
            sides={name: _side(settings, call, torch.get(name)) for name, call in calls.items()},
            shape=(len(texts), max(lengths)),
            tokens=sum(lengths),
            burn_in=1 if settings.gpu is None else 3,  # on a GPU the first runs of a bucket capture a CUDA graph
            flops=flops,
            matmul_tflops=matmul_tflops,
        )


@contextmanager
def preprocessing(case: Case, settings: BenchSettings, torch: Mapping[str, Embed]) -> Iterator[OpenCase]:
    """A JPEG to pixels, in one thread. Torch is not measured."""
    call = partial(preprocess, photo_jpeg(), settings.bundle.preprocessing)
    yield OpenCase({JINACLIP: timed(call)}, shape=(*PHOTO_SIZE[::-1], 3), tokens=None, threads=1)


KINDS: dict[str, Kind] = {
    "graph": graph,
    "encode": encode,
    "query": encode,
    "mix": mix,
    "preprocess": preprocessing,
    "long": long_text,
    "process": process,
    "serve": serve,
    "stages": stages,
}
USES_TORCH = ("graph", "encode", "mix")  # kinds that measure torch's towers


@contextmanager
def _open_graph(settings: BenchSettings, tower: str, backend: Backend, precision: str) -> Iterator[Embed]:
    bundle = settings.bundle
    session, _ = backend.open(bundle, tower, precision, threads=settings.threads)
    with closing(session):
        run_self_test(bundle, tower, precision, session)
        name, output = bundle.tower(tower).input_name, f"l2norm_{tower}_embeddings"
        convert = bundle.image_input if tower == "image" else np.asarray
        # Without an encoder, whose memory check, copies and helper thread would be timed as part of the graph.
        yield lambda values: session.run({name: convert(values)}, outputs=[output])[output]


def _open_models(case: Case, settings: BenchSettings, stack: ExitStack) -> tuple[dict[str, ClipModel], TextEncoder]:
    """jinaclip's sides, one for each precision and backend, and an encoder. The models are closed with the stack."""
    models = {
        name: stack.enter_context(settings.open_model(case.tower, backend, precision))
        for name, backend, precision in settings.jinaclip_sides(case.tower)
    }
    return models, next(iter(models.values())).text_encoder


def _side(settings: BenchSettings, call: Callable[[], np.ndarray], embed: Embed | None) -> Side:
    """Make a side of a call, with the device's time if the embedder provides it."""
    take = getattr(embed, "take_device_seconds", None)
    return timed(call, warm_up=settings.gpu is not None, device_seconds=take)


def _fused(settings: BenchSettings, stack: ExitStack) -> dict[str, Embed]:
    """The side of the fused graph, if it is measured."""
    if settings.fused is None:
        return {}
    from jinaclip_bench.sides.fused_onnx import FusedSession

    session = stack.enter_context(closing(FusedSession(settings.fused, settings.threads)))
    return {"fused-onnx": session.embed_text}


def _tokens(case: Case) -> int:
    assert case.tokens is not None  # the table of cases gives these kinds their length
    return case.tokens
