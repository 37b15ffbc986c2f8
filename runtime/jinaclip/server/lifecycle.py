"""Listening, serving and graceful shutdown: accepted requests are answered before the process ends."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from types import FrameType

import uvicorn

from jinaclip.errors import InputError
from jinaclip.server.app import Server


def listen(host: str, port: int) -> socket.socket:
    """Create a socket that is bound to an address.

    Raises:
        InputError: the address cannot be bound; the message contains the address and the reason.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only if the protocol is IPPROTO_TCP. Without it each response waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}") from error
    listener.set_inheritable(True)
    return listener


def serve(server: Server, listener: socket.socket, grace_s: float) -> int:
    """Serve until SIGTERM or SIGINT, then shut down gracefully.

    During the shutdown accepted requests are answered and new requests get 503.

    Args:
        grace_s: the longest time for the shutdown, in seconds.

    Returns:
        The number of items that were not finished in time.
    """
    config = uvicorn.Config(
        server.app, log_config=None, access_log=False, server_header=False, lifespan="off",
        timeout_graceful_shutdown=1,  # seconds after the grace period; without it, uvicorn waits for every answer
    )  # fmt: skip
    running = _Drained(config, server, grace_s)
    running.run(sockets=[listener])
    return running.left or server.service.close(max(0.0, running.deadline - time.monotonic()))


class _Drained(uvicorn.Server):
    """Stops after a signal when all accepted requests are answered or the grace period is over.

    A second signal stops it immediately.

    Attributes:
        deadline: the end of the grace period, by time.monotonic().
        left: the number of items that were not started by then. Their requests get an error.
    """

    def __init__(self, config: uvicorn.Config, server: Server, grace_s: float) -> None:
        super().__init__(config)
        self._server, self._grace_s, self.deadline, self.left = server, grace_s, time.monotonic(), 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._server.draining:
            self.force_exit = self.should_exit = True
            return
        self._server.draining = True
        self.deadline = time.monotonic() + self._grace_s
        threading.Thread(target=self._drain, daemon=True).start()
        if sig == signal.SIGINT:
            print("jinaclip: finishing accepted requests; press Ctrl-C again to stop now", file=sys.stderr)

    def _drain(self) -> None:
        while self._server.in_flight and time.monotonic() < self.deadline:
            time.sleep(0.01)
        self.left = self._server.service.close(max(0.0, self.deadline - time.monotonic()))
        self.should_exit = True
