"""Serve a bundle over HTTP: the hosted embeddings API, at /v1/embeddings.

Code that is written for that API, or for OpenAI's client, works with another base URL. Every option can also be given
in the environment, as JINACLIP_SERVE_ and its name: JINACLIP_SERVE_PORT=8080, JINACLIP_SERVE_API_KEY=one,two.
SIGTERM: what is accepted is answered within --grace, new requests get 503.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from jinaclip.bundle import TOWERS
from jinaclip.cli.arguments import add_model_arguments, open_model, words_of
from jinaclip.errors import InputError

EXTRA = "server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--towers", type=words_of(TOWERS), metavar="T,…", help="text, image or both")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one, and says which")
    parser.add_argument("--api-key", action="append", default=[], metavar="KEY",
                        help="asked of every client; several may be given (none: on this machine alone)")  # fmt: skip
    parser.add_argument("--model-name", action="append", default=[], metavar="NAME",
                        help="what clients may call the model, besides the bundle's id")  # fmt: skip
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="seconds to finish in at the end")
    parser.add_argument("--max-queue", type=int, default=1024, metavar="N", help="texts, and images, that may wait")
    parser.add_argument("--max-items", type=int, default=2048, metavar="N", help="of a request")
    parser.add_argument("--max-body", type=int, default=64, metavar="MIB", help="size of a request")
    parser.add_argument("--max-image", type=int, default=32, metavar="MIB", help="size of a picture's file")
    parser.add_argument("--max-pixels", type=int, default=89_478_485, metavar="N", help="of a picture")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of a text (default: what the model takes)")
    parser.add_argument("--log-requests", action="store_true", help="one line a request on stderr; never its input")
    _take_environment(parser)


def run(args: argparse.Namespace) -> int:
    import uvicorn

    from jinaclip.server.app import Server, Settings
    from jinaclip.server.requests import Limits
    from jinaclip.server.service import Service

    _check(args)
    if args.log_requests:
        logging.getLogger("jinaclip.server").setLevel(logging.INFO)
    with open_model(args, args.towers or TOWERS) as model:
        names = (str(model.bundle.model.get("id")), *args.model_name)
        service = Service(model, queue=args.max_queue, max_tokens=args.max_tokens, max_pixels=args.max_pixels)
        limits = Limits(items=args.max_items, image_bytes=args.max_image << 20)
        server = Server(
            service, Settings(names, tuple(args.api_key), max_body_bytes=args.max_body << 20, limits=limits)
        )
        config = uvicorn.Config(server.app, log_config=None, access_log=False, server_header=False, lifespan="off")
        listener = _listen(args.host, args.port)
        host, port = listener.getsockname()[:2]
        towers = ", ".join(
            f"{tower} {facts['precision']} on {facts['backend']} {facts['device']}"
            for tower, facts in model.info()["towers"].items()
        )
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"jinaclip: {names[0]} at {where}/v1/embeddings ({towers}); licence of the weights: "
              f"{model.bundle.model.get('licence')}", file=sys.stderr, flush=True)  # fmt: skip
        drained = _Drained(config, server, args.grace)
        drained.run(sockets=[listener])
        left = service.close(max(0.0, drained.deadline - time.monotonic()))
        if left:
            print(f"jinaclip: {left} items were not finished within {args.grace:g} s", file=sys.stderr)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, or what keeps it from being one, as an OSError that names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named asyncio sends at once (TCP_NODELAY); else each answer waits 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}") from error
    listener.set_inheritable(True)
    return listener


def _check(args: argparse.Namespace) -> None:
    for name in ("max_queue", "max_items", "max_body", "max_image", "max_pixels", "max_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected a whole number from 1")
    if not 0 <= args.grace < 1e6:
        raise InputError(f"--grace is {args.grace}, expected seconds from 0")
    if any(not key.strip() for key in args.api_key):
        raise InputError("an --api-key is empty")
    if not args.api_key and not _is_loopback(args.host):
        raise InputError(
            f"--host {args.host} can be reached from other machines, and no --api-key is set; set one, or listen on "
            "127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _take_environment(parser: argparse.ArgumentParser) -> None:
    """JINACLIP_SERVE_PORT stands in for --port, where that is not given; a list's words are parted by commas."""
    for action in parser._actions:
        name = f"JINACLIP_SERVE_{action.dest.upper()}"
        value = os.environ.get(name)
        if value is None or not action.option_strings or action.dest == "help":
            continue
        if isinstance(action, argparse._AppendAction):
            action.default = [word for word in value.split(",") if word]
        elif isinstance(action, argparse._StoreTrueAction):
            action.default = value.lower() in ("1", "true", "yes")
        else:
            action.default = value  # argparse gives a string default to the option's type


class _Drained:
    """uvicorn, ended by SIGTERM or SIGINT only when what was accepted is answered, or the grace is over."""

    def __init__(self, config: Any, server: Any, grace_s: float) -> None:
        import uvicorn

        outer = self

        class Uvicorn(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                if outer._server.draining:  # a second signal ends it now
                    self.force_exit = self.should_exit = True
                    return
                outer._server.draining = True
                outer.deadline = time.monotonic() + outer._grace_s
                threading.Thread(target=outer._drain, args=(self,), daemon=True).start()
                if sig == signal.SIGINT:
                    print("jinaclip: finishing what was accepted; Ctrl-C again ends it now", file=sys.stderr)

        self._uvicorn, self._server, self._grace_s = Uvicorn(config), server, grace_s
        self.deadline = time.monotonic()

    def run(self, sockets: list[socket.socket]) -> None:
        self._uvicorn.run(sockets=sockets)

    def _drain(self, running: Any) -> None:
        while self._server.in_flight and time.monotonic() < self.deadline:
            time.sleep(0.01)
        running.should_exit = True
