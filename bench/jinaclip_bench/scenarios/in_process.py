"""The kinds of cases. `kind(case, settings, torch)` is a context manager that opens a case's sides and frees them.

Every side of a case has the same input (ids, pixels, texts or a file) and must return the same unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import numpy as np

from jinaclip.backends.base import Backend
from jinaclip.backends.self_test import run_self_test
from jinaclip.model import ClipModel
from jinaclip.preprocessing.image import preprocess
from jinaclip.preprocessing.text import TextTokenizer
from jinaclip_bench.cases.inputs import lengths_of, texts_of
from jinaclip_bench.cases.settings import Embed, Kind, Opened, Settings, feed
from jinaclip_bench.cases.table import AUTOTUNED_CASE, PHOTO_SIZE, QUERY, Case, photo_jpeg, random_ids
from jinaclip_bench.measuring.timing import AUTOTUNED, CAPTURED, COMPILED, OURS, UNPADDED, Side, timed
from jinaclip_bench.scenarios.flops import work
from jinaclip_bench.scenarios.new_process import long_text, process
from jinaclip_bench.scenarios.served import serve
from jinaclip_bench.scenarios.stages import stages

PUBLISHER_BATCH = 32  # batch size of the publisher's encode_text, which pads each batch to its longest text
UNPADDED_BATCH = 512  # batch size without padding, large enough to keep a GPU busy


@contextmanager
def graph(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """Ids or pixels to unit vectors, without tokenizer and image decoding."""
    bundle = settings.bundle
    bundle.tower(case.tower)
    if case.tower == "text":
        inputs = random_ids(bundle, case.rows, _tokens(case))  # [B, T]
    else:
        inputs = np.stack([preprocess(photo_jpeg(), bundle.preprocessing)] * case.rows)  # [B, S, S, 3]
    with ExitStack() as stack:
        calls = {
            name: stack.enter_context(_our_graph(settings, case.tower, backend, precision))
            for name, backend, precision in settings.ours(case.tower)
        }
        # CUDA graphs save launch overhead for a single row; for many rows they make no difference.
        unwanted = [COMPILED if case.rows == 1 else CAPTURED, *([] if case.name == AUTOTUNED_CASE else [AUTOTUNED])]
        calls |= {name: embed for name, embed in torch.items() if not name.endswith(tuple(unwanted))}
        if case.name == "text-1x32":
            calls |= _fused(settings, stack)
        flops, matmul_tflops = work(settings, case, [inputs.shape[1]] * case.rows)
        yield Opened(
            sides={name: _side(settings, partial(call, inputs), call) for name, call in calls.items()},
            shape=inputs.shape,
            tokens=inputs.size if case.tower == "text" else None,
            threads=settings.threads,
            rounds=settings.repeats,
            flops=flops,
            matmul_tflops=matmul_tflops,
        )


@contextmanager
def encode(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """A text to its vector, tokenizer included. Torch's side uses the same tokenizer."""
    with _encoding([QUERY], case, settings, torch) as opened:
        yield opened


@contextmanager
def query(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """A text to its vector, tokenizer included, compared with the fused graph and its dummy image."""
    text = texts_of(settings.bundle, settings.bundle.open_tokenizer(), [_tokens(case)])
    with ExitStack() as stack, _encoding(text, case, settings, _fused(settings, stack)) as opened:
        yield opened


@contextmanager
def mix(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """Texts of mixed lengths to vectors, tokenizer included. There are at most five rounds, because they are slow.

    Torch works as in the publisher's implementation: texts are sorted by their number of characters, in padded batches
    of PUBLISHER_BATCH. torch-fp32-unsorted uses the caller's order. Torch without padding uses larger batches.
    """
    bundle, longest = settings.bundle, _tokens(case)
    tokenizer = bundle.open_tokenizer()
    lengths = lengths_of(case)
    texts = texts_of(bundle, tokenizer, lengths)

    def theirs(embed: Embed, *, by_characters: bool = True) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i])) if by_characters else range(len(texts))
        return _in_batches(texts, order, tokenizer, longest, embed)

    def without_padding(embed: Embed) -> np.ndarray:
        return _in_batches(texts, range(len(texts)), tokenizer, longest, embed, size=UNPADDED_BATCH)

    with ExitStack() as stack:
        models = _models(case, settings, stack)
        calls: dict[str, Callable[[], np.ndarray]] = {
            name: partial(model.encode_text, texts, max_length=longest) for name, model in models.items()
        }
        for name, embed in torch.items():
            if name.endswith(CAPTURED):  # it would capture a graph for every shape
                continue
            calls[name] = partial(without_padding if name.startswith(UNPADDED) else theirs, embed)
            if name == "torch-fp32":
                calls["torch-fp32-unsorted"] = partial(theirs, embed, by_characters=False)
        flops, matmul_tflops = work(settings, case, lengths)
        yield Opened(
            sides={name: _side(settings, call, torch.get(name)) for name, call in calls.items()},
            shape=(len(texts), max(lengths)),
            tokens=sum(lengths),
            threads=settings.threads,
            rounds=min(settings.repeats, 5),
            burn_in=1 if settings.gpu is None else 3,  # on a GPU the first runs of a bucket capture a CUDA graph
            flops=flops,
            matmul_tflops=matmul_tflops,
        )


@contextmanager
def preprocessing(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """A JPEG to pixels, in one thread. Torch is not measured."""
    settings.bundle.tower(case.tower)
    call = partial(preprocess, photo_jpeg(), settings.bundle.preprocessing)
    width, height = PHOTO_SIZE
    yield Opened({OURS: timed(call)}, shape=(height, width, 3), tokens=None, threads=1, rounds=settings.repeats)


KINDS: dict[str, Kind] = {
    "graph": graph,
    "encode": encode,
    "query": query,
    "mix": mix,
    "preprocess": preprocessing,
    "long": long_text,
    "process": process,
    "serve": serve,
    "stages": stages,
}
USES_TORCH = ("graph", "encode", "mix")  # kinds that measure torch's towers


@contextmanager
def _our_graph(settings: Settings, tower: str, backend: Backend, precision: str) -> Iterator[Embed]:
    bundle = settings.bundle
    opened, _ = backend.open(bundle, tower, precision, threads=settings.threads)
    with closing(opened) as session:
        run_self_test(bundle, tower, precision, session)

        def embed(values: np.ndarray) -> np.ndarray:
            output = f"l2norm_{tower}_embeddings"
            return session.run(feed(bundle, tower, values), outputs=[output])[output]

        yield embed


def _side(settings: Settings, call: Callable[[], np.ndarray], embed: Embed | None) -> Side:
    """Make a side of a call, with the device's time if the embedder provides it."""
    take = getattr(embed, "take_device_seconds", None)
    return timed(call, wake=settings.gpu is not None, device_seconds=take)


@contextmanager
def _encoding(texts: Sequence[str], case: Case, settings: Settings, others: Mapping[str, Embed]) -> Iterator[Opened]:
    """Sides of `ClipModel.encode_text`, and other sides with the same tokenizer."""
    tokenizer = settings.bundle.open_tokenizer()
    ids = tokenizer.encode(texts)

    def theirs(embed: Embed) -> np.ndarray:
        return embed(tokenizer.padded(tokenizer.encode(texts)))

    with ExitStack() as stack:
        models = _models(case, settings, stack)
        calls: dict[str, Callable[[], np.ndarray]] = {n: partial(m.encode_text, texts) for n, m in models.items()}
        calls |= {name: partial(theirs, embed) for name, embed in others.items()}
        yield Opened(
            sides={name: timed(call) for name, call in calls.items()},
            shape=(len(ids), max(map(len, ids))),
            tokens=sum(map(len, ids)),
            threads=settings.threads,
            rounds=settings.repeats,
        )


def _models(case: Case, settings: Settings, stack: ExitStack) -> dict[str, ClipModel]:
    """jinaclip's sides, one for each precision and backend. They are closed with the stack."""
    tower = case.tower
    return {
        name: stack.enter_context(
            ClipModel(
                settings.bundle.directory, towers=(tower,), precision={tower: precision}, threads=settings.threads,
                backend=backend.name, device="cpu" if backend.gpu is None else f"cuda:{backend.gpu.index}",
            )
        )
        for name, backend, precision in settings.ours(tower)
    }  # fmt: skip


def _fused(settings: Settings, stack: ExitStack) -> dict[str, Embed]:
    """The side of the fused graph, if it is measured."""
    if settings.fused is None:
        return {}
    from jinaclip_bench.sides.fused_onnx import FusedSession

    session = stack.enter_context(closing(FusedSession(settings.fused, settings.threads)))
    return {"fused-onnx": session.embed_text}


def _in_batches(
    texts: Sequence[str], order: Sequence[int], tokenizer: TextTokenizer, max_length: int, embed: Embed,
    *, size: int = PUBLISHER_BATCH,
) -> np.ndarray:  # fmt: skip
    """Vectors [N, D] in the caller's order, of texts that are run in the order `order` in batches of `size`."""
    vectors = []
    for start in range(0, len(order), size):
        batch = [texts[i] for i in order[start : start + size]]
        vectors.append(embed(tokenizer.padded(tokenizer.truncated(tokenizer.encode(batch), max_length))))
    return np.concatenate(vectors)[np.argsort(order)]


def _tokens(case: Case) -> int:
    assert case.tokens is not None  # the table of cases gives these kinds their length
    return case.tokens
