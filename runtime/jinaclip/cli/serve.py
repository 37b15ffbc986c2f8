"""Serve a bundle over HTTP, with the hosted embeddings API at /v1/embeddings.

Code written for the hosted API or for OpenAI's client works if its base URL is changed. The page /docs of a running
server describes the API. Every option can also be set with an environment variable: JINACLIP_SERVE_PORT=8080,
JINACLIP_SERVE_API_KEY=one,two, JINACLIP_SERVE_FETCH_URLS=1; JINACLIP_SERVE_BUNDLE sets the bundle. After SIGTERM the
server answers accepted requests for up to --grace seconds and rejects new ones with status 503.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from jinaclip.bundle.manifest import TOWERS
from jinaclip.cli.arguments import add_model_arguments, open_model, words_of
from jinaclip.errors import InputError
from jinaclip.model import ClipModel
from jinaclip.server.apis.marketplaces import MARKETPLACES, Marketplace

if TYPE_CHECKING:
    from jinaclip.server.app import Server

EXTRA = "server"
PREFIX = "JINACLIP_SERVE_"  # of environment variables
MAX_WORKERS = 4  # the default limit: every run reads all weights, so more workers compete for memory bandwidth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, nargs="?")
    add = parser.add_argument_group("model").add_argument
    add("--towers", type=words_of(TOWERS), metavar="T,…", help="text, image or both")
    add("--model-name", action="append", default=[], metavar="NAME", help="another model name for clients; repeatable")
    add("--unknown-task", choices=("refuse", "ignore"), default="refuse", help="refuse or ignore unknown tasks")
    add("--accept-token-ids", action="store_true", help="accept token ids of this bundle's tokenizer as texts")
    add("--marketplace", choices=MARKETPLACES, help="serve the paths of this marketplace; no others without a key")
    add = parser.add_argument_group("network and access").add_argument
    add("--host", help="address to listen on (default: 127.0.0.1, with --marketplace 0.0.0.0)")
    add("--port", type=int, help="port; 0 selects a free one (default: 8000, or the marketplace's port)")
    api_key = "API key that clients must send; repeatable (without one: this machine only)"
    add("--api-key", action="append", default=[], metavar="KEY", help=api_key)
    add("--log-requests", action="store_true", help="log one line per request to stderr, without input")
    add = parser.add_argument_group("images from URLs").add_argument
    add("--fetch-urls", action="store_true", help="download images from public http(s): URLs")
    fetch_allow = "also connect to this network, although it is not public; repeatable"
    add("--fetch-allow", action="append", default=[], type=_network, metavar="CIDR", help=fetch_allow)
    add("--fetch-timeout", type=float, default=10.0, metavar="S", help="seconds per image")
    add = parser.add_argument_group("limits").add_argument
    add("--max-queue", type=int, default=4096, metavar="N", help="most texts not yet answered")
    add("--max-queue-images", type=int, default=256, metavar="N", help="most images not yet answered")
    add("--max-items", type=int, default=2048, metavar="N", help="most items per request")
    add("--max-body", type=int, default=64, metavar="MIB", help="largest request body")
    add("--max-bodies", type=int, default=256, metavar="MIB", help="largest total of all request bodies")
    add("--max-image", type=int, default=32, metavar="MIB", help="largest image file")
    add("--max-pixels", type=int, default=89_478_485, metavar="N", help="most pixels per image")
    add("--max-tokens", type=int, metavar="N", help="most tokens per text (default: the model's limit)")
    add("--body-timeout", type=float, default=60.0, metavar="S", help="seconds to receive a body")
    workers = "batches at the same time under load (default: the number of cores, at most 4; 1 without prepared graphs)"
    add("--workers", type=int, metavar="N", help=workers)
    batch_wait = "milliseconds that an idle queue waits for more items before it runs a batch"
    add("--batch-wait", type=float, default=0.0, metavar="MS", help=batch_wait)
    add("--grace", type=float, default=30.0, metavar="S", help="seconds to answer accepted requests at shutdown")
    parser.set_defaults(**_from_environment(parser))


def _from_environment(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options that environment variables set, for example port from JINACLIP_SERVE_PORT.

    Several values of a repeatable option are separated by commas.
    """
    reader = argparse.ArgumentParser(parents=[parser], add_help=False, exit_on_error=False)
    found = {}
    for name, default in vars(reader.parse_args([])).items():
        option, variable = f"--{name.replace('_', '-')}", f"{PREFIX}{name.upper()}"
        if (value := os.environ.get(variable)) is None:
            continue
        values = value.split(",") if isinstance(default, list) else [value]
        if "--" in values:  # argparse would drop it
            parser.error(f"{variable} has the value '--', which cannot be used")
        if name == "bundle":
            words = ["--", value]
        elif isinstance(default, list):
            words = [f"{option}={word}" for word in values if word]
        elif not isinstance(default, bool):
            words = [f"{option}={value}"]
        elif value.lower() in ("1", "true", "yes", "0", "false", "no", ""):
            words = [option] if value.lower() in ("1", "true", "yes") else []
        else:
            parser.error(f"{variable} is {value!r}, expected 1 or 0")
        try:
            found[name] = getattr(reader.parse_args(words), name)
        except argparse.ArgumentError as error:
            parser.error(f"{variable}: {error.message}")
    return found


def run(args: argparse.Namespace) -> int:
    from jinaclip.server.apis.marketplaces import SAGEMAKER_BUNDLE, marketplace
    from jinaclip.server.lifecycle import listen, serve

    market = marketplace(args.marketplace, os.environ) if args.marketplace else None
    args.host = args.host or ("0.0.0.0" if market else "127.0.0.1")
    args.port = args.port if args.port is not None else market.port if market else 8000
    args.bundle = args.bundle or (SAGEMAKER_BUNDLE if args.marketplace == "sagemaker" else None)
    if args.bundle is None:
        args.usage_error(f"a BUNDLE is required: give a directory made by `jinaclip export`, or set {PREFIX}BUNDLE")
    _check(args)
    if args.log_requests:
        logging.getLogger("jinaclip.server").setLevel(logging.INFO)
    with open_model(args, args.towers or TOWERS) as model, ExitStack() as stack:
        server = _server(args, model, market, stack)
        listener = listen(args.host, args.port)
        host, port = listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}{market.predict if market else '/v1/embeddings'}"
        info = model.info()["towers"].items()
        towers = ", ".join(f"{tower} {x['precision']} on {x['backend']} {x['device']}" for tower, x in info)
        licence = f"licence of the weights: {model.bundle.model.get('licence')}"
        print(f"jinaclip: {server.rules.model_names[0]} at {url} ({towers}); {licence}", file=sys.stderr)
        if unfinished := serve(server, listener, args.grace):
            print(f"jinaclip: {unfinished} items were not finished within {args.grace:g} s", file=sys.stderr)
        if any(batcher.running() for batcher in server.service.batchers.values()):
            os._exit(0)  # the usual exit would abort the process while onnxruntime's threads run
    return 0


def _server(args: argparse.Namespace, model: ClipModel, market: Marketplace | None, stack: ExitStack) -> Server:
    """The server that the options describe.

    Args:
        stack: closes what is opened for it.
    """
    from jinaclip.server.apis.requests import Rules
    from jinaclip.server.app import Server
    from jinaclip.server.fetch import Fetcher
    from jinaclip.server.middleware import ServerSettings
    from jinaclip.server.preparation import Limits
    from jinaclip.server.service import Service

    name = str(model.bundle.model.get("id"))
    names = tuple(dict.fromkeys((name, name.rpartition("/")[2], *args.model_name)))
    rules = Rules(names, model.dims, model.tasks, args.max_items, args.unknown_task == "ignore", args.accept_token_ids)
    image_bytes, wait_s = args.max_image << 20, args.batch_wait / 1000
    limits = Limits(args.max_queue, args.max_queue_images, args.max_tokens, image_bytes, args.max_pixels, wait_s)
    keys, body_bytes, bodies_bytes = tuple(args.api_key), args.max_body << 20, args.max_bodies << 20
    settings = ServerSettings(keys, body_bytes, bodies_bytes, args.body_timeout, market)
    fetcher, parallel = None, None
    if args.fetch_urls:
        fetcher = Fetcher(allow=args.fetch_allow, most_bytes=image_bytes, timeout_s=args.fetch_timeout)
    workers = _workers(model, args.workers)
    if workers > 1:
        threads = next(iter(model.encoders.values())).session.threads
        parallel = stack.enter_context(model.reopened(threads=max(1, threads // workers)))
    service = Service(model, limits, fetcher=fetcher, parallel_model=parallel, workers=workers)
    return Server(service, rules, settings)


def _workers(model: ClipModel, requested: int | None) -> int:
    """The number of batches that run at the same time.

    More than one requires prepared graphs, because only their weights can be shared with a second session.

    Raises:
        InputError: more than one is requested and a tower has no prepared graph.
    """
    towers = model.info()["towers"].values()
    if all(tower["device"] == "cpu" and tower.get("graph", "standard") != "standard" for tower in towers):
        return requested or min(MAX_WORKERS, *(tower["threads"] for tower in towers))
    if requested is not None and requested > 1:
        what = f"--workers {requested} requires graphs prepared for this CPU for every tower"
        raise InputError(f"{what}; run `jinaclip build`, or remove --workers")
    return 1


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a network ({error}); expected e.g. 10.1.0.0/16") from None


def _check(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if (name.startswith("max_") or name == "workers") and value is not None and value < 1:
            raise InputError(f"{option} is {value}, expected a whole number of at least 1")
        if isinstance(value, float) and not 0 <= value < 1e6:
            raise InputError(f"{option} is {value}, expected a number of at least 0")
    if args.fetch_allow and not args.fetch_urls:
        raise InputError("--fetch-allow has no effect without --fetch-urls; add --fetch-urls or remove --fetch-allow")
    if any(not key.strip() for key in args.api_key):
        raise InputError("an --api-key is empty; expected a key of at least one character")
    if not args.api_key and not args.marketplace and not _is_loopback(args.host):
        what = f"--host {args.host} can be reached from other machines, and no --api-key is set"
        raise InputError(f"{what}; set an --api-key, or listen on 127.0.0.1")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
