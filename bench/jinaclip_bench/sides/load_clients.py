"""Concurrent clients of a server, in a separate process started by scenarios/served.py.

It reads bodies of POST /v1/embeddings from stdin, one per line, each with one item and base64 as the encoding format.
Each client keeps one connection open and sends the next body when it has read the response to the last one.

The clients share the cores with the server, so they use little CPU: no HTTP library, and requests built in advance.
It prints one JSON object: the total seconds, the seconds and the vector of each request in the order of the bodies, and
the CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

PATH = "/v1/embeddings"
ANSWER_S = 300  # timeout of a response
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class UnexpectedResponse(Exception):
    """A response without a vector."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", metavar="URL", help="URL of the server's root")
    parser.add_argument("--clients", type=int, required=True)
    args = parser.parse_args()
    try:
        print(json.dumps(asyncio.run(ask(args.url, args.clients, sys.stdin.buffer.read().splitlines()))))
    except (UnexpectedResponse, OSError, EOFError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


async def ask(url: str, clients: int, bodies: Sequence[bytes]) -> dict[str, Any]:
    """Send all bodies over `clients` connections. Timing starts when all connections are open."""
    address = urlsplit(url)
    requests = [_request(address.netloc, body) for body in bodies]
    seconds, vectors = [0.0] * len(bodies), [""] * len(bodies)

    async def client(connection: Connection, waiting: Iterator[int]) -> None:
        for index in waiting:
            sent = time.perf_counter()
            async with asyncio.timeout(ANSWER_S):
                vectors[index] = await _answer(*connection, requests[index])
            seconds[index] = time.perf_counter() - sent

    connections = [await asyncio.open_connection(address.hostname, address.port) for _ in range(clients)]
    waiting = iter(range(len(bodies)))  # a free client takes the next body
    begun, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client(connection, waiting) for connection in connections))
    whole, cpu = time.perf_counter() - begun, time.process_time() - cpu
    for _, writer in connections:
        writer.close()
    return {"seconds": whole, "requests_s": seconds, "cpu_s": cpu, "vectors": vectors}


def _request(host: str, body: bytes) -> bytes:
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode("ascii") + body


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> str:
    """The vector of the response, in base64."""
    writer.write(request)
    await writer.drain()
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    if length is None:
        raise UnexpectedResponse(f"the response has no content-length: {head[:200]!r}")
    body = await reader.readexactly(int(length[1]))
    if head.split(maxsplit=2)[1] != b"200":
        raise UnexpectedResponse(body[:300].decode("utf-8", "replace"))
    vector: str = json.loads(body)["data"][0]["embedding"]
    return vector


if __name__ == "__main__":
    sys.exit(main())
