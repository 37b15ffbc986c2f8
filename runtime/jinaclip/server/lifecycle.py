"""Listening, serving and graceful shutdown: accepted requests are answered before the process ends."""

from __future__ import annotations

import signal
import socket
import sys
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
    return listener


def serve(server: Server, listener: socket.socket, grace_s: float) -> int:
    """Serve until SIGTERM or SIGINT, then shut down gracefully.

    During the shutdown accepted requests are answered and new requests get 503.

    Args:
        grace_s: the longest time for the shutdown, in seconds.

    Returns:
        The number of items that were not finished in time.
    """
    config = uvicorn.Config(server.app, log_config=None, access_log=False, server_header=False, lifespan="off")
    running = _DrainingServer(config, server, grace_s)
    running.run(sockets=[listener])
    return running.unfinished or server.service.close()


class _DrainingServer(uvicorn.Server):
    """Stops after a signal when all accepted requests are answered or the grace period is over.

    A second signal stops it immediately.

    Attributes:
        deadline: the end of the grace period, by time.monotonic().
        unfinished: the number of items that were not started by then. Their requests get an error.
    """

    def __init__(self, config: uvicorn.Config, server: Server, grace_s: float) -> None:
        super().__init__(config)
        self._server, self._grace_s, self.deadline, self.unfinished = server, grace_s, time.monotonic(), 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._server.draining:
            self.force_exit = self.should_exit = True
            return
        self._server.draining = True
        self.deadline = time.monotonic() + self._grace_s
        if sig == signal.SIGINT:
            print("jinaclip: finishing accepted requests; press Ctrl-C again to stop now", file=sys.stderr)

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn every 0.1 s. It stops when this returns True."""
        if self._server.draining and (not self._server.in_flight or time.monotonic() >= self.deadline):
            self.unfinished = self._server.service.close()
            # For sending the answers, in seconds. Without it, uvicorn waits for clients that do not read.
            self.config.timeout_graceful_shutdown = max(1, round(self.deadline - time.monotonic()))
            return True
        return await super().on_tick(counter)
