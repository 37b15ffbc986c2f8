"""Many clients at once, some hostile: every answer is its own request's, none is lost, and memory stays where it is."""

from __future__ import annotations

import base64
import random
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from jinaclip import ClipModel
from tests.conftest import PHOTOS, TEXTS
from tests.support.running import Running, running, until

CLIENTS = 16
Request = Callable[[httpx.Client, random.Random], str]  # its kind, once the answer was found to be right


@dataclass
class Known:
    """Texts and pictures, and what ClipModel gives for them.

    Attributes:
        texts, text_vectors: [N], [N, D].
        pictures, picture_vectors: base64 [M], [M, D].
    """

    texts: list[str]
    text_vectors: np.ndarray
    pictures: list[str]
    picture_vectors: np.ndarray

    @classmethod
    def of(cls, model: ClipModel) -> Known:
        texts = [f"{text} {'word ' * (number % 40)}{number}" for number in range(12) for text in TEXTS]
        files = []
        for number, path in enumerate(PHOTOS):
            with Image.open(path) as image:
                for size in (64, 200 + 37 * number):
                    file = BytesIO()
                    image.convert("RGB").resize((size, size + number)).save(file, "PNG")
                    files.append(file.getvalue())
        return cls(texts, model.encode_text(texts), [base64.b64encode(f).decode() for f in files],
                   model.encode_image(files))  # fmt: skip


@dataclass
class Load:
    """Requests of several clients against one server.

    Attributes:
        kinds: answered as they should be, by kind.
        wrong: what was not, in words.
        ended: requests that the end of the server broke off or refused, where that is expected.
    """

    server: Running
    known: Known
    ending: bool = False
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    ended: int = 0

    def run(self, count: int, seed: int) -> None:
        """Send so many requests, from CLIENTS threads."""
        numbers = iter(range(count))
        lock = threading.Lock()

        def client(number: int) -> None:
            rng = random.Random(seed * 1000 + number)
            with httpx.Client(base_url=self.server.url, timeout=120) as http:
                while True:
                    with lock:
                        if next(numbers, None) is None:
                            return
                    self._one(http, rng, lock)

        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(client, range(CLIENTS)))

    def _one(self, http: httpx.Client, rng: random.Random, lock: threading.Lock) -> None:
        request = rng.choices(REQUESTS, WEIGHTS)[0]
        try:
            kind, fault = request(self, http, rng), None
        except httpx.TransportError as error:
            kind, fault = "", None if self.ending else f"{request.__name__}: {type(error).__name__} {error}"
        except AssertionError as error:
            kind, fault = "", f"{request.__name__}: {str(error)[:300]}"
        with lock:
            if fault is not None:
                self.wrong.append(fault)
            elif kind:
                self.kinds[kind] += 1
            else:
                self.ended += 1

    def expect(self, response: httpx.Response, *statuses: int) -> dict[str, Any] | None:
        """The answer; None where the server said that it ends."""
        if response.status_code == 503 and self.ending:
            return None
        assert response.status_code in statuses, (response.status_code, response.text[:200])
        answer: dict[str, Any] = response.json()
        if response.status_code >= 400:
            assert answer["error"]["message"] == answer["detail"]
            assert "Traceback" not in response.text
        return answer


def texts(load: Load, http: httpx.Client, rng: random.Random) -> str:
    chosen = [rng.randrange(len(load.known.texts)) for _ in range(rng.choice((1, 1, 1, 2, 5, 20)))]
    body = {"input": [load.known.texts[i] for i in chosen]}
    return vectors(load, http.post("/v1/embeddings", json=body), load.known.text_vectors[chosen], "texts")


def base64_texts(load: Load, http: httpx.Client, rng: random.Random) -> str:
    index = rng.randrange(len(load.known.texts))
    body = {"input": {"text": load.known.texts[index]}, "encoding_format": "base64"}
    answer = load.expect(http.post("/v1/embeddings", json=body), 200)
    if answer is None:
        return ""
    found = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    assert np.abs(found - load.known.text_vectors[index]).max() <= 1e-5
    return "base64"


def pictures(load: Load, http: httpx.Client, rng: random.Random) -> str:
    chosen = [rng.randrange(len(load.known.pictures)) for _ in range(rng.choice((1, 1, 3)))]
    body = {"input": [{"image": load.known.pictures[i]} for i in chosen]}
    return vectors(load, http.post("/v1/embeddings", json=body), load.known.picture_vectors[chosen], "pictures")


def mixed(load: Load, http: httpx.Client, rng: random.Random) -> str:
    text, picture = rng.randrange(len(load.known.texts)), rng.randrange(len(load.known.pictures))
    items = [load.known.texts[text], {"image": "broken"}, {"bytes": load.known.pictures[picture]}]
    answer = load.expect(http.post("/v1/embeddings", json={"input": items, "partial": True}), 200)
    if answer is None:
        return ""
    assert answer["data"][1]["object"] == "error"
    for place, expected in ((0, load.known.text_vectors[text]), (2, load.known.picture_vectors[picture])):
        assert np.abs(np.array(answer["data"][place]["embedding"]) - expected).max() <= 1e-5
    return "mixed"


def ranks(load: Load, http: httpx.Client, rng: random.Random) -> str:
    text, picture = rng.randrange(len(load.known.texts)), rng.randrange(len(load.known.pictures))
    body = {"texts": ["cat", load.known.texts[text]], "images": load.known.pictures[picture]}
    answer = load.expect(http.post("/v1/rank", json=body), 200)
    if answer is None:
        return ""
    found = {result["index"]: result["cosine"] for result in answer["data"][0]["results"]}
    expected = float(load.known.text_vectors[text] @ load.known.picture_vectors[picture])
    assert abs(found[1] - expected) <= 1e-5
    return "ranks"


def bombs(load: Load, http: httpx.Client, rng: random.Random) -> str:
    value = rng.choice(
        (BOMB, base64.b64encode(rng.randbytes(500)).decode(), "%%%", "data:,x", "data:nothing", PHOTOS[0].name)
    )
    refused = http.post("/v1/embeddings", json={"input": [{rng.choice(("image", "bytes")): value}]})
    return "bombs" if load.expect(refused, 422) is not None else ""


def nonsense(load: Load, http: httpx.Client, rng: random.Random) -> str:
    content = rng.choice((
        b"", b"{", b"null", b"[" * 100_000, b'{"input": NaN}', b'{"input": "\\ud800"}', rng.randbytes(300),
        b'{"input": 1e999}', b'{"input": "a", "input": {"text": {"text": "a"}}}', b'{"input": "a", "dimensions": -1}',
        b'{"input": [[1, 2], "a"]}', b'{"input": {"url": "http://169.254.169.254/"}}', b'{"input": "a", "task": {}}',
    ))  # fmt: skip
    refused = http.post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
    return "nonsense" if load.expect(refused, 400, 422) is not None else ""


def too_much(load: Load, http: httpx.Client, rng: random.Random) -> str:
    body, status = rng.choice((
        ({"input": ["a"] * 3000}, 422), ({"input": "word " * 9000}, 422), ({"input": "a" * (3 << 20)}, 413),
        ({"input": [{"image": BOMB}] * 60}, 422),
    ))  # fmt: skip
    try:
        return "too much" if load.expect(http.post("/v1/embeddings", json=body), status) is not None else ""
    except httpx.WriteError:  # refused before all of it was sent
        assert status == 413
        return "too much"


def elsewhere(load: Load, http: httpx.Client, rng: random.Random) -> str:
    method, path, status = rng.choice((
        ("GET", "/v1/embeddings", 405), ("POST", "/v1/../etc/passwd", 404), ("DELETE", "/v1/models", 405),
        ("GET", "/health", 200), ("GET", "/v1/models", 200), ("GET", "/%00", 404),
    ))  # fmt: skip
    return "elsewhere" if load.expect(http.request(method, path), status) is not None else ""


def leaving(load: Load, http: httpx.Client, rng: random.Random) -> str:
    """A client that says half of it, or all and does not wait; nobody can tell what becomes of its answer."""
    body = b'{"input": "word word word"}'
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    words = rng.choice((head % len(body) + body, head % 1000 + body, b"GET / HT", rng.randbytes(100), head % 5 + body))
    address = httpx.URL(load.server.url)
    assert address.port is not None
    try:
        with socket.create_connection((address.host, address.port), timeout=30) as connection:
            connection.sendall(words)
    except OSError:
        assert load.ending
        return ""
    return "leaving"


def vectors(load: Load, response: httpx.Response, expected: np.ndarray, kind: str) -> str:
    answer = load.expect(response, 200)
    if answer is None:
        return ""
    assert [entry["index"] for entry in answer["data"]] == list(range(len(expected)))
    found = np.array([entry["embedding"] for entry in answer["data"]], np.float32)
    assert np.abs(found - expected).max() <= 1e-5  # a swapped one is off by 0.1 and more
    return kind


def _bomb() -> str:
    file = BytesIO()
    Image.new("1", (12_000, 12_000)).save(file, "PNG")  # 144 million pixels in 18 KB
    return base64.b64encode(file.getvalue()).decode()


BOMB = _bomb()
REQUESTS = [texts, base64_texts, pictures, mixed, ranks, bombs, nonsense, too_much, elsewhere, leaving]
WEIGHTS = [40, 15, 15, 6, 4, 5, 6, 2, 4, 3]
WORDS = ("--max-body", "2")


def resident_mib(server: Running) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text("ascii")
    found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def settled(server: Running) -> None:
    """Wait until every item that was accepted is answered."""
    names = [f'jinaclip_accepted_items{{tower="{tower}"}}' for tower in ("text", "image")]
    until(lambda: not any(map(server.metric, names)))


def check(load: Load, count: int) -> None:
    assert load.wrong == []
    assert sum(load.kinds.values()) + load.ended == count
    assert "Traceback" not in load.server.log


def test_nothing_is_lost_or_swapped(small_bundle: Path, model: ClipModel) -> None:
    with running(small_bundle, *WORDS) as server:
        load = Load(server, Known.of(model))
        load.run(1000, seed=1)
        check(load, 1000)
        assert load.ended == 0 and set(load.kinds) == {
            "texts", "base64", "pictures", "mixed", "ranks", "bombs", "nonsense", "too much", "elsewhere", "leaving"
        }  # fmt: skip
        settled(server)


@pytest.mark.slow
def test_memory_stays_where_it_is(small_bundle: Path, model: ClipModel) -> None:
    """After 10,000 requests within 5 % of what it was after 1,000."""
    with running(small_bundle, *WORDS) as server:
        load = Load(server, Known.of(model))
        sizes = []
        for part in range(10):
            load.run(1000, seed=part)
            settled(server)
            sizes.append(resident_mib(server))
        print(f"resident MiB after each 1,000 requests: {[round(size) for size in sizes]}; {dict(load.kinds)}")
        check(load, 10_000)
        assert sizes[-1] <= 1.05 * sizes[0], sizes


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_an_end_in_the_middle(small_bundle: Path, model: ClipModel, end: signal.Signals) -> None:
    """SIGTERM: what was accepted is answered rightly, the rest is told. SIGKILL: the next one starts as ever."""
    known = Known.of(model)
    with running(small_bundle, *WORDS) as server:
        load = Load(server, known, ending=True)

        def end_it() -> None:
            until(lambda: server.metric('jinaclip_items_total{tower="text"}') >= 150)
            server.process.send_signal(end)

        timer = threading.Thread(target=end_it)
        timer.start()
        load.run(600, seed=7)
        timer.join()
        assert server.process.wait(60) == (0 if end == signal.SIGTERM else -signal.SIGKILL)
        check(load, 600)
        assert load.ended > 0 and sum(load.kinds.values()) > 20
        assert end == signal.SIGKILL or "were not finished" not in server.log
    with running(small_bundle, *WORDS) as server:
        load = Load(server, known)
        load.run(50, seed=8)
        check(load, 50)
