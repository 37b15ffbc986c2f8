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
from typing import TYPE_CHECKING

from jinaclip.bundle.manifest import TOWERS
from jinaclip.cli.arguments import add_model_arguments, open_model, words_of
from jinaclip.errors import InputError
from jinaclip.model import ClipModel
from jinaclip.server.apis.marketplaces import MARKETPLACES, Marketplace

if TYPE_CHECKING:
    from jinaclip.server.app import Server

EXTRA = "server"
PREFIX = "JINACLIP_SERVE_"
MOST_WORKERS = 4  # the default limit: every run reads all weights, so more workers compete for memory bandwidth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, bundle_may_lack=True)
    what = parser.add_argument_group("model")
    what.add_argument("--towers", type=words_of(TOWERS), metavar="T,…", help="text, image or both")
    what.add_argument("--model-name", action="append", default=[], metavar="NAME",
                      help="another model name for clients, besides the bundle's id and its last part")  # fmt: skip
    what.add_argument("--unknown-task", choices=("refuse", "ignore"), default="refuse",
                      help="reject an unknown task, or ignore it and return a header X-Jinaclip-Warning")  # fmt: skip
    what.add_argument("--accept-token-ids", action="store_true",
                      help="accept token ids of this bundle's tokenizer, including <s> and </s>, as texts")  # fmt: skip
    what.add_argument("--marketplace", choices=MARKETPLACES,
                      help="serve as a SageMaker or Vertex AI endpoint; without a key no other API path")  # fmt: skip
    where = parser.add_argument_group("network and access")
    where.add_argument("--host", help="address to listen on (default: 127.0.0.1, with --marketplace 0.0.0.0)")
    where.add_argument(
        "--port", type=int, help="port; 0 selects a free port and prints it (default: 8000, or the marketplace's port)"
    )
    where.add_argument("--api-key", action="append", default=[], metavar="KEY",
                       help="API key that clients must send; repeatable (without one: this machine only)")  # fmt: skip
    where.add_argument("--log-requests", action="store_true", help="log one line per request to stderr, without input")
    fetching = parser.add_argument_group("images from URLs")
    fetching.add_argument("--fetch-urls", action="store_true", help="download images from public http(s): URLs")
    fetching.add_argument("--fetch-allow", action="append", default=[], type=_network, metavar="CIDR",
                          help="also connect to this network, although it is not public; repeatable")  # fmt: skip
    fetching.add_argument("--fetch-timeout", type=float, default=10.0, metavar="S", help="seconds per image")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-queue", type=int, default=4096, metavar="N", help="most texts not yet answered")
    limits.add_argument("--max-queue-images", type=int, default=256, metavar="N", help="most images not yet answered")
    limits.add_argument("--max-items", type=int, default=2048, metavar="N", help="most items per request")
    limits.add_argument("--max-body", type=int, default=64, metavar="MIB", help="largest request body")
    limits.add_argument(
        "--max-bodies", type=int, default=256, metavar="MIB", help="largest total of all request bodies"
    )
    limits.add_argument("--max-image", type=int, default=32, metavar="MIB", help="largest image file")
    limits.add_argument("--max-pixels", type=int, default=89_478_485, metavar="N", help="most pixels per image")
    limits.add_argument("--max-tokens", type=int, metavar="N", help="most tokens per text (default: the model's limit)")
    limits.add_argument("--body-timeout", type=float, default=60.0, metavar="S", help="seconds to receive a body")
    limits.add_argument("--workers", type=int, metavar="N",
                        help="batches that run at the same time under load; more than 1 needs graphs prepared for "
                             "this CPU (default: the number of cores, at most 4)")  # fmt: skip
    limits.add_argument("--batch-wait", type=float, default=0.0, metavar="MS",
                        help="milliseconds that an idle queue waits for more items before it runs a batch")  # fmt: skip
    limits.add_argument("--grace", type=float, default=30.0, metavar="S",
                        help="seconds to answer accepted requests at shutdown")  # fmt: skip
    _take_environment(parser)


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
        towers = ", ".join(
            f"{tower} {facts['precision']} on {facts['backend']} {facts['device']}"
            for tower, facts in model.info()["towers"].items()
        )
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        path = market.predict if market else "/v1/embeddings"
        print(f"jinaclip: {server.rules.model_names[0]} at {where}{path} ({towers}); licence of the weights: "
              f"{model.bundle.model.get('licence')}", file=sys.stderr, flush=True)  # fmt: skip
        left = serve(server, listener, args.grace)
        if left:
            print(f"jinaclip: {left} items were not finished within {args.grace:g} s", file=sys.stderr, flush=True)
        if any(batcher.running() for batcher in server.service.batchers.values()):
            os._exit(0)  # the usual exit would abort the process while onnxruntime's threads run
    return 0


def _server(args: argparse.Namespace, model: ClipModel, market: Marketplace | None, stack: ExitStack) -> Server:
    """The server that the options describe.

    Args:
        stack: closes what is opened for it.
    """
    from jinaclip.server.apis.requests import Rules
    from jinaclip.server.app import Server, Settings
    from jinaclip.server.fetch import Fetcher
    from jinaclip.server.metrics import Metrics
    from jinaclip.server.preparation import Limits
    from jinaclip.server.service import Service

    workers = _workers(model, args.workers)
    narrow = None
    if workers > 1:
        threads = max(1, next(iter(model.info()["towers"].values()))["threads"] // workers)
        narrow = stack.enter_context(model.reopened(threads=threads))
    name = str(model.bundle.model.get("id"))
    rules = Rules(
        model_names=tuple(dict.fromkeys((name, name.rpartition("/")[2], *args.model_name))),
        dims=model.dims, tasks=model.tasks,
        most_items=args.max_items, ignore_unknown_tasks=args.unknown_task == "ignore",
        take_tokens=args.accept_token_ids,
    )  # fmt: skip
    limits = Limits(
        queue_texts=args.max_queue, queue_images=args.max_queue_images, tokens=args.max_tokens,
        image_bytes=args.max_image << 20, pixels=args.max_pixels, gather_s=args.batch_wait / 1000,
    )  # fmt: skip
    fetcher = None
    if args.fetch_urls:
        fetcher = Fetcher(allow=args.fetch_allow, most_bytes=limits.image_bytes, timeout_s=args.fetch_timeout)
    metrics = Metrics()
    settings = Settings(
        tuple(args.api_key), max_body_bytes=args.max_body << 20, max_bodies_bytes=args.max_bodies << 20,
        body_timeout_s=args.body_timeout, marketplace=market,
    )  # fmt: skip
    service = Service(model, limits=limits, metrics=metrics, fetcher=fetcher, narrow=narrow, workers=workers)
    return Server(service, rules, metrics, settings)


def _workers(model: ClipModel, asked: int | None) -> int:
    """The number of batches that run at the same time.

    More than one requires prepared graphs, because only their weights can be shared with a second session.

    Raises:
        InputError: more than one is requested and a tower has no prepared graph.
    """
    towers = model.info()["towers"].values()
    fit = all(facts["device"] == "cpu" and facts.get("graph", "standard") != "standard" for facts in towers)
    if asked is not None and asked > 1 and not fit:
        raise InputError(f"--workers {asked} requires graphs prepared for this CPU for every tower; run "
                         "`jinaclip build`, or remove --workers")  # fmt: skip
    return (asked or min(MOST_WORKERS, *(facts["threads"] for facts in towers))) if fit else 1


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a network ({error}); expected e.g. 10.1.0.0/16") from None


def _check(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if (name.startswith("max_") or name == "workers") and value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected a whole number of at least 1")
    for name, unit in (("grace", "seconds"), ("fetch_timeout", "seconds"), ("body_timeout", "seconds"),
                       ("batch_wait", "milliseconds")):  # fmt: skip
        if not 0 <= getattr(args, name) < 1e6:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected {unit}, at least 0")
    if args.fetch_allow and not args.fetch_urls:
        raise InputError("--fetch-allow has no effect without --fetch-urls; add --fetch-urls or remove --fetch-allow")
    if any(not key.strip() for key in args.api_key):
        raise InputError("an --api-key is empty; expected a key of at least one character")
    if not args.api_key and not args.marketplace and not _is_loopback(args.host):
        raise InputError(
            f"--host {args.host} can be reached from other machines, and no --api-key is set; set an --api-key, or "
            "listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _take_environment(parser: argparse.ArgumentParser) -> None:
    """Take the defaults of options from environment variables, for example --port from JINACLIP_SERVE_PORT.

    Several values of a repeatable option are separated by commas.
    """
    for action in parser._actions:
        variable = f"{PREFIX}{action.dest.upper()}"
        value = os.environ.get(variable)
        if value is None or action.dest == "help":
            continue
        if isinstance(action, argparse._StoreTrueAction):
            if value.lower() not in ("1", "true", "yes", "0", "false", "no", ""):
                parser.error(f"{variable} is {value!r}, expected 1 or 0")
            action.default = value.lower() in ("1", "true", "yes")
            continue
        words = [word for word in value.split(",") if word] if isinstance(action, argparse._AppendAction) else [value]
        try:
            values = [parser._get_value(action, word) for word in words]
            for word in values:
                parser._check_value(action, word)
        except argparse.ArgumentError as error:
            parser.error(f"{variable}: {error.message}")
        action.default = values if isinstance(action, argparse._AppendAction) else values[0]
