"""The programs of examples/clients, run as a user runs them against a server: what they find is what ClipModel finds.

A program may talk to the server alone, and must leave no file behind. Python's part of that is watched here by an audit
hook; that the native parts of Chroma and LanceDB connect nowhere else was seen under strace.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest

from jinaclip import ClipModel
from tests.conftest import PHOTOS
from tests.support.running import Running, running

CLIENTS = Path(__file__).parents[2] / "examples/clients"
KEY = "key-of-the-tests"
NOTES = ["The rocket lifts off at dawn.", "Ein Rezept für Milchkaffee", "猫は一日の大半を眠って過ごす。"]
CAPTIONS = ["a cup of coffee", "eine Rakete beim Start", "一只猫的照片"]
PICTURE = base64.b64encode(PHOTOS[1].read_bytes()).decode()

# Ends a program at its first connection elsewhere, before a thread of it can swallow the error.
GUARD = """
import os, sys

def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host, port = arguments[1][:2]
    elif event == "socket.getaddrinfo":
        host, port = arguments[:2]
    else:
        return
    if f"{host}:{port}" != os.environ["ALLOWED"]:
        os.write(2, f"went to {host}:{port}\\n".encode())
        os._exit(97)

sys.addaudithook(watch)
"""

Found = list[tuple[str, list[tuple[str, float]]]]  # queries, with the names that were found and their cosines
Execute = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def server(small_bundle: Path) -> Iterator[Running]:
    with running(small_bundle, "--model-name", "jina-clip-v2", "--api-key", KEY) as started:
        yield started


@pytest.fixture
def execute(server: Running, fresh_home: dict[str, str], tmp_path: Path) -> Execute:
    """execute(words of Python's command line, server=…): in empty directories, which are empty again afterwards."""
    guard, places = tmp_path / "guard", [tmp_path / name for name in ("home", "temporary", "work")]
    for directory in (guard, *places[1:]):
        directory.mkdir()
    (guard / "sitecustomize.py").write_text(GUARD, "utf-8")

    def run(*words: str | Path, server: Running = server) -> subprocess.CompletedProcess[str]:
        environment = fresh_home | {
            "PYTHONPATH": f"{guard}{os.pathsep}{CLIENTS}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(places[1]),
            "JINA_API_KEY": KEY,
            "ALLOWED": server.url.removeprefix("http://"),
        }
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            env=environment,
            cwd=places[2],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert [list(place.iterdir()) for place in places] == [[], [], []]
        return done

    return run


@pytest.fixture
def find(execute: Execute, server: Running) -> Callable[..., Found]:
    """find(program, options): what it prints of the photos of the tests."""

    def run(program: str, *options: str | Path) -> Found:
        done = execute(CLIENTS / program, *PHOTOS, "--url", f"{server.url}/v1", *options)
        assert done.returncode == 0, done.stderr
        return parse(done.stdout)

    return run


def parse(output: str) -> Found:
    found: Found = []
    for line in output.splitlines():
        row = re.fullmatch(r"  (-?\d\.\d{6})  (.+)", line)
        if row:
            found[-1][1].append((row[2], float(row[1])))
        else:
            found.append((line, []))
    return found


def expect(rows: Sequence[tuple[str, float]], names: Sequence[str], cosines: np.ndarray) -> None:
    """Names in the order of their cosines, which are printed with six decimals and summed in orders of the clients."""
    order = np.argsort(-cosines)
    assert [name for name, _ in rows] == [names[index] for index in order]
    assert np.abs(np.array([cosine for _, cosine in rows]) - cosines[order]).max() <= 2e-6


def expect_notes(
    rows: Sequence[tuple[str, float]], query: np.ndarray, model: ClipModel, dim: int | None = None
) -> None:
    expect(rows, NOTES, model.encode_text(NOTES, truncate_dim=dim) @ query)


def expect_photos(found: Found, model: ClipModel, dim: int | None = None, *, full_path: bool = False) -> None:
    """For each caption, the photos."""
    assert [query for query, _ in found] == CAPTIONS
    names = [str(path) if full_path else path.name for path in PHOTOS]
    photos = model.encode_image(PHOTOS, truncate_dim=dim)
    for caption, rows in found:
        expect(rows, names, photos @ model.encode_text(caption, truncate_dim=dim))


# The programs


def test_openai(find: Callable[..., Found], model: ClipModel) -> None:
    """Base64 answers, a task in the extra body, and pictures that the client's types know nothing of."""
    for dim, options in ((None, ()), (64, ("--dimensions", "64"))):
        (question, notes), *captions = find("with_openai.py", *options)
        expect_notes(notes, model.encode_text(question, task="retrieval.query", truncate_dim=dim), model, dim)
        expect_photos(captions, model, dim)


def test_langchain(find: Callable[..., Found], model: ClipModel) -> None:
    (question, notes), *captions = find("with_langchain.py")
    expect_notes(notes, model.encode_text(question), model)
    expect_photos(captions, model, full_path=True)


def test_llama_index(find: Callable[..., Found], model: ClipModel) -> None:
    (query, notes), *captions, (in_bits, signs) = find("with_llama_index.py")
    vector = model.encode_text(query)
    expect_notes(notes, vector, model)
    expect_photos(captions, model)
    assert in_bits == f"{query}, in bits"  # documents come as ubinary, the query as binary; both are signs
    expect(signs, NOTES, ((model.encode_text(NOTES) > 0) == (vector > 0)).mean(1))


def test_qdrant(find: Callable[..., Found], model: ClipModel, tmp_path: Path) -> None:
    for options in ((), ("--directory", tmp_path / "index"), ("--directory", tmp_path / "index")):
        *captions, (query, notes) = find("with_qdrant.py", *options)
        expect_photos(captions, model)
        expect_notes(notes, model.encode_text(query), model)


def test_qdrant_refuses_to_mix(
    find: Callable[..., Found], execute: Execute, small_bundle: Path, model: ClipModel, tmp_path: Path
) -> None:
    """A bundle that says it has other weights has another provenance id."""
    find("with_qdrant.py", "--directory", tmp_path / "index")
    other = Path(shutil.copytree(small_bundle, tmp_path / "other"))
    manifest = json.loads((other / "bundle.json").read_text("utf-8"))
    manifest["model"]["weights_sha256"] = "0" * 64
    (other / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    with running(other, "--model-name", "jina-clip-v2", "--api-key", KEY) as second:
        words = [*PHOTOS, "--url", f"{second.url}/v1", "--directory", tmp_path / "index"]
        done = execute(CLIENTS / "with_qdrant.py", *words, server=second)
    assert done.returncode == 1 and done.stdout == ""
    assert f"the index has embeddings of {model.provenance}, the server returns those of jc1-" in done.stderr


def test_chroma(find: Callable[..., Found], execute: Execute, model: ClipModel, tmp_path: Path) -> None:
    for options in ((), ("--directory", tmp_path / "index"), ("--directory", tmp_path / "index")):
        (query, notes), *captions = find("with_chroma.py", *options)
        expect_notes(notes, model.encode_text(query), model)
        expect_photos(captions, model)
    # Opened again by its name alone, a collection asks this server; of the plain class it would ask the hosted API.
    again = (
        "import sys, chromadb, with_chroma; from chromadb.config import Settings\n"
        "client = chromadb.PersistentClient(sys.argv[1], Settings(anonymized_telemetry=False))\n"
        "with_chroma.search(client.get_collection('notes'), 'Kaffee mit Milch')"
    )
    done = execute("-c", again, tmp_path / "index")
    assert done.returncode == 0, done.stderr
    expect_notes(parse(done.stdout)[0][1], model.encode_text("Kaffee mit Milch"), model)


def test_lancedb(find: Callable[..., Found], execute: Execute, model: ClipModel, tmp_path: Path) -> None:
    for options in ((), ("--directory", tmp_path / "index")):
        (query, notes), *captions, (like, rows) = find("with_lancedb.py", *options)
        expect_notes(notes, model.encode_text(query), model)
        expect_photos(captions, model)
        assert like == f"photos like {PHOTOS[0].name}"
        photos = model.encode_image(PHOTOS)
        expect(rows, [path.name for path in PHOTOS], photos @ photos[0])
    again = (
        "import sys, lancedb, with_lancedb\n"
        "with_lancedb.show('', lancedb.connect(sys.argv[1]).open_table('notes'), 'Kaffee mit Milch')"
    )
    done = execute("-c", again, tmp_path / "index")
    assert done.returncode == 0, done.stderr
    expect_notes(parse(done.stdout)[0][1], model.encode_text("Kaffee mit Milch"), model)


def test_the_page_names_every_program() -> None:
    page = (CLIENTS.parent / "README.md").read_text("utf-8")
    named = re.findall(r"\]\(clients/(\w+\.py)\)", page)
    assert sorted(named) == sorted(path.name for path in CLIENTS.glob("*.py"))


def test_a_connection_elsewhere_ends_a_program(execute: Execute) -> None:
    """The guard itself, in a thread that forgives everything."""
    code = (
        "import contextlib, socket, threading\n"
        "def call():\n"
        "    with contextlib.suppress(BaseException):\n"
        "        socket.create_connection(('localhost', 9))\n"
        "thread = threading.Thread(target=call); thread.start(); thread.join()"
    )
    done = execute("-c", code)
    assert done.returncode == 97 and "went to localhost:9" in done.stderr


# Databases that call the API themselves and cannot run here, by the bodies that they send.

# Weaviate: usecases/modulecomponents/clients/jinaai/jinaai.go of weaviate/weaviate has the fields, in this order; what
# they hold is in modules/multi2vec-jinaai/clients/jinaai.go. A collection names this server as baseURL, without /v1.
WEAVIATE_HEADERS = {"Authorization": f"Bearer {KEY}", "x-header-vectordb-source": "Weaviate"}


def test_weaviate_multi2vec(server: Running, model: ClipModel) -> None:
    """An object: its texts, then its images in base64; the answer is counted off. A query: a task and a bare text."""
    weaviate = {"model": "jina-clip-v2", "embedding_type": "float", "normalized": True}
    items = [{"text": NOTES[0]}, {"text": NOTES[1]}, {"image": PICTURE}]
    for dim, size in ((None, {}), (64, {"dimensions": 64})):
        found = answered(server.post({"input": items, **weaviate, **size}, headers=WEAVIATE_HEADERS))
        expected = [*model.encode_text(NOTES[:2], truncate_dim=dim), model.encode_image(PHOTOS[1], truncate_dim=dim)]
        assert np.abs(found - np.stack(expected)).max() <= 1e-6
        query = {"input": [CAPTIONS[0]], **weaviate, "task": "retrieval.query", **size}
        (vector,) = answered(server.post(query, headers=WEAVIATE_HEADERS))
        difference = vector - model.encode_text(CAPTIONS[0], task="retrieval.query", truncate_dim=dim)
        assert np.abs(difference).max() <= 1e-6


def test_weaviate_text2vec(server: Running, model: ClipModel) -> None:
    """Texts alone. With v3 in the model's name, in the shared client also with clip, each request has a task.

    Objects then come as retrieval.passage (modules/text2vec-jinaai/clients/jinaai.go), which this model has not.
    """
    body = {"input": NOTES, "model": "random-small", "embedding_type": "float"}
    found = answered(server.post(body, headers=WEAVIATE_HEADERS))
    assert np.abs(found - model.encode_text(NOTES)).max() <= 1e-6
    passage = {**body, "model": "jina-clip-v2", "task": "retrieval.passage"}
    refused = server.post(passage, headers=WEAVIATE_HEADERS)
    assert refused.status_code == 422 and refused.json()["error"]["code"] == "unknown_task"
    assert (
        "supported tasks: retrieval.query. Remove task, or start the server with --unknown-task ignore."
        in refused.json()["detail"]
    )  # Weaviate shows the detail


def test_weaviate_text2vec_where_unknown_tasks_are_ignored(small_bundle: Path, model: ClipModel) -> None:
    with running(small_bundle, "--model-name", "jina-clip-v2", "--unknown-task", "ignore") as lenient:
        body = {"input": NOTES, "model": "jina-clip-v2", "embedding_type": "float", "task": "retrieval.passage"}
        found = answered(lenient.post(body, headers=WEAVIATE_HEADERS))
    assert np.abs(found - model.encode_text(NOTES)).max() <= 1e-6


def test_pinecone(server: Running, model: ClipModel) -> None:
    """Programs that keep vectors in Pinecone ask for them by themselves, as many numbers as their index takes."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    body = {"input": NOTES, "model": "jina-clip-v2", "dimensions": 64}
    found = answered(server.post(body, headers=headers))
    assert np.abs(found - model.encode_text(NOTES, truncate_dim=64)).max() <= 1e-6
    found = answered(server.post({**body, "input": [{"text": NOTES[0]}, {"image": PICTURE}]}, headers=headers))
    expected = [model.encode_text(NOTES[0], truncate_dim=64), model.encode_image(PHOTOS[1], truncate_dim=64)]
    assert np.abs(found - np.stack(expected)).max() <= 1e-6
    misspelt = server.post({"input": NOTES, "model": "jina-clip-v2", "dimension": 64}, headers=headers)  # as some do
    assert misspelt.status_code == 422 and "did you mean dimensions" in misspelt.json()["detail"]


def answered(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([entry["embedding"] for entry in response.json()["data"]])
