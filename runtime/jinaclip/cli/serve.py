"""Serve a bundle over HTTP: the hosted embeddings API, at /v1/embeddings.

Code that is written for that API, or for OpenAI's client, works with another base URL; /docs tells all that is taken.
Every option can also be given in the environment, as JINACLIP_SERVE_ and its name: JINACLIP_SERVE_PORT=8080,
JINACLIP_SERVE_API_KEY=one,two, JINACLIP_SERVE_FETCH_URLS=1, and JINACLIP_SERVE_BUNDLE for the bundle. SIGTERM: what is
accepted is answered within --grace, new requests get 503.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import sys
from contextlib import ExitStack

from jinaclip.bundle.manifest import TOWERS
from jinaclip.cli.arguments import add_model_arguments, open_model, words_of
from jinaclip.errors import InputError
from jinaclip.model import ClipModel
from jinaclip.server.apis.marketplaces import MARKETPLACES

EXTRA = "server"
PREFIX = "JINACLIP_SERVE_"
MOST_WORKERS = 4  # by default: each run reads all weights, which memory has to carry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, bundle_may_lack=True)
    what = parser.add_argument_group("what is served")
    what.add_argument("--towers", type=words_of(TOWERS), metavar="T,…", help="text, image or both")
    what.add_argument("--model-name", action="append", default=[], metavar="NAME",
                      help="what clients may call the model, besides the bundle's id and its last part")  # fmt: skip
    what.add_argument("--unknown-task", choices=("refuse", "ignore"), default="refuse",
                      help="a task that the model lacks: an error, or a header X-Jinaclip-Warning")  # fmt: skip
    what.add_argument("--accept-token-ids", action="store_true",
                      help="texts may come as ids of this bundle's tokenizer, <s> and </s> included")  # fmt: skip
    what.add_argument("--marketplace", choices=MARKETPLACES,
                      help="be a SageMaker or Vertex AI endpoint; without a key nothing else")  # fmt: skip
    where = parser.add_argument_group("where, and to whom")
    where.add_argument("--host", help="address to listen on (default: 127.0.0.1; of a marketplace 0.0.0.0)")
    where.add_argument(
        "--port", type=int, help="0 takes a free one, and says which (default: 8000, or a marketplace's)"
    )
    where.add_argument("--api-key", action="append", default=[], metavar="KEY",
                       help="asked of every client; several may be given (none: on this machine alone)")  # fmt: skip
    where.add_argument("--log-requests", action="store_true", help="one line a request on stderr; never its input")
    fetching = parser.add_argument_group("pictures from addresses")
    fetching.add_argument("--fetch-urls", action="store_true", help="fetch http: and https: addresses that are public")
    fetching.add_argument("--fetch-allow", action="append", default=[], type=_network, metavar="CIDR",
                          help="fetch from this network too, though it is not public")  # fmt: skip
    fetching.add_argument("--fetch-timeout", type=float, default=10.0, metavar="S", help="seconds for one picture")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-queue", type=int, default=4096, metavar="N", help="texts accepted and not answered yet")
    limits.add_argument("--max-queue-images", type=int, default=256, metavar="N", help="images, likewise")
    limits.add_argument("--max-items", type=int, default=2048, metavar="N", help="of a request")
    limits.add_argument("--max-body", type=int, default=64, metavar="MIB", help="size of a request")
    limits.add_argument("--max-bodies", type=int, default=256, metavar="MIB", help="of all requests at the same time")
    limits.add_argument("--max-image", type=int, default=32, metavar="MIB", help="size of a picture's file")
    limits.add_argument("--max-pixels", type=int, default=89_478_485, metavar="N", help="of a picture")
    limits.add_argument("--max-tokens", type=int, metavar="N", help="of a text (default: what the model takes)")
    limits.add_argument("--body-timeout", type=float, default=60.0, metavar="S", help="seconds for a request to come")
    limits.add_argument("--workers", type=int, metavar="N",
                        help="runs at the same time, of graphs prepared for this CPU, when there is much to do "
                             "(default: as many as cores, at most 4)")  # fmt: skip
    limits.add_argument("--batch-wait", type=float, default=0.0, metavar="MS",
                        help="milliseconds that an item waits for company where nothing runs")  # fmt: skip
    limits.add_argument("--grace", type=float, default=30.0, metavar="S", help="seconds to finish in at the end")
    _take_environment(parser)


def run(args: argparse.Namespace) -> int:
    from jinaclip.server.apis.marketplaces import SAGEMAKER_BUNDLE, marketplace
    from jinaclip.server.apis.requests import Rules
    from jinaclip.server.app import Server, Settings
    from jinaclip.server.fetch import Fetcher
    from jinaclip.server.lifecycle import listen, serve
    from jinaclip.server.metrics import Metrics
    from jinaclip.server.service import Limits, Service

    market = marketplace(args.marketplace, os.environ) if args.marketplace else None
    args.host = args.host or ("0.0.0.0" if market else "127.0.0.1")
    args.port = args.port if args.port is not None else market.port if market else 8000
    args.bundle = args.bundle or (SAGEMAKER_BUNDLE if args.marketplace == "sagemaker" else None)
    if args.bundle is None:
        args.usage_error(f"a BUNDLE is needed: a directory made by `jinaclip export`, or its name in {PREFIX}BUNDLE")
    _check(args)
    if args.log_requests:
        logging.getLogger("jinaclip.server").setLevel(logging.INFO)
    with open_model(args, args.towers or TOWERS) as model, ExitStack() as stack:
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
        server = Server(
            Service(model, limits=limits, metrics=metrics, fetcher=fetcher, narrow=narrow, workers=workers),
            rules,
            metrics,
            settings,
        )
        listener = listen(args.host, args.port)
        host, port = listener.getsockname()[:2]
        towers = ", ".join(
            f"{tower} {facts['precision']} on {facts['backend']} {facts['device']}"
            for tower, facts in model.info()["towers"].items()
        )
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        path = market.predict if market else "/v1/embeddings"
        print(f"jinaclip: {rules.model_names[0]} at {where}{path} ({towers}); licence of the weights: "
              f"{model.bundle.model.get('licence')}", file=sys.stderr, flush=True)  # fmt: skip
        left = serve(server, listener, args.grace)
        if left:
            print(f"jinaclip: {left} items were not finished within {args.grace:g} s", file=sys.stderr)
    return 0


def _workers(model: ClipModel, asked: int | None) -> int:
    """Runs at the same time: several only of prepared graphs, whose weights another session shares.

    Raises:
        InputError: several are asked for, and cannot be had.
    """
    towers = model.info()["towers"].values()
    fit = all(facts["device"] == "cpu" and facts.get("graph", "standard") != "standard" for facts in towers)
    if asked is not None and asked > 1 and not fit:
        raise InputError(f"--workers {asked} takes graphs that are prepared for this CPU, and not all are; run "
                         "`jinaclip build`, or leave it out")  # fmt: skip
    return (asked or min(MOST_WORKERS, *(facts["threads"] for facts in towers))) if fit else 1


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no network ({error}); expected such as 10.1.0.0/16") from None


def _check(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if (name.startswith("max_") or name == "workers") and value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected a whole number from 1")
    for name, unit in (("grace", "seconds"), ("fetch_timeout", "seconds"), ("body_timeout", "seconds"),
                       ("batch_wait", "milliseconds")):  # fmt: skip
        if not 0 <= getattr(args, name) < 1e6:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected {unit} from 0")
    if args.fetch_allow and not args.fetch_urls:
        raise InputError("--fetch-allow is given and --fetch-urls is not: nothing would be fetched")
    if any(not key.strip() for key in args.api_key):
        raise InputError("an --api-key is empty")
    if not args.api_key and not args.marketplace and not _is_loopback(args.host):
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
