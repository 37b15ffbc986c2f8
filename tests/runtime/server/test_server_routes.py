"""What the server has besides /v1/embeddings: ranks, its own description, health, keys, and marketplaces' paths."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from jinaclip import ClipModel
from jinaclip.cli import main
from jinaclip.server.metrics import STAGES
from jinaclip.server.service import Service
from tests.conftest import PHOTOS
from tests.support.running import Running, running, vectors_of

PICTURES = [base64.b64encode(path.read_bytes()).decode() for path in PHOTOS[:3]]


@pytest.fixture(scope="module")
def server(small_bundle: Path) -> Iterator[Running]:
    words = ["--accept-token-ids", "--unknown-task", "ignore", "--model-name", "jina-clip-v2"]
    with running(small_bundle, *words) as started:
        yield started


# Ranks


def ranked(server: Running, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/rank", json=body, timeout=60)


def test_ranks_are_the_softmax_of_the_models_logits(server: Running, model: ClipModel) -> None:
    texts: list[Any] = ["a cup of coffee", {"text": "an astronaut"}, "eine Katze", "a cat"]
    body = {"texts": texts, "images": [PICTURES[0], {"image": PICTURES[1]}, {"bytes": PICTURES[2]}], "dimensions": 64}
    plain = [text if isinstance(text, str) else text["text"] for text in texts]
    cosines = model.encode_text(plain, truncate_dim=64) @ model.encode_image(PHOTOS[:3], truncate_dim=64).T
    logits = np.exp(cosines.astype(np.float64) * np.exp(model.logit_scale))
    for over, odds, likeness in (
        ("texts", (logits / logits.sum(axis=0)).T, cosines.T), ("images", (logits.T / logits.sum(axis=1)).T, cosines),
    ):  # fmt: skip
        response = ranked(server, {**body, "over": over})
        answer = response.json()
        assert [entry["index"] for entry in answer["data"]] == list(range(len(odds)))
        for row, entry in enumerate(answer["data"]):
            results = entry["results"]
            assert [result["index"] for result in results] == np.argsort(-odds[row]).tolist()
            for result in results:
                assert result["probability"] == pytest.approx(odds[row, result["index"]], abs=1e-4)
                assert result["cosine"] == pytest.approx(likeness[row, result["index"]], abs=1e-5)
            assert sum(result["probability"] for result in results) == pytest.approx(1)
        assert answer["usage"]["total_tokens"] > 12_000 and response.headers["x-jinaclip-provenance"]
    best = ranked(server, {**body, "top_n": 1}).json()["data"]
    assert [len(entry["results"]) for entry in best] == [1, 1, 1]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"texts": ["a"]}, "images is missing"),
        ({"texts": [], "images": PICTURES[0]}, "texts is an empty list"),
        ({"texts": ["a", 3], "images": PICTURES[0]}, "texts[1] is a number"),
        ({"texts": [{"image": PICTURES[0]}], "images": PICTURES[0]}, "texts[0] has the unsupported field 'image'"),
        ({"texts": "a", "images": [PICTURES[0], "no picture"]}, "images[1] is not valid base64"),
        ({"texts": "a", "images": [{"text": "a"}]}, "images[0] has the unsupported field 'text'"),
        ({"texts": "a", "images": PICTURES[0], "over": "both"}, "over is 'both', expected texts or images"),
        ({"texts": "a", "images": PICTURES[0], "top_n": 0}, "top_n is 0, expected a whole number of at least 1"),
        ({"texts": ["a"] * 2000, "images": ["AAAA"] * 100}, "have 2100 items together, the limit is 2048"),
        ({"texts": "a", "images": "http://127.0.0.1/a.png"}, "this server does not fetch URLs"),
        ({"texts": "a", "images": PICTURES[0], "input": "a"}, "'input' is not a field"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_rank_is_named(server: Running, body: dict[str, Any], words: str) -> None:
    response = ranked(server, body)
    assert response.status_code == 422 and words in response.json()["detail"]


# Token ids, tasks


def test_token_ids_of_this_tokenizer(server: Running, model: ClipModel) -> None:
    texts = ["a cup of coffee", "eine Tasse"]
    ids = model.text_encoder.prepare(texts)
    expected = model.encode_text(texts)
    response = server.post({"input": [ids[0], "eine Tasse", ids[1]]})
    assert np.abs(vectors_of(response) - expected[[0, 1, 1]]).max() <= 1e-6
    assert np.abs(vectors_of(server.post({"input": ids[0]})) - expected[0]).max() <= 1e-6  # one text's, bare
    assert response.json()["usage"]["total_tokens"] == len(ids[0]) + 2 * len(ids[1])
    size, bos, eos = model.bundle.vocab_size, ids[0][0], ids[0][-1]
    for wrong, words in (
        ([5, 6, 7], "input[0] does not match this tokenizer: token ids must begin with"),
        ([bos, size, eos], f"contains the token id {size}, expected 0 to {size - 1}"),
        ([bos, -1, eos], "contains the token id -1"),
        ([bos, 1 << 62, eos], f"contains the token id {1 << 62}"),
        ([bos, model.bundle.special_ids["pad"], eos], "contains the padding token id"),
        ([[bos], "a"], "does not match this tokenizer"),
        ([[], "a"], "does not match this tokenizer"),
        ([[bos, "5", eos]], "not a whole number; expected a list of token ids"),
        ([[bos, 5.5, eos]], "not a whole number; expected a list of token ids"),
        ([bos, *[5] * 9000, eos], "has 9002 tokens, the limit is 8192"),
    ):
        refused = server.post({"input": wrong})
        assert refused.status_code == 422 and words in refused.json()["detail"], words
    task = server.post({"input": ids, "task": "retrieval.query"})
    assert task.status_code == 422 and "remove task or send text" in task.json()["detail"]


def test_unknown_tasks_are_ignored_where_asked_for(server: Running, model: ClipModel) -> None:
    response = server.post({"input": "cat", "task": "text-matching\r\nX-Other: 1"})
    assert np.abs(vectors_of(response)[0] - model.encode_text("cat")).max() <= 1e-6
    assert "was ignored. Supported tasks: retrieval.query" in response.headers["x-jinaclip-warning"]
    known = server.post({"input": "cat", "task": "retrieval.query"})
    assert np.abs(vectors_of(known)[0] - model.encode_text("cat", task="retrieval.query")).max() <= 1e-6
    assert "x-jinaclip-warning" not in known.headers


# What it tells of itself


def test_pages_of_the_server(server: Running) -> None:
    page = httpx.get(f"{server.url}/docs")
    assert page.headers["content-type"].startswith("text/html") and "/v1/rank" in page.text
    assert "<script" not in page.text and "https://" not in page.text  # read where there is no network
    document = httpx.get(f"{server.url}/openapi.json").json()
    for path in ("/v1/embeddings", "/v1/rank", "/v1/models", "/health", "/ready", "/metrics", "/docs"):
        assert path in document["paths"]
    fields = document["components"]["schemas"]["EmbeddingRequest"]["properties"]
    assert fields["dimensions"]["enum"] == [32, 64, 128, "32", "64", "128", None]
    assert fields["model"]["enum"] == ["random-small", "jina-clip-v2", None]


def test_metrics_tell_of_every_stage(server: Running) -> None:
    server.post({"input": ["a", {"image": PICTURES[0]}]})
    text = httpx.get(f"{server.url}/metrics").text
    for tower, stages in (("text", ("tokenise", "wait", "run")), ("image", ("decode", "wait", "run"))):
        for stage in stages:
            assert stage in STAGES
            assert server.metric(f'jinaclip_stage_seconds_count{{stage="{stage}",tower="{tower}"}}') >= 1
        assert server.metric(f'jinaclip_accepted_items{{tower="{tower}"}}') == 0
    assert 'jinaclip_batches_total{size="1",tower="image"}' in text
    assert 'jinaclip_requests_total{path="/v1/embeddings",status="200"}' in text


def test_health_tells_what_runs(server: Running) -> None:
    answer = httpx.get(f"{server.url}/health").json()
    assert answer["status"] == "ok"
    for facts in answer["towers"].values():
        assert facts["providers"] == ["CPUExecutionProvider"] and facts["precision"] == "fp32"
        assert facts["self_test"]["ratio"] < 0.001 and facts["self_test"]["age_seconds"] >= 0


@pytest.mark.parametrize(("workers", "most"), [(1, 8), (2, 4), (50, 1)])
def test_a_run_leaves_something_for_the_others(small_bundle: Path, workers: int, most: int) -> None:
    """512 tokens a run are shared, down to 88: eight texts of 60 tokens that come at the same time."""
    with ClipModel(small_bundle, towers=("text",)) as model:
        service = Service(model, workers=workers)
        row = [0, *range(5, 63), 2]
        futures = service.batchers["text"].submit([row] * 8)
        found = np.stack([future.result(30) for future in futures])
        assert np.abs(found - model.text_encoder.run([row])).max() <= 1e-5
        assert sum(size * runs for size, runs in service.batchers["text"].counts.batches.items()) == 8
        assert max(service.batchers["text"].counts.batches) == most
        assert service.close() == 0


def test_health_runs_the_goldens_when_a_tower_fails(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may fail for its input alone; a tower that fails its goldens too is told, until it works again."""
    monkeypatch.setattr("jinaclip.server.service.TESTED_AGAIN_S", 0.0)
    with ClipModel(small_bundle, towers=("text",)) as model:
        service = Service(model)
        assert service.health()[0]
        session = model.text_encoder.session
        monkeypatch.setattr(type(session), "run", broken := Broken(type(session).run))
        for works in (True, False, True):
            broken.works = works
            service.batchers["text"].counts.failing = 1
            time.sleep(0.01)
            healthy, towers = service.health()
            assert healthy == works and towers["text"]["status"] == ("ok" if works else "failing")
            assert ("the device is lost" in towers["text"].get("error", "")) != works
        service.close()


class Broken:
    """Stands in for a session's run; fails as a lost device does while `works` is False."""

    def __init__(self, run: Any) -> None:
        self._run, self.works = run, True

    def __get__(self, session: Any, owner: type) -> Any:
        def run(*words: Any, **named: Any) -> Any:
            from jinaclip.errors import BackendError

            if not self.works:
                raise BackendError("the device is lost")
            return self._run(session, *words, **named)

        return run


# Strangers


def test_no_other_origin_is_let_in(server: Running) -> None:
    asked = httpx.options(
        f"{server.url}/v1/embeddings", headers={"Origin": "https://a.b", "Access-Control-Request-Method": "POST"}
    )
    answered = server.post({"input": "a"}, headers={"Origin": "https://a.b"})
    assert asked.status_code == 405
    for response in (asked, answered):
        assert not any(name.startswith("access-control") for name in response.headers)


def test_keys_guard_every_page(small_bundle: Path) -> None:
    with running(small_bundle, "--towers", "text", "--api-key", "k1", "--api-key", "k2") as locked:
        for path in ("/metrics", "/docs", "/openapi.json", "/v1/models"):
            assert httpx.get(f"{locked.url}{path}").status_code == 401
            assert httpx.get(f"{locked.url}{path}", headers={"Authorization": "Bearer k2"}).status_code == 200
        assert httpx.post(f"{locked.url}/v1/rank", json={}).status_code == 401


def test_a_body_that_does_not_come_is_not_waited_for(small_bundle: Path) -> None:
    with running(small_bundle, "--towers", "text", "--body-timeout", "0.5", "--max-body", "1") as server:
        address = httpx.URL(server.url)
        assert address.port is not None
        for head, words in (
            (b"Content-Length: 100\r\n\r\n{", b" 408 "), (b"Content-Length: 99999999999\r\n\r\n{", b" 413 "),
        ):  # fmt: skip
            with socket.create_connection((address.host, address.port), timeout=30) as connection:
                connection.sendall(
                    b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + head
                )
                answer = b""
                while words not in answer and (chunk := connection.recv(4096)):
                    answer += chunk
                assert words in answer
        assert server.post({"input": "a"}).status_code == 200


# Several runs at the same time


def test_workers_give_the_same_vectors(small_bundle: Path, model: ClipModel, tmp_path: Path) -> None:
    """Of a prepared bundle three batches run at the same time; among short texts one that runs by itself."""
    built = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    assert main(["build", str(built)]) == 0
    texts = [f"{text} {number}" for number in range(20) for text in ("a cup of coffee", "eine Tasse", "word " * 30)]
    texts[7] = "word " * 700
    expected = model.encode_text(texts)
    picture = model.encode_image(PHOTOS[1])
    with running(built, "--workers", "3") as server, ThreadPoolExecutor(12) as pool:
        bodies = [
            {"input": [text, {"image": PICTURES[1]}] if index % 10 == 0 else text} for index, text in enumerate(texts)
        ]
        found = [vectors_of(response) for response in pool.map(server.post, bodies)]
        together = vectors_of(server.post({"input": texts}))
    assert np.abs(np.stack([vectors[0] for vectors in found]) - expected).max() <= 1e-5
    assert np.abs(together - expected).max() <= 1e-5
    assert max(np.abs(vectors[1] - picture).max() for vectors in found if len(vectors) == 2) <= 1e-5


def test_workers_want_prepared_graphs(small_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--workers", "2"], "--workers 2 requires graphs prepared for this CPU for every tower; run `jinaclip"),
        (["--workers", "0"], "--workers is 0, expected a whole number of at least 1"),
    ):  # fmt: skip
        assert main(["serve", str(small_bundle), "--towers", "text", *words]) == 1
        assert message in capsys.readouterr().err


# Marketplaces


def test_sagemaker(small_bundle: Path, model: ClipModel) -> None:
    """Bodies as the publisher's client sends them to such an endpoint; nothing else is served without a key."""
    words = ["--marketplace", "sagemaker", "--host", "127.0.0.1", "--unknown-task", "ignore"]
    with running(small_bundle, *words) as market:
        assert httpx.get(f"{market.url}/ping").status_code == 200
        body = {
            "data": [{"text": "a cup of coffee"}, {"bytes": PICTURES[1]}],
            "parameters": {"task": "text-matching", "dimensions": None},
        }
        response = httpx.post(f"{market.url}/invocations", json=body, timeout=60)
        expected = np.stack([model.encode_text("a cup of coffee"), model.encode_image(PHOTOS[1])])
        assert np.abs(vectors_of(response) - expected).max() <= 1e-6
        plain = httpx.post(f"{market.url}/invocations", json={"input": "a cup of coffee"}, timeout=60)
        assert np.abs(vectors_of(plain)[0] - expected[0]).max() <= 1e-6
        for path in ("/v1/models", "/metrics", "/docs", "/v1/embeddings"):
            assert httpx.get(f"{market.url}{path}").status_code == 404
        for wrong, word in (
            ({}, "data is missing"), ({"data": ["a"], "task": "b"}, "'task' is not a field"),
            ({"data": ["a"], "parameters": []}, "parameters is a list"),
            ({"data": ["a"], "parameters": {"input": "b"}}, "parameters contains input"),
            ([], "The request body is a list"), ({"data": ["a"], "parameters": {"x": 1}}, "'x' is not a field"),
        ):  # fmt: skip
            refused = httpx.post(f"{market.url}/invocations", json=wrong, timeout=60)
            assert refused.status_code == 422 and word in refused.json()["detail"], word


def test_vertex(small_bundle: Path, model: ClipModel) -> None:
    environment = {
        "AIP_HEALTH_ROUTE": "/v1/endpoints/1/deployedModels/2", "AIP_PREDICT_ROUTE": "/v1/endpoints/1:predict",
        "JINACLIP_SERVE_MARKETPLACE": "vertex", "JINACLIP_SERVE_HOST": "127.0.0.1", "JINACLIP_SERVE_API_KEY": "key",
    }  # fmt: skip
    with running(small_bundle, environment=environment) as market:
        assert httpx.get(f"{market.url}/v1/endpoints/1/deployedModels/2").status_code == 200
        body = {"instances": ["cat", {"image": PICTURES[1]}, {"image": "%"}], "parameters": {"dimensions": 64}}
        refused = httpx.post(f"{market.url}/v1/endpoints/1:predict", json=body, timeout=60)
        assert refused.status_code == 422 and "instances[2] is not valid base64" in refused.json()["detail"]
        body["parameters"] = {"dimensions": 64, "partial": True}
        answer = httpx.post(f"{market.url}/v1/endpoints/1:predict", json=body, timeout=60).json()
        assert list(answer) == ["predictions"]
        found = [entry.get("embedding") for entry in answer["predictions"]]
        assert np.abs(np.array(found[0]) - model.encode_text("cat", truncate_dim=64)).max() <= 1e-6
        assert np.abs(np.array(found[1]) - model.encode_image(PHOTOS[1], truncate_dim=64)).max() <= 1e-6
        assert answer["predictions"][2]["object"] == "error"
        assert httpx.get(f"{market.url}/v1/models").status_code == 401  # with a key the rest is there too


def test_what_vertex_sets_wrongly(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AIP_HTTP_PORT", "http")
    assert main(["serve", str(small_bundle), "--marketplace", "vertex"]) == 1
    assert "AIP_HTTP_PORT, AIP_HEALTH_ROUTE and AIP_PREDICT_ROUTE are 'http'" in capsys.readouterr().err


def test_the_licence_and_the_name_are_said(small_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    manifest = json.loads((copy / "bundle.json").read_text("utf-8"))
    manifest["model"] |= {"licence": "cc-by-nc-4.0", "id": "somebody/clip"}
    (copy / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    with running(copy, "--towers", "text") as server:
        assert "licence of the weights: cc-by-nc-4.0" in server.log
        facts = httpx.get(f"{server.url}/v1/models").json()["data"][0]
        assert (facts["licence"], facts["id"], facts["aliases"]) == ("cc-by-nc-4.0", "somebody/clip", ["clip"])
        for name in ("somebody/clip", "clip"):  # clients of the hosted API send the second
            assert server.post({"model": name, "input": "a", "task": ""}).json()["model"] == "somebody/clip"


# Options from the environment


@pytest.mark.parametrize(
    ("environment", "status", "words"),
    [
        ({"PORT": "http"}, 2, "JINACLIP_SERVE_PORT: invalid int value"),
        ({"FETCH_URLS": "perhaps"}, 2, "JINACLIP_SERVE_FETCH_URLS is 'perhaps', expected 1 or 0"),
        ({"UNKNOWN_TASK": "guess"}, 2, "JINACLIP_SERVE_UNKNOWN_TASK: invalid choice"),
        ({"FETCH_ALLOW": "10.0.0.1/8"}, 2, "JINACLIP_SERVE_FETCH_ALLOW: '10.0.0.1/8' is not a network"),
        ({"FETCH_ALLOW": "10.0.0.0/8"}, 1, "--fetch-allow has no effect without --fetch-urls"),
        ({"BUNDLE": "nowhere"}, 1, "nowhere"),
        ({"BUNDLE": "-x"}, 1, "-x is not a directory"),
        ({"BUNDLE": "--"}, 2, "JINACLIP_SERVE_BUNDLE has the value '--', which cannot be used"),
        ({"PRECISION": "--"}, 2, "JINACLIP_SERVE_PRECISION has the value '--', which cannot be used"),
        ({"FETCH_ALLOW": "10.0.0.0/8,--"}, 2, "JINACLIP_SERVE_FETCH_ALLOW has the value '--', which cannot be used"),
        ({}, 2, "a BUNDLE is required"),
        ({"MARKETPLACE": "sagemaker"}, 1, "/opt/ml/model"),
    ],
)
def test_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str], status: int,
    words: str,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(f"JINACLIP_SERVE_{name}", value)
    if "FETCH_ALLOW" in environment:
        monkeypatch.setenv("JINACLIP_SERVE_BUNDLE", "bundle")
    try:
        found = main(["serve"])
    except SystemExit as left:
        found = left.code if isinstance(left.code, int) else -1
    assert found == status and words in capsys.readouterr().err
