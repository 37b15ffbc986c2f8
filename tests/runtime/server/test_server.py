"""`jinaclip serve` over a real socket, with real clients: what they get is what ClipModel gives."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx_ir as ir
import openai
import pytest
from PIL import Image

from jinaclip import ClipModel
from jinaclip.cli import main
from jinaclip.server.apis.answers import encoded, image_tokens
from jinaclip.server.apis.items import ImageFile, ImageUrl, Text, TokenIds, decode_image_file
from jinaclip.server.apis.requests import Rules, embedding_request
from jinaclip.server.errors import Problem
from jinaclip.server.lifecycle import listen
from jinaclip_engines.graph import constant, read, shape_of, write
from tests.conftest import PHOTOS, TEXTS
from tests.export.test_certify import register
from tests.support.running import Running, running, until, vectors_of

DIMS = (32, 64, 128)
PICTURE = base64.b64encode(PHOTOS[1].read_bytes()).decode()


@pytest.fixture(scope="module")
def server(small_bundle: Path) -> Iterator[Running]:
    with running(small_bundle, "--log-requests", "--model-name", "jina-clip-v2") as started:
        yield started


# What clients get


def test_openais_client(server: Running, model: ClipModel) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    expected = model.encode_text(TEXTS)
    for form in ("float", "base64"):
        answer = client.embeddings.create(model="random-small", input=TEXTS, encoding_format=form)
        found = [entry.embedding for entry in answer.data]
        if form == "base64":  # the client decodes it only where it chose it itself
            found = [np.frombuffer(base64.b64decode(value), "<f4").tolist() for value in found]  # type: ignore[arg-type]
        assert np.abs(np.array(found) - expected).max() <= 1e-6
    answer = client.embeddings.create(model="jina-clip-v2", input="cat", dimensions=32, user="somebody")
    assert np.abs(np.array(answer.data[0].embedding) - model.encode_text("cat", truncate_dim=32)).max() <= 1e-6
    assert answer.usage.total_tokens == len(model.text_encoder.prepare(["cat"])[0])
    with pytest.raises(
        openai.NotFoundError, match="model 'gpt' is not served here; expected random-small, jina-clip-v2"
    ):
        client.embeddings.create(model="gpt", input="cat")
    with pytest.raises(openai.UnprocessableEntityError, match="token ids"):
        client.embeddings.create(model="random-small", input=[[5, 6, 7]])
    assert [entry.id for entry in client.models.list().data] == ["random-small"]


def test_the_hosted_forms_mixed(server: Running, model: ClipModel) -> None:
    """Every kind of item, in order, with numbers as strings, as the published samples send them."""
    body = {
        "model": "jina-clip-v2", "dimensions": "64", "normalized": True, "late_chunking": False,
        "return_multivector": False,
        "embedding_type": "float", "task": "retrieval.query",
        "input": [
            {"text": "a cup of coffee"}, {"image": PICTURE}, "eine Tasse", {"bytes": PICTURE},
            {"image": f"data:image/png;base64,{PICTURE}"}, {"url": f"data:image/png;base64,{PICTURE}"},
        ],
    }  # fmt: skip
    response = server.post(body)
    found = vectors_of(response)
    texts = model.encode_text(["a cup of coffee", "eine Tasse"], task="retrieval.query", truncate_dim=64)
    picture = model.encode_image(PHOTOS[1], truncate_dim=64)
    expected = np.stack([texts[0], picture, texts[1], picture, picture, picture])
    assert np.abs(found - expected).max() <= 1e-6
    answer = response.json()
    counts = [len(ids) for ids in model.text_encoder.prepare(["a cup of coffee", "eine Tasse"], task="retrieval.query")]
    assert answer["usage"] == {"total_tokens": sum(counts) + 4 * 8000, "prompt_tokens": sum(counts) + 4 * 8000}
    assert (answer["object"], answer["model"], answer["data"][0]["object"]) == ("list", "random-small", "embedding")
    assert response.headers["x-jinaclip-provenance"] == model.provenance


def test_raw_and_unit_vectors(server: Running, model: ClipModel) -> None:
    found = vectors_of(server.post({"input": "cat", "normalized": False, "dimensions": 32}))[0]
    expected = model.encode_text("cat", normalize_embeddings=False, truncate_dim=32)
    assert np.abs(found - expected).max() <= 1e-5 and abs(np.linalg.norm(found) - 1) > 1e-3


def test_bits_are_signs(server: Running, model: ClipModel) -> None:
    """ubinary: most significant bit first; binary: those bytes less 128, which clients add again."""
    kinds = ["float", "base64", "binary", "ubinary"]
    entry = server.post({"input": "cat", "embedding_type": kinds}).json()["data"][0]["embedding"]
    assert list(entry) == kinds
    signs = np.array(entry["float"]) > 0
    assert np.array_equal(np.unpackbits(np.array(entry["ubinary"], np.uint8)).astype(bool), signs)
    assert [value + 128 for value in entry["binary"]] == entry["ubinary"]
    assert np.array_equal(np.frombuffer(base64.b64decode(entry["base64"]), "<f4"), np.array(entry["float"], np.float32))
    alone = server.post({"input": "cat", "encoding_format": "ubinary"}).json()["data"][0]["embedding"]
    assert alone == entry["ubinary"]
    assert encoded(np.array([1, -1, 0, 2, -3, 0.5, -0.0, 9], np.float32), "ubinary") == [0b10010101]


def test_images_count_by_tiles() -> None:
    for size, tiles in (((512, 512), 1), ((720, 720), 4), ((1080, 1080), 9), ((1, 1), 1), ((513, 512), 2)):
        assert image_tokens(*size) == 4000 * tiles


def test_long_texts_are_refused_or_cut(small_bundle: Path, model: ClipModel) -> None:
    with running(small_bundle, "--max-tokens", "8", "--towers", "text") as short:
        long = "one two three four five six seven eight nine"
        count = len(model.text_encoder.prepare([long])[0])
        refused = short.post({"input": ["a", long]})
        assert refused.status_code == 422 and refused.json()["error"]["index"] == 1
        assert f"input[1] has {count} tokens, the limit is 8" in refused.json()["detail"]
        response = short.post({"input": long, "truncate": True})
        assert np.abs(vectors_of(response)[0] - model.encode_text(long, max_length=8)).max() <= 1e-6
        assert response.json()["usage"]["total_tokens"] == 8
        picture = short.post({"input": [{"image": PICTURE}]})
        assert picture.status_code == 422 and "this server has no image tower" in picture.json()["detail"]


def test_partial_answers(server: Running, model: ClipModel) -> None:
    broken = base64.b64encode(b"no picture").decode()
    body = {"input": ["cat", {"image": broken}, {"image": "%%%"}, {"text": 3}, {"image": PICTURE}]}
    refused = server.post(body)
    assert refused.status_code == 422 and refused.json()["error"]["index"] in (1, 2, 3)
    data = server.post({**body, "partial": True}).json()["data"]
    assert [entry["object"] for entry in data] == ["embedding", "error", "error", "error", "embedding"]
    assert [entry["index"] for entry in data] == [0, 1, 2, 3, 4] and data[1]["error"]["index"] == 1
    assert np.abs(np.array(data[4]["embedding"]) - model.encode_image(PHOTOS[1])).max() <= 1e-6
    assert server.post({"input": [{"image": broken}], "partial": True}).status_code == 422


def test_vectors_that_are_not_finite_are_an_error(small_bundle: Path, model: ClipModel, tmp_path: Path) -> None:
    """In JSON they would be null, which some clients store: here a NaN in the row of one token, past the self-test."""
    copy = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    (token,) = model.text_encoder.prepare(["\U0001f600"])[0][-2:-1]
    graph = read(small_bundle / "text-fp32.onnx")
    (table,) = (
        value for value in graph.graph.initializers.values() if shape_of(value)[:1] == (model.bundle.vocab_size,)
    )
    values = constant(table).copy()
    values[token] = np.nan
    table.const_value = ir.tensor(values)
    for path in copy.glob("text-fp32.onnx*"):
        path.unlink()
    write(graph, copy / "text-fp32.onnx")
    register(copy, "text", "fp32")
    with running(copy, "--towers", "text") as server:
        response = server.post({"input": ["cat", "\U0001f600"]})
        assert response.status_code == 500 and response.json()["error"]["code"] == "not_finite"
        assert response.json()["detail"] == "input[1] has an embedding with NaN or infinite values"
        assert server.post({"input": ["cat"]}).status_code == 200


# What they are told


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (b"{", 400, None, "The request body is not valid JSON"),
        (b"[]", 422, "body", "The request body is a list, expected a JSON object"),
        (b'"text"', 422, "body", "The request body is a string"),
        ({}, 422, "input", "input is missing"),
        ({"input": []}, 422, "input", "an empty list"),
        ({"input": 5}, 422, "input", "token ids"),
        ({"input": [1, 2]}, 422, "input", "token ids"),
        ({"input": ["a", [1]]}, 422, "input", "token ids"),
        ({"input": ["a", None]}, 422, "input", r"input\[1\] is null"),
        ({"input": [{}]}, 422, "input", r"input\[0\] has no value, expected an object with one of"),
        ({"input": [{"text": "a", "image": "b"}]}, 422, "input", "has text and image"),
        ({"input": [{"text": "a", "lang": "en"}]}, 422, "input", "unsupported field 'lang', expected an object"),
        ({"input": [{"image": "https://example.org/a.png"}]}, 422, "input", "does not fetch URLs.*--fetch-urls"),
        ({"input": [{"url": "/etc/passwd"}]}, 422, "input", "has a url that is not an http:, https: or data: URL"),
        ({"input": [{"image": "/etc/passwd"}]}, 422, "input", "is not valid base64"),
        ({"input": [{"image": "data:image/png;base64"}]}, 422, "input", "without a comma"),
        ({"input": "a", "dimensions": 100}, 422, "dimensions", "dimensions is 100, expected one of 32, 64, 128"),
        ({"input": "a", "dimensions": "x"}, 422, "dimensions", "expected one of"),
        ({"input": "a", "dimensions": True}, 422, "dimensions", "expected one of"),
        ({"input": "a", "task": "separation"}, 422, "task", "supported tasks: retrieval.query.*--unknown-task ignore"),
        ({"input": "a", "task": []}, 422, "task", "expected a string"),
        ({"input": "a", "dimension": 64}, 422, "dimension", "did you mean dimensions"),
        ({"input": "a", "return_multivector": True}, 422, "return_multivector", "expected false"),
        ({"input": "a", "normalized": "yes"}, 422, "normalized", "expected true or false"),
        ({"input": "a", "late_chunking": True}, 422, "late_chunking", "expected false"),
        ({"input": "a", "embedding_type": "int8"}, 422, "embedding_type", "expected float, base64"),
        ({"input": "a", "embedding_type": []}, 422, "embedding_type", "expected float, base64"),
        ({"input": "a", "embedding_type": "float", "encoding_format": "base64"}, 422, "encoding_format", "differ"),
        ({"input": "a", "temperature": 1}, 422, "temperature", "is not a field of this request"),
        ({"input": "a", "model": 3}, 422, "model", "expected a string"),
        ({"input": "a", "model": "other"}, 404, "model", "is not served here"),
        ({"input": "\ud800"}, 422, "input", r"input\[0\]|not valid JSON"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_named(server: Running, body: Any, status: int, param: str | None, words: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(
        f"{server.url}/v1/embeddings", content=content, headers={"content-type": "application/json"}, timeout=30
    )
    found = response.json()
    assert response.status_code in (status, 400), found
    assert re.search(words, found["detail"]), found["detail"]
    assert found["error"]["message"] == found["detail"] and set(found["error"]) >= {"message", "type", "param", "code"}
    assert found["error"]["param"] == param or response.status_code == 400


def test_other_requests(server: Running) -> None:
    assert server.post({"input": "a"}, headers={"content-type": "text/plain"}).status_code == 415
    for method, path, status in (("GET", "/v1/embeddings", 405), ("POST", "/v1/nothing", 404), ("GET", "/", 404)):
        response = httpx.request(method, f"{server.url}{path}")
        assert response.status_code == status and response.json()["error"]["message"] == response.json()["detail"]
    assert httpx.get(f"{server.url}/health").json()["towers"]["text"]["device"] == "cpu"
    assert httpx.get(f"{server.url}/metrics").text.startswith("# HELP")
    facts = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert facts["aliases"] == ["jina-clip-v2"] and facts["licence"] and facts["dimensions"] == list(DIMS)
    echoed = httpx.get(f"{server.url}/ready", headers={"X-Request-Id": "abc-1"})
    assert echoed.headers["x-request-id"] == "abc-1"
    assert len(httpx.get(f"{server.url}/ready", headers={"X-Request-Id": "%"}).headers["x-request-id"]) == 32


def test_bombs_and_sizes(small_bundle: Path) -> None:
    def picture(width: int, height: int) -> dict[str, str]:
        file = BytesIO()
        Image.new("L", (width, height)).save(file, "PNG")
        return {"image": base64.b64encode(file.getvalue()).decode()}

    words = ["--max-body", "1", "--max-items", "3", "--max-pixels", "1000000", "--max-image", "1"]
    with running(small_bundle, *words, "--towers", "image") as small:
        assert small.post({"input": [picture(1000, 1000)]}).status_code == 200
        bomb = small.post({"input": [picture(5000, 5000)]})
        assert bomb.status_code == 422 and "5000 x 5000 pixels; expected 1 to 1000000" in bomb.json()["detail"]
        many = small.post({"input": ["a"] * 4})
        assert many.status_code == 422 and "the limit is 3 per request" in many.json()["detail"]
        assert small.post({"input": "a" * (2 << 20)}).status_code == 413
    for value in ("A" * 100, "data:,AAAA", "data:;base64,AAAAAAAA"):
        with pytest.raises(Problem, match="the limit is 3 bytes"):
            decode_image_file(value, 3)
    assert decode_image_file("AAAA", 3) == bytes(3)


def test_items_are_what_was_sent() -> None:
    content = b"\x00\xffpicture"
    encoded = base64.b64encode(content).decode()
    plain = "data:image/png," + "".join(f"%{byte:02x}" for byte in content)
    rows = ["http://is.text/", {"text": ""}, {"bytes": encoded}, {"image": plain, "url": None}, {"url": "HTTP://a.b/"}]
    request = embedding_request({"input": [*rows, [0, 2]]}, Rules(("m",), DIMS, (), accept_token_ids=True))
    assert [item.content for item in request.input] == [
        Text("http://is.text/"), Text(""), ImageFile(encoded), ImageFile(plain), ImageUrl("HTTP://a.b/"),
        TokenIds([0, 2]),
    ]  # fmt: skip
    assert decode_image_file(encoded, 99) == decode_image_file(plain, 99) == content


# Keys


def test_keys(small_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"JINACLIP_SERVE_API_KEY": "key-one,key-zw\u00f6lf"}
    with running(small_bundle, "--towers", "text", environment=environment) as locked:
        for header, status in (
            ({}, 401), ({"Authorization": "Bearer"}, 401), ({"Authorization": "Basic key-one"}, 401),
            ({"Authorization": "Bearer two"}, 401), ({"Authorization": "Bearer key-one"}, 200),
            ({"Authorization": "bearer   key-one"}, 200),
        ):  # fmt: skip
            assert locked.post({"input": "a"}, headers=header).status_code == status, header
        for path, status in (("/metrics", 401), ("/v1/models", 401), ("/health", 200), ("/ready", 200)):
            assert httpx.get(f"{locked.url}{path}").status_code == status
        assert "key-" not in locked.log
    assert main(["serve", str(small_bundle), "--host", "0.0.0.0"]) == 1
    assert "can be reached from other machines, and no --api-key is set" in capsys.readouterr().err


# Many at once, and the end


def test_every_client_gets_its_own_vectors(server: Running, model: ClipModel) -> None:
    texts = [f"{text} {number}" for number in range(6) for text in TEXTS]
    expected = model.encode_text(texts)
    picture = model.encode_image(PHOTOS[1])

    def one(number: int) -> float:
        index = number % len(texts)
        if number % 9 == 0:
            found = vectors_of(server.post({"input": [texts[index], {"image": PICTURE}]}))
            return float(max(np.abs(found[0] - expected[index]).max(), np.abs(found[1] - picture).max()))
        return float(np.abs(vectors_of(server.post({"input": texts[index]}))[0] - expected[index]).max())

    with ThreadPoolExecutor(16) as pool:
        assert max(pool.map(one, range(300))) <= 1e-5
    assert "coffee" not in server.log  # inputs are in no log


def test_a_full_queue_says_when_to_come_again(small_bundle: Path) -> None:
    slow = ["word " * 1000] * 8
    with (
        running(small_bundle, "--max-queue", "8", "--towers", "text", "--threads", "1") as small,
        ThreadPoolExecutor(1) as pool,
    ):
        taken = pool.submit(small.post, {"input": slow})
        until(lambda: small.metric('jinaclip_accepted_items{tower="text"}') == 8)
        refused = small.post({"input": "a"})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        expected = "8 texts are queued or being processed, and 1 more would exceed the limit of 8"
        assert expected in refused.json()["detail"]
        assert taken.result().status_code == 200
        assert small.post({"input": ["a"] * 8}).status_code == 200
        never = small.post({"input": ["a"] * 9})
        assert never.status_code == 422 and "9 texts exceed this server's limit of 8" in never.json()["detail"]
        assert small.metric('jinaclip_refused_items_total{tower="text"}') == 1
        assert small.metric('jinaclip_accepted_items{tower="text"}') == 0


def test_bodies_together_are_bounded(small_bundle: Path) -> None:
    with (
        running(small_bundle, "--max-body", "1", "--max-bodies", "1", "--towers", "text", "--threads", "1") as small,
        ThreadPoolExecutor(1) as pool,
    ):
        taken = pool.submit(small.post, {"input": ["word " * 2000] * 6})
        until(lambda: small.metric('jinaclip_accepted_items{tower="text"}') == 6)
        refused = small.post({"input": "word " * 200_000})
        expected = "bytes of request bodies are queued or being processed"
        assert refused.status_code == 429 and expected in refused.json()["detail"]
        assert taken.result().status_code == 200


def test_clients_that_leave_are_not_run_for(small_bundle: Path) -> None:
    """Their texts wait behind those of a client that stays, and are dropped when their turn comes."""
    with running(small_bundle, "--towers", "text", "--threads", "1") as single, ThreadPoolExecutor(4) as pool:
        slow = "word " * 1000  # 4,000 tokens
        stays = pool.submit(single.post, {"input": [slow] * 12, "truncate": True})
        until(lambda: single.metric('jinaclip_accepted_items{tower="text"}') == 12)

        def leave() -> None:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{single.url}/v1/embeddings", json={"input": [slow] * 4, "truncate": True}, timeout=0.4)

        list(pool.map(lambda _: leave(), range(3)))
        assert stays.result().status_code == 200
        until(lambda: single.metric('jinaclip_queue_items{tower="text"}') == 0)
        assert single.metric('jinaclip_dropped_items_total{tower="text"}') == 12
        assert single.metric('jinaclip_items_total{tower="text"}') == 12
        assert single.post({"input": "still here"}).status_code == 200


def test_sigterm_answers_what_was_accepted(small_bundle: Path, model: ClipModel) -> None:
    server = Running(small_bundle, "--towers", "text")
    slow = [f"{'word ' * 300} {number}" for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(server.post, {"input": slow}) for _ in range(6)]
        until(lambda: server.metric('jinaclip_items_total{tower="text"}')
              + server.metric('jinaclip_accepted_items{tower="text"}') == 72)  # fmt: skip
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        try:
            late = server.post({"input": "late"}).status_code
        except httpx.TransportError:
            late = 503  # it has ended already
        assert late == 503
        found = [answer.result() for answer in answers]
    expected = model.encode_text(slow)
    for response in found:
        assert np.abs(vectors_of(response) - expected).max() <= 1e-5
    assert server.process.wait(30) == 0 and time.monotonic() - start < 30
    server.end()


def test_the_grace_period_ends(small_bundle: Path) -> None:
    """A request that takes far longer gets an error, and the process ends by itself."""
    server = Running(small_bundle, "--towers", "text", "--threads", "1", "--grace", "0.5")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, {"input": ["word " * 8000] * 40, "truncate": True})
        until(lambda: server.metric('jinaclip_queue_items{tower="text"}') > 30)
        server.process.send_signal(signal.SIGTERM)
        refused = answer.result()
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
    assert server.process.wait(60) == 0
    assert "were not finished within 0.5 s" in server.log and "terminate called" not in server.log
    server.end()


def test_a_body_that_does_not_arrive_is_answered_at_shutdown(small_bundle: Path) -> None:
    server = Running(small_bundle, "--towers", "text", "--threads", "1", "--grace", "0.5")
    host, port = httpx.URL(server.url).host, httpx.URL(server.url).port
    with socket.create_connection((host, port)) as client:
        client.sendall(b'POST /v1/embeddings HTTP/1.1\r\nHost: here\r\nContent-Length: 20\r\n\r\n{"input": ')
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 503 ") and b'"code":"shutting_down"' in answer
    assert server.process.wait(60) == 0 and "Traceback" not in server.log
    server.end()


def test_sigkill_and_again(small_bundle: Path) -> None:
    for _ in range(2):
        server = Running(small_bundle, "--towers", "text")
        assert server.post({"input": "a"}).status_code == 200
        server.process.send_signal(signal.SIGKILL)
        assert server.process.wait(10) == -signal.SIGKILL
        server.end()


# The command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-queue", "0"], "--max-queue is 0, expected a whole number of at least 1"),
        (["--grace", "-1"], "--grace is -1.0"),
        (["--api-key", " "], "an --api-key is empty"),
        (["--port", "70000"], "cannot listen on 127.0.0.1 port 70000"),
        (["--host", "192.0.2.1", "--api-key", "k"], "cannot listen on 192.0.2.1 port"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_said(
    small_bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["serve", str(small_bundle), "--towers", "text", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(server: Running, small_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = server.url.rpartition(":")[2]
    assert main(["serve", str(small_bundle), "--towers", "text", "--port", port]) == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


def test_answers_are_sent_at_once() -> None:
    """Without TCP_NODELAY the second part of each answer waits some 40 ms for the first one's acknowledgement."""
    import asyncio
    import socket

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            value = await found
            writer.close()
            await writer.wait_closed()
        return value

    assert asyncio.run(accepted()) == 1
