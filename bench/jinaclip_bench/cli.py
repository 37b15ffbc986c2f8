"""Measure latency, throughput, start-up time and memory, together with torch in the same run.

Do not compare times from different runs or machines. Compare the ratios within one run.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinaclip.bundle.manifest import PRECISION_CLASS, Bundle
from jinaclip_bench.cases.gpu_backends import BACKENDS
from jinaclip_bench.cases.table import AUTOTUNED_CASE, CASES, ON_GPU, SUITES, WITHOUT_TORCH
from jinaclip_bench.tell import tell

if TYPE_CHECKING:
    from jinaclip_bench.cases.settings import Settings

EXTRA = "bench"
# Default precisions on a CPU: those of the suite if the bundle has int8 graphs, otherwise FP32.
WITH_INT8 = {"cpu": ("fp32", "int8"), "server": ("int8",)}
FP32 = ("fp32",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    run_parser = actions.add_parser(
        "run",
        help="measure a bundle and torch",
        description="Measure a bundle, and torch with the same weights. Without BUNDLE: a full-size random model.",
        epilog=_epilog(),
        formatter_class=parser.formatter_class,
    )
    run_parser.set_defaults(action=run_action, wrong_usage=run_parser.error)
    run_parser.add_argument("bundle", metavar="BUNDLE", nargs="?", help="directory made by `jinaclip export`")
    run_parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint of BUNDLE, needed to measure torch")
    run_parser.add_argument("--random", choices=("small", "full"), help="size of the random model (default: full)")
    run_parser.add_argument("--precision", type=_precisions, metavar="P,…",
                            help=f"precisions of the bundle's graphs, from {', '.join(PRECISION_CLASS)}; each is "
                                 "measured in the same run (default: fp32; on a GPU: fp16; if BUNDLE has int8: also "
                                 "int8 for the suite cpu, only int8 for the suite server)",
                            )  # fmt: skip
    run_parser.add_argument("--threads", type=_positive, metavar="N",
                            help="number of cores for every side (default: all that this process may use)")  # fmt: skip
    run_parser.add_argument("--device", metavar="D",
                            help="cpu, cuda or cuda:N (default: cpu; for the suite gpu: cuda)")  # fmt: skip
    run_parser.add_argument("--backend", choices=BACKENDS,
                            help="on a GPU, backend of jinaclip's sides (default: every usable backend; build engines "
                                 "with `jinaclip build` first)",
                            )  # fmt: skip
    run_parser.add_argument("--max-autotune", action="store_true",
                            help="on a GPU, also measure torch.compile's max-autotune in image-32; it takes minutes to "
                                 "compile",
                            )  # fmt: skip
    run_parser.add_argument("--repeats", type=_positive, default=20, metavar="R",
                            help="timed calls of each side (at most 9 for servers, 5 for mixes and stages, 3 for new "
                                 "processes)",
                            )  # fmt: skip
    chosen = run_parser.add_mutually_exclusive_group()
    chosen.add_argument("--suite", choices=tuple(SUITES), default="basic",
                        help="run the suite's cases (listed below) for the towers that BUNDLE has")  # fmt: skip
    chosen.add_argument("--cases", type=_cases, metavar="NAME,…", help="run these cases instead of a suite")
    run_parser.add_argument("--output", metavar="FILE", help="append the records to FILE, one JSON object per line")
    run_parser.add_argument("--json", action="store_true", help="print the records on stdout instead of the table")


def run(args: argparse.Namespace) -> int:
    status: int = args.action(args)
    return status


def run_action(args: argparse.Namespace) -> int:
    from jinaclip_bench.reporting.record import to_line
    from jinaclip_bench.reporting.report import render
    from jinaclip_bench.run import run_cases

    if args.checkpoint is not None and args.bundle is None:
        args.wrong_usage("--checkpoint can only be used with BUNDLE")
    if args.random is not None and args.bundle is not None:
        args.wrong_usage("--random cannot be used with BUNDLE")
    records = []
    with ExitStack() as stack:
        output = stack.enter_context(open(args.output, "a", encoding="utf-8")) if args.output else None
        settings = _settings(args)
        cases = _wanted(args, settings.bundle)
        if settings.gpu is None and settings.checkpoint is not None and "query-dummy-image" in cases:
            from jinaclip_bench.sides.fused_onnx import fused_graph

            settings = replace(settings, fused=fused_graph(settings.checkpoint, tell=tell))

        def write(record: dict[str, Any]) -> None:
            records.append(record)
            for file in (output, sys.stdout if args.json else None):
                if file is not None:
                    print(to_line(record), file=file, flush=True)

        run_cases(cases, settings, write)
    if not args.json:
        print(render(records), end="")
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    from jinaclip.backends.machine import available_threads
    from jinaclip_bench.cases.settings import Settings

    device = _device(args)
    on_gpu = device != "cpu"
    if on_gpu:  # check before a model is created
        from jinaclip.backends.cuda.gpu import device_index, gpu
        from jinaclip_bench.sides.torch_cuda import require_torch_cuda

        require_torch_cuda(gpu(device_index(device)).index)
    checkpoint = None
    if args.bundle is None:
        from jinaclip_bench.sides.random_model import random_model

        bundle, checkpoint = random_model(args.random or "full", device="cuda" if on_gpu else "cpu", tell=tell)
    else:
        bundle = Bundle(args.bundle)
        if args.checkpoint is None:
            if not all(CASES[name].kind in WITHOUT_TORCH for name in _wanted(args, bundle)):
                tell("torch is not measured, because --checkpoint was not given")
        else:
            from jinaclip_bench.sides.torch_cpu import matching_checkpoint

            checkpoint = matching_checkpoint(bundle, Path(args.checkpoint))
    suite = None if args.cases else args.suite
    has_int8 = all("int8" in bundle.tower(tower).graphs for tower in bundle.towers)
    default = WITH_INT8.get(suite or "", FP32) if has_int8 else FP32
    settings = Settings(
        bundle, checkpoint, threads=args.threads or available_threads(), repeats=args.repeats,
        precisions=args.precision or (("fp16",) if on_gpu else default), suite=suite,
        max_autotune=args.max_autotune,
    )  # fmt: skip
    if not on_gpu:
        return settings
    from jinaclip_bench.cases.gpu_backends import backends_on_gpu

    towers = tuple(dict.fromkeys(CASES[name].tower for name in _wanted(args, bundle)))
    return replace(settings, backends=backends_on_gpu(bundle, towers, device, args.backend, tell=tell))


def _wanted(args: argparse.Namespace, bundle: Bundle) -> Sequence[str]:
    """The requested cases; for a suite, its cases for the towers that the bundle has."""
    return args.cases or [name for name in SUITES[args.suite] if CASES[name].tower in bundle.towers]


def _device(args: argparse.Namespace) -> str:
    """The device to measure."""
    is_gpu_suite = args.suite == "gpu" and not args.cases
    device: str = args.device or ("cuda" if is_gpu_suite else "cpu")
    if device == "cpu" and is_gpu_suite:
        args.wrong_usage("--suite gpu needs a GPU; use --device cuda or cuda:N")
    if device == "cpu" and args.backend is not None:
        args.wrong_usage("--backend can only be used on a GPU; use --device cuda or cuda:N")
    if args.max_autotune and (device == "cpu" or AUTOTUNED_CASE not in (args.cases or SUITES[args.suite])):
        args.wrong_usage(f"--max-autotune needs the case {AUTOTUNED_CASE} on a GPU; use --suite gpu or --device cuda")
    for name in args.cases or SUITES[args.suite]:
        if device != "cpu" and CASES[name].kind not in ON_GPU:
            args.wrong_usage(f"{name} can only be measured on the CPU; remove it, or remove --device")
    return device


def _epilog() -> str:
    lines = ["cases:", *(f"  {case.name:<18} {case.summary}" for case in CASES.values()), "", "suites:"]
    for suite, names in SUITES.items():
        words = textwrap.wrap(", ".join(names), 90, break_on_hyphens=False)
        lines += [f"  {suite:<6} {words[0]}", *(f"  {'':<6} {line}" for line in words[1:])]
    return "\n".join([
        *lines, "",
        "query-dummy-image creates a fused graph of both towers in the cache (3.5 GB for the full size). It is reused",
        "in later runs, and also measured in text-1x32.",
    ])  # fmt: skip


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1")
    return int(text)


def _cases(text: str) -> tuple[str, ...]:
    return _some_of(text, "case", CASES)


def _precisions(text: str) -> tuple[str, ...]:
    return _some_of(text, "precision", PRECISION_CLASS)


def _some_of(text: str, what: str, known: Collection[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a {what}; expected one or more of {','.join(known)}")
    return names
