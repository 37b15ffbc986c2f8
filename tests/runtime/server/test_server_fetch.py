"""--fetch-urls: pictures from addresses, and nothing that a stranger must not reach through the server."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpcore
import numpy as np
import pytest
import trustme

from jinaclip import ClipModel
from jinaclip.server.errors import Problem
from jinaclip.server.fetch import Fetcher, Network, is_public
from tests.conftest import PHOTOS
from tests.support.running import Running, running, vectors_of

PICTURE = PHOTOS[1].read_bytes()


class Pictures(BaseHTTPRequestHandler):
    """Paths that a picture's host may have, the bad ones too."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers))  # type: ignore[attr-defined]
        path, _, query = self.path.partition("?")
        if path == "/redirect":
            self._send(302, b"", ("Location", query))
        elif path == "/loop":
            self._send(301, b"", ("Location", "/loop"))
        elif path == "/missing":
            self._send(404, PICTURE)
        elif path == "/packed":
            self._send(200, PICTURE, ("Content-Encoding", "gzip"))
        elif path == "/page":
            self._send(200, b"<html>no picture</html>")
        elif path == "/endless":
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                self.close_connection = True
        elif path == "/slow":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            except OSError:
                pass
            self.close_connection = True
        else:
            self._send(200, PICTURE)

    def _send(self, status: int, content: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(content)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Host(ThreadingHTTPServer):
    """Says nothing of clients that leave in the middle: some of these tests make them."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def pictures(context: ssl.SSLContext | None = None) -> Iterator[ThreadingHTTPServer]:
    """A host of pictures on a free port; `seen` is what it was asked."""
    server = Host(("127.0.0.1", 0), Pictures)
    server.seen = []  # type: ignore[attr-defined]
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def host() -> Iterator[ThreadingHTTPServer]:
    with pictures() as started:
        yield started


@pytest.fixture(scope="module")
def base(host: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{host.server_address[1]}"


@pytest.fixture(scope="module")
def server(small_bundle: Path) -> Iterator[Running]:
    """Fetches, and from 127.0.0.1 too. The environment names a proxy, which is not there."""
    proxy = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:9")
    words = ["--fetch-urls", "--fetch-allow", "127.0.0.1/32", "--fetch-timeout", "2", "--max-image", "2"]
    with running(small_bundle, *words, environment=proxy) as started:
        yield started


def told(server: Running, url: str, name: str = "url") -> tuple[int, str]:
    response = server.post({"input": ["text", {name: url}]})
    return response.status_code, response.json().get("detail", "")


# What is fetched


def test_pictures_come_from_addresses(server: Running, model: ClipModel, host: ThreadingHTTPServer, base: str) -> None:
    expected = model.encode_image(PHOTOS[1])
    encoded = base64.b64encode(PICTURE).decode()
    items = [{"url": f"{base}/a.png"}, {"image": f"{base}/redirect?/b.png"}, {"image": encoded}, f"{base}/a.png"]
    response = server.post({"input": items})
    found = vectors_of(response)
    for vector in found[:3]:
        assert np.abs(vector - expected).max() <= 1e-6
    assert np.abs(found[3] - model.encode_text(f"{base}/a.png")).max() <= 1e-6  # a plain string is always a text
    paths = [path for path, _ in host.seen]  # type: ignore[attr-defined]
    assert sorted(paths) == ["/a.png", "/b.png", "/redirect?/b.png"]
    headers = host.seen[0][1]  # type: ignore[attr-defined]
    assert headers["User-Agent"].startswith("jinaclip/") and headers["Host"] == base.removeprefix("http://")
    assert server.metric('jinaclip_stage_seconds_count{stage="fetch",tower="image"}') == 2


def test_the_published_sample_runs(server: Running, model: ClipModel, base: str) -> None:
    """The body of the model card's example, with this host's pictures for its own."""
    gif = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    sentences = ["غروب جميل على الشاطئ", "海滩上美丽的日落", "A beautiful sunset over the beach"]
    response = server.post(
        {
            "model": "random-small", "dimensions": 128, "task": "retrieval.query", "normalized": True,
            "embedding_type": "float",
            "input": [*({"text": text} for text in sentences), {"image": f"{base}/beach1.jpg"},
                      {"image": f"{base}/beach2.jpg"}, {"image": gif}],
        },
        headers={"Authorization": "Bearer jina_AbCd"},
    )  # fmt: skip
    found = vectors_of(response)
    assert np.abs(found[:3] - model.encode_text(sentences, task="retrieval.query")).max() <= 1e-6
    pictures = model.encode_image([PHOTOS[1], PHOTOS[1], f"data:image/gif;base64,{gif}"])
    assert np.abs(found[3:] - pictures).max() <= 1e-6


def test_https_asks_who_the_host_is(small_bundle: Path, model: ClipModel, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    words = ["--fetch-urls", "--fetch-allow", "127.0.0.0/8", "--fetch-allow", "::1/128", "--towers", "image"]
    with pictures(context) as secure:
        port = secure.server_address[1]
        for environment, right in (({"SSL_CERT_FILE": str(tmp_path / "ca.pem")}, True), ({}, False)):
            with running(small_bundle, *words, environment=environment) as server:
                response = server.post({"input": [{"url": f"https://localhost:{port}/a.png"}]})
                if right:
                    assert np.abs(vectors_of(response)[0] - model.encode_image(PHOTOS[1])).max() <= 1e-6
                    status, words_ = told_image(server, f"https://127.0.0.1:{port}/a.png")  # not its name
                else:
                    status, words_ = response.status_code, response.json()["detail"]
                assert status == 422 and "cannot be fetched: the connection failed" in words_


def told_image(server: Running, url: str) -> tuple[int, str]:
    response = server.post({"input": [{"url": url}]})
    return response.status_code, response.json().get("detail", "")


# What is not


@pytest.mark.parametrize("port", [65536, 99999, 0])
def test_a_port_that_cannot_be(server: Running, port: int) -> None:
    """In the server's own event loop, uvloop where it is installed, and in asyncio's, whose error is another."""
    url = f"http://127.0.0.1:{port}/a.png"
    status, words = told(server, url)
    assert status == 422 and words.startswith("input[1] ") and "Traceback" not in server.log
    assert asyncio.run(problem_of_fetch(url, ipaddress.ip_network("127.0.0.0/8"))).status == 422


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/missing", "the host returned status 404"),
        ("/page", "cannot be decoded as an image"),
        ("/packed", "sent a compressed response"),
        ("/endless", "the file has more than 2097152 bytes"),
        ("/slow", "the download took more than 2 s"),
        ("/loop", "more than 5 times"),
        ("/redirect?file:///etc/passwd", "redirects to one that is not a valid http: or https: URL"),
        ("/redirect?ftp://127.0.0.1/a.png", "redirects to one that is not a valid http: or https: URL"),
        ("/redirect?gopher://127.0.0.1/", "redirects to one that is not a valid http: or https: URL"),
        ("/redirect?http://user:word@127.0.0.1/", "contains a user name"),
    ],
)
def test_what_a_host_may_do_wrong(server: Running, base: str, path: str, words: str) -> None:
    status, found = told(server, f"{base}{path}")
    assert status == 422 and found.startswith("input[1] ") and words in found


@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.2:{port}/a.png", "http://169.254.169.254/latest/meta-data/", "http://[::1]:{port}/a.png",
     "http://localhost.localdomain.invalid/", "//10.0.0.1/a.png"],
)  # fmt: skip
def test_a_redirect_leads_no_further_than_the_first_address_may(server: Running, base: str, target: str) -> None:
    url = f"{base}/redirect?{target.format(port=base.rpartition(':')[2])}"
    status, words = told(server, url)
    assert (status == 403 and "--fetch-allow" in words) or "host name cannot be resolved" in words


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:{port}/a", "http://localhost:{port}/a", "http://0.0.0.0:{port}/a", "http://2130706433:{port}/a",
     "http://0x7f000001:{port}/a", "http://127.1:{port}/a", "http://[::ffff:127.0.0.1]:{port}/a", "http://[::1]:{port}/a",
     "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/a", "http://192.168.0.1/a", "http://[fe80::1]/a",
     "http://[64:ff9b::7f00:1]:{port}/a", "http://100.64.0.1/a", "http://224.0.0.1/a"],
)  # fmt: skip
def test_addresses_that_are_not_public_are_not_connected_to(host: ThreadingHTTPServer, url: str) -> None:
    before = len(host.seen)  # type: ignore[attr-defined]
    status = asyncio.run(problem_of_fetch(url.format(port=host.server_address[1]))).status
    assert status == 403 and len(host.seen) == before  # type: ignore[attr-defined]


async def problem_of_fetch(url: str, *allow: Network) -> Problem:
    fetcher = Fetcher(allow=allow, most_bytes=1 << 20, timeout_s=5)
    try:
        await fetcher.fetch(url)
    except Problem as problem:
        return problem
    finally:
        await fetcher.close()
    raise AssertionError(f"{url} was fetched")


def test_a_name_that_changes_its_address_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is looked up once, and what is connected to is the address that was looked at."""
    looked_up, connected = [], []

    def answers(name: Any, *_: Any, **__: Any) -> list[Any]:
        looked_up.append(name)
        found = ["10.0.0.1", "93.184.216.34", "127.0.0.1"] if len(looked_up) == 1 else ["127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in found]

    async def connect(self: Any, host: str, *_: Any, **__: Any) -> Any:
        connected.append(host)
        raise httpcore.ConnectError("not in a test")

    monkeypatch.setattr(socket, "getaddrinfo", answers)
    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    assert asyncio.run(problem_of_fetch("http://rebinding.test/a.png")).status == 422
    assert asyncio.run(problem_of_fetch("http://rebinding.test/a.png")).status == 403
    assert len(looked_up) == 2 and connected == ["93.184.216.34"]


def test_public_addresses() -> None:
    for address in ("93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34"):
        assert is_public(address)
    for address in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
                    "255.255.255.255", "224.0.0.1", "240.0.0.1", "192.0.2.1", "::1", "::", "fe80::1%eth0", "fc00::1",
                    "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "2001:0:1::"):  # fmt: skip
        assert not is_public(address), address
    allow = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")]
    assert is_public("10.9.9.9", allow) and is_public("fd00::9", allow) and is_public("::ffff:10.9.9.9", allow)
    assert not is_public("127.0.0.1", allow)


def test_without_the_option_nothing_is_fetched(small_bundle: Path, host: ThreadingHTTPServer, base: str) -> None:
    before = len(host.seen)  # type: ignore[attr-defined]
    with running(small_bundle) as plain:
        status, words = told(plain, f"{base}/a.png")
        assert status == 422 and "this server does not fetch URLs" in words and "--fetch-urls" in words
    assert len(host.seen) == before  # type: ignore[attr-defined]


def test_one_bad_address_among_others(server: Running, model: ClipModel, base: str) -> None:
    items = [{"url": f"{base}/missing"}, "cat", {"url": "http://10.0.0.1/a"}, {"url": f"{base}/a.png"}]
    data = server.post({"input": items, "partial": True}).json()["data"]
    assert [entry["object"] for entry in data] == ["error", "embedding", "error", "embedding"]
    assert [data[index]["error"]["code"] for index in (0, 2)] == ["fetch_failed", "address_not_allowed"]
    assert np.abs(np.array(data[3]["embedding"]) - model.encode_image(PHOTOS[1])).max() <= 1e-6
