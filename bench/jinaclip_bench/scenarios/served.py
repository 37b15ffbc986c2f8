"""The kind of case that measures a server with concurrent clients, compared with ClipModel in one process."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np

from jinaclip.model import ClipModel
from jinaclip_bench.cases.inputs import lengths_of, texts_of
from jinaclip_bench.cases.settings import BenchSettings, Embed, OpenCase
from jinaclip_bench.cases.table import PHOTO_SIZE, Case, photo_jpeg
from jinaclip_bench.errors import BenchError
from jinaclip_bench.measuring.child_process import command
from jinaclip_bench.measuring.subprocesses import run_json
from jinaclip_bench.measuring.timing import Requests, Sample, Side, jinaclip_side, timed
from jinaclip_bench.sides.server_process import ServerProcess, serving

SERVED = "served"  # suffix of the name of the server's side


@contextmanager
def serve(case: Case, settings: BenchSettings, torch: Mapping[str, Embed]) -> Iterator[OpenCase]:
    """Items to vectors: from a server, with one item per request, and from ClipModel in this process.

    ClipModel gets one text per call, as in code that answers queries one after another, and all photos in one call,
    which is fastest. The server, its clients and ClipModel use the same cores, and only one side runs at a time. Torch
    is not measured.
    """
    bundle, tower = settings.bundle, case.tower
    assert case.clients is not None  # the table of cases gives it its clients
    shape: tuple[int, ...]
    encode: Callable[[ClipModel], np.ndarray]
    if tower == "text":
        lengths = lengths_of(case)
        texts = texts_of(bundle, bundle.open_tokenizer(), lengths)
        bodies, encode, calls = [_body(text) for text in texts], partial(_encode_one_by_one, texts), "one a call"
        shape, tokens = (case.rows, max(lengths)), sum(lengths)
    else:
        files = [photo_jpeg(number) for number in range(case.rows)]
        bodies = [_body([{"image": base64.b64encode(file).decode("ascii")}]) for file in files]
        encode, calls = partial(ClipModel.encode_image, images=files), "all in a call"
        shape, tokens = (case.rows, *PHOTO_SIZE[::-1], 3), None
    with _limit_cores(settings.threads), ExitStack() as stack:
        sides: dict[str, Side] = {}
        for precision in settings.precisions:
            server = stack.enter_context(serving(bundle, tower, precision, threads=settings.threads))
            sides[jinaclip_side(precision, SERVED)] = partial(_request_all, server, bodies, case.clients)
        for _, backend, precision in settings.jinaclip_sides(tower):
            model = stack.enter_context(settings.open_model(tower, backend, precision))
            sides[f"ClipModel {precision}, {calls}"] = timed(partial(encode, model))
        yield OpenCase(sides, shape, tokens, burn_in=1)


def _encode_one_by_one(texts: Sequence[str], model: ClipModel) -> np.ndarray:
    return np.stack([model.encode_text(text) for text in texts])


def _request_all(server: ServerProcess, bodies: Sequence[bytes], clients: int) -> Sample:
    """Get all vectors from the server. The clients run in a new process, whose start is not timed."""
    before, cpu_before = server.batches(), server.cpu_s()
    load = command("jinaclip_bench.sides.load_clients", server.url, f"--clients={clients}")
    try:
        found = run_json(load, "the clients of `jinaclip serve`", stdin=b"\n".join(bodies))
    except BenchError as error:
        raise BenchError(f"{error}; last line of the server: {server.last_line()}") from error
    cpu_after, after = server.cpu_s(), server.batches()
    batches = {size: after[size] - before.get(size, 0) for size in sorted(after)}
    return Sample(
        seconds=found["seconds"],
        output=np.stack([np.frombuffer(base64.b64decode(vector), "<f4") for vector in found["vectors"]]),
        requests=Requests(
            seconds=found["requests_s"],
            clients_cpu_s=found["cpu_s"],
            server_cpu_s=None if cpu_after is None or cpu_before is None else cpu_after - cpu_before,
            batches={size: count for size, count in batches.items() if count},
        ),
    )


def _body(item: object) -> bytes:
    """Request body as sent by OpenAI's client, which requests vectors in base64."""
    return json.dumps({"input": item, "encoding_format": "base64"}).encode("ascii")


@contextmanager
def _limit_cores(count: int) -> Iterator[None]:
    """Limit this thread, and all threads and processes started from it, to `count` cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
