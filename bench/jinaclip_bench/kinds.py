"""How each kind of case becomes sides to call: `kind(case, settings, torch)` opens it and frees it again.

Every side of a case starts from the same ids, pixels, texts or file and ends with the same unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import numpy as np

from jinaclip.bundle import Bundle
from jinaclip.image import normalise, preprocess
from jinaclip.model import ClipModel
from jinaclip.prepared import open_graph
from jinaclip.selftest import run_self_test
from jinaclip.text import TextTokenizer
from jinaclip_bench.cases import PHOTO_SIZE, QUERY, Case, photo_jpeg, random_ids
from jinaclip_bench.measure import OURS, ours, timed
from jinaclip_bench.processes import long_text, process
from jinaclip_bench.settings import Embed, Kind, Opened, Settings
from jinaclip_bench.texts import log_normal_lengths, open_tokenizer, texts_of

PUBLISHER_BATCH = 32  # the publisher's encode_text pads this many texts to the longest of them


@contextmanager
def graph(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """Ids or pixels to unit vectors: the tower alone."""
    bundle = settings.bundle
    bundle.tower(case.tower)
    if case.tower == "text":
        inputs = random_ids(bundle, case.rows, _tokens(case))  # [B, T]
    else:
        inputs = np.stack([preprocess(photo_jpeg(), bundle.preprocessing)] * case.rows)  # [B, S, S, 3]
    with ExitStack() as stack:
        calls = {
            ours(precision): stack.enter_context(_our_graph(bundle, case.tower, precision, settings.threads))
            for precision in settings.precisions
        }
        calls |= torch
        if case.name == "text-1x32":
            calls |= _fused(settings, stack)
        yield Opened(
            sides={name: timed(partial(call, inputs)) for name, call in calls.items()},
            shape=inputs.shape,
            tokens=inputs.size if case.tower == "text" else None,
            threads=settings.threads,
            rounds=settings.repeats,
        )


@contextmanager
def encode(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """A text to its vector, tokenizer included; torch gets the same tokenizer."""
    with _encoding([QUERY], case, settings, torch) as opened:
        yield opened


@contextmanager
def query(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """A text of so many tokens to its vector, tokenizer included, beside the fused graph with its dummy image."""
    text = texts_of(settings.bundle, open_tokenizer(settings.bundle), [_tokens(case)])
    with ExitStack() as stack, _encoding(text, case, settings, _fused(settings, stack)) as opened:
        yield opened


@contextmanager
def mix(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """Texts of mixed lengths to vectors, tokenizer included; at most five times, it takes long.

    Torch goes the publisher's way: texts sorted by their number of characters, padded batches of PUBLISHER_BATCH.
    torch-fp32-unsorted takes the same batches in the caller's order.
    """
    assert case.sigma is not None  # the table of cases gives every mix its spread
    bundle, longest = settings.bundle, _tokens(case)
    tokenizer = open_tokenizer(bundle)
    lengths = log_normal_lengths(case.rows, case.sigma, longest)
    texts = texts_of(bundle, tokenizer, lengths)

    def theirs(embed: Embed, *, by_characters: bool = True) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i])) if by_characters else range(len(texts))
        return _in_batches(texts, order, tokenizer, longest, embed)

    with ExitStack() as stack:
        models = _models(case, settings, stack)
        calls: dict[str, Callable[[], np.ndarray]] = {
            name: partial(model.encode_text, texts, max_length=longest) for name, model in models.items()
        }
        for name, embed in torch.items():
            calls[name] = partial(theirs, embed)
            if name == "torch-fp32":
                calls["torch-fp32-unsorted"] = partial(theirs, embed, by_characters=False)
        yield Opened(
            sides={name: timed(call) for name, call in calls.items()},
            shape=(len(texts), max(lengths)),
            tokens=sum(lengths),
            threads=settings.threads,
            rounds=min(settings.repeats, 5),
            burn_in=1,
        )


@contextmanager
def preprocessing(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """A JPEG to pixels, in one thread. Torch has no part in it, so it stands alone."""
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
}
USES_TORCH = ("graph", "encode", "mix")  # the kinds that are handed torch's towers


@contextmanager
def _our_graph(bundle: Bundle, tower: str, precision: str, threads: int) -> Iterator[Embed]:
    manifest = bundle.tower(tower)
    opened, _ = open_graph(bundle, tower, precision, threads=threads)
    with closing(opened) as session:
        tokenizer = open_tokenizer(bundle) if tower == "text" else None
        run_self_test(bundle, tower, precision, session, tokenizer=tokenizer)

        def embed(values: np.ndarray) -> np.ndarray:
            if manifest.input_dtype == "float32":
                values = normalise(values, bundle.preprocessing)
            return session.run({manifest.input_name: values})[f"l2norm_{tower}_embeddings"]

        yield embed


@contextmanager
def _encoding(texts: Sequence[str], case: Case, settings: Settings, others: Mapping[str, Embed]) -> Iterator[Opened]:
    """`ClipModel.encode_text` beside sides that take the ids of the same tokenizer."""
    tokenizer = open_tokenizer(settings.bundle)
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
    """Our sides, one of each precision, closed with the stack."""
    directory, tower, threads = settings.bundle.directory, case.tower, settings.threads
    return {
        ours(precision): stack.enter_context(
            ClipModel(directory, towers=(tower,), precision={tower: precision}, threads=threads)
        )
        for precision in settings.precisions
    }


def _fused(settings: Settings, stack: ExitStack) -> dict[str, Embed]:
    """The side of the fused graph, where it is measured."""
    if settings.fused is None:
        return {}
    from jinaclip_bench.fused import FusedSession

    session = stack.enter_context(closing(FusedSession(settings.fused, settings.threads)))
    return {"fused-onnx": session.embed_text}


def _in_batches(
    texts: Sequence[str], order: Sequence[int], tokenizer: TextTokenizer, max_length: int, embed: Embed
) -> np.ndarray:
    """Vectors [N, D] in the caller's order, of texts that run in another."""
    vectors = []
    for start in range(0, len(order), PUBLISHER_BATCH):
        batch = [texts[i] for i in order[start : start + PUBLISHER_BATCH]]
        vectors.append(embed(tokenizer.padded(tokenizer.truncated(tokenizer.encode(batch), max_length))))
    return np.concatenate(vectors)[np.argsort(order)]


def _tokens(case: Case) -> int:
    assert case.tokens is not None  # the table of cases gives these kinds their length
    return case.tokens
