"""The kind of case that measures a server with concurrent clients, compared with ClipModel in one process."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np

from jinaclip.model import ClipModel
from jinaclip_bench.cases.inputs import lengths_of, texts_of
from jinaclip_bench.cases.settings import Embed, Opened, Settings
from jinaclip_bench.cases.table import PHOTO_SIZE, Case, photo_jpeg
from jinaclip_bench.errors import BenchError
from jinaclip_bench.measuring.child_process import command
from jinaclip_bench.measuring.timing import Requests, Sample, Side, ours, timed
from jinaclip_bench.sides.server_process import Server, serving

MOST_ROUNDS = 9
SERVED = "served"  # suffix of the name of the server's side


@contextmanager
def serve(case: Case, settings: Settings, torch: Mapping[str, Embed]) -> Iterator[Opened]:
    """Items to vectors: from a server, with one item per request, and from ClipModel in this process.

    ClipModel gets one text per call, as in code that answers queries one after another, and all photos in one call,
    which is fastest. The server, its clients and ClipModel use the same cores, and only one side runs at a time. Torch
    is not measured.
    """
    bundle, tower = settings.bundle, case.tower
    assert case.clients is not None  # the table of cases gives it its clients
    shape: tuple[int, ...]
    if tower == "text":
        lengths = lengths_of(case)
        texts = texts_of(bundle, bundle.open_tokenizer(), lengths)
        bodies, theirs = [_body(text) for text in texts], partial(_one_a_call, texts)
        how, shape, tokens = "one a call", (case.rows, max(lengths)), sum(lengths)
    else:
        files = [photo_jpeg(number) for number in range(case.rows)]
        bodies, theirs = [_body([{"image": _base64(file)}]) for file in files], partial(_all_in_a_call, files)
        how, shape, tokens = "all in a call", (case.rows, PHOTO_SIZE[1], PHOTO_SIZE[0], 3), None
    with _cores(settings.threads), ExitStack() as stack:
        sides: dict[str, Side] = {}
        for precision in settings.precisions:
            server = stack.enter_context(serving(bundle, tower, precision, threads=settings.threads))
            sides[ours(precision, SERVED)] = partial(_asked, server, bodies, case.clients)
        for precision in settings.precisions:
            model = stack.enter_context(
                ClipModel(
                    bundle.directory, towers=(tower,), precision={tower: precision}, threads=settings.threads,
                    device="cpu", backend="onnxruntime",
                )
            )  # fmt: skip
            sides[f"ClipModel {precision}, {how}"] = timed(partial(theirs, model))
        yield Opened(
            sides=sides,
            shape=shape,
            tokens=tokens,
            threads=settings.threads,
            rounds=min(settings.repeats, MOST_ROUNDS),
            burn_in=1,
        )


def _one_a_call(texts: Sequence[str], model: ClipModel) -> np.ndarray:
    return np.stack([model.encode_text(text) for text in texts])


def _all_in_a_call(files: Sequence[bytes], model: ClipModel) -> np.ndarray:
    return model.encode_image(files)


def _asked(server: Server, bodies: Sequence[bytes], clients: int) -> Sample:
    """Get all vectors from the server. The clients run in a new process, whose start is not timed."""
    before, cpu_before = server.batches(), server.cpu_s()
    started = command("jinaclip_bench.sides.load_clients", server.url, f"--clients={clients}")
    done = subprocess.run(started, input=b"\n".join(bodies), capture_output=True)
    if done.returncode != 0:
        said = (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["nothing"])[-1]
        raise BenchError(
            f"the clients of `jinaclip serve` failed with status {done.returncode}: {said}; last line of the server: "
            f"{server.said()}"
        )
    cpu_after, after = server.cpu_s(), server.batches()
    found = json.loads(done.stdout)
    runs = {size: after[size] - before.get(size, 0) for size in sorted(after)}
    return Sample(
        seconds=found["seconds"],
        output=np.stack([np.frombuffer(base64.b64decode(vector), "<f4") for vector in found["vectors"]]),
        requests=Requests(
            seconds=found["requests_s"],
            clients_cpu_s=found["cpu_s"],
            server_cpu_s=None if cpu_after is None or cpu_before is None else cpu_after - cpu_before,
            batches={size: count for size, count in runs.items() if count},
        ),
    )


def _body(given: object) -> bytes:
    """Request body as sent by OpenAI's client, which requests vectors in base64."""
    return json.dumps({"input": given, "encoding_format": "base64"}).encode("ascii")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


@contextmanager
def _cores(count: int) -> Iterator[None]:
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
