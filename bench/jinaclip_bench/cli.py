"""Measure latency, throughput, start-up time and memory, together with torch in the same run.

Do not compare times from different runs or machines. Compare the ratios within one run.
"""

from __future__ import annotations

import argparse
import logging
import sys
import textwrap
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinaclip.backends.selection import GPU_BACKENDS
from jinaclip.bundle.manifest import PRECISION_CLASS, Bundle
from jinaclip_bench.cases.table import AUTOTUNED_CASE, CASES, ON_GPU, SUITES, WITHOUT_TORCH

if TYPE_CHECKING:
    from jinaclip_bench.cases.settings import BenchSettings

logger = logging.getLogger("jinaclip")
EXTRA = "bench"
# Default precisions on a CPU: those of the suite if the bundle has int8 graphs, otherwise FP32.
WITH_INT8 = {"cpu": ("fp32", "int8"), "server": ("int8",)}
FP32 = ("fp32",)
HELP = {
    "bundle": "directory made by `jinaclip export`",
    "--checkpoint": "checkpoint of BUNDLE, needed to measure torch",
    "--random": "size of the random model (default: full)",
    "--precision": f"precisions of the bundle's graphs, from {', '.join(PRECISION_CLASS)}; each is measured in the "
    "same run (default: fp32; on a GPU: fp16; if BUNDLE has int8: also int8 for the suite cpu, only int8 for the suite "
    "server)",
    "--threads": "number of cores for every side (default: all that this process may use)",
    "--device": "cpu, cuda or cuda:N (default: cpu; for the suite gpu: cuda)",
    "--backend": "on a GPU, backend of jinaclip's sides (default: every usable backend; build engines with `jinaclip "
    "build` first)",
    "--max-autotune": "on a GPU, also measure torch.compile's max-autotune in image-32; it takes minutes to compile",
    "--repeats": "timed calls of each side (at most 9 for servers, 5 for mixes and stages, 3 for new processes)",
    "--suite": "run the suite's cases (listed below) for the towers that BUNDLE has",
    "--cases": "run these cases instead of a suite",
    "--output": "append the records to FILE, one JSON object per line",
    "--json": "print the records on stdout instead of the table",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    run_parser = actions.add_parser(
        "run",
        help="measure a bundle and torch",
        description="Measure a bundle, and torch with the same weights. Without BUNDLE: a full-size random model.",
        epilog=_epilog(),
        formatter_class=parser.formatter_class,
    )
    run_parser.set_defaults(wrong_usage=run_parser.error)

    def add(name: str, group: Any = run_parser, **options: Any) -> None:
        group.add_argument(name, help=HELP[name], **options)

    add("bundle", metavar="BUNDLE", nargs="?")
    add("--checkpoint", metavar="DIR")
    add("--random", choices=("small", "full"))
    add("--precision", type=partial(_names, "precision", PRECISION_CLASS), metavar="P,…")
    add("--threads", type=_positive, metavar="N")
    add("--device", metavar="D")
    add("--backend", choices=sorted(GPU_BACKENDS))
    add("--max-autotune", action="store_true")
    add("--repeats", type=_positive, default=20, metavar="R")
    selection = run_parser.add_mutually_exclusive_group()
    add("--suite", selection, choices=tuple(SUITES), default="basic")
    add("--cases", selection, type=partial(_names, "case", CASES), metavar="NAME,…")
    add("--output", metavar="FILE")
    add("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
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

        def write(record: dict[str, Any]) -> None:
            records.append(record)
            for file in (output, sys.stdout if args.json else None):
                if file is not None:
                    print(to_line(record), file=file, flush=True)

        run_cases(_case_names(args, settings.bundle), settings, write)
    if not args.json:
        print(render(records), end="")
    return 0


def _settings(args: argparse.Namespace) -> BenchSettings:
    from jinaclip.backends.machine import available_threads
    from jinaclip_bench.cases.gpu_backends import backends_on_gpu
    from jinaclip_bench.cases.settings import BenchSettings

    device = _device(args)
    on_gpu = device != "cpu"
    if on_gpu:  # check before a model is created
        from jinaclip.backends.cuda.gpu import device_index, gpu
        from jinaclip_bench.sides.torch_cuda import require_torch_cuda

        require_torch_cuda(gpu(device_index(device)).index)
    checkpoint = None
    if args.bundle is None:
        from jinaclip_bench.sides.random_model import cached_model

        bundle, checkpoint = cached_model(args.random or "full", device="cuda" if on_gpu else "cpu").get()
    else:
        bundle = Bundle(args.bundle)
    cases = [CASES[name] for name in _case_names(args, bundle)]
    if args.checkpoint is not None:
        from jinaclip_bench.sides.torch_cpu import matching_checkpoint

        checkpoint = matching_checkpoint(bundle, Path(args.checkpoint))
    elif args.bundle is not None and not all(case.kind in WITHOUT_TORCH for case in cases):
        logger.warning("torch is not measured, because --checkpoint was not given")
    suite = None if args.cases else args.suite
    has_int8 = all("int8" in bundle.tower(tower).graphs for tower in bundle.towers)
    default = ("fp16",) if on_gpu else WITH_INT8.get(suite or "", FP32) if has_int8 else FP32
    threads, precisions = args.threads or available_threads(), args.precision or default
    settings = BenchSettings(bundle, checkpoint, threads, args.repeats, precisions, suite=suite)
    if on_gpu:
        towers = tuple(dict.fromkeys(case.tower for case in cases))
        backends = backends_on_gpu(bundle, towers, device, args.backend)
        return replace(settings, backends=backends, max_autotune=args.max_autotune)
    if checkpoint is not None and "query-dummy-image" in [case.name for case in cases]:
        from jinaclip_bench.sides.fused_onnx import fused_graph

        return replace(settings, fused=fused_graph(checkpoint))
    return settings


def _case_names(args: argparse.Namespace, bundle: Bundle) -> Sequence[str]:
    """The requested cases; for a suite, its cases for the towers that the bundle has."""
    return args.cases or [name for name in SUITES[args.suite] if CASES[name].tower in bundle.towers]


def _device(args: argparse.Namespace) -> str:
    """The device to measure."""
    is_gpu_suite = args.suite == "gpu" and not args.cases
    cases = args.cases or SUITES[args.suite]
    device: str = args.device or ("cuda" if is_gpu_suite else "cpu")
    if device == "cpu" and is_gpu_suite:
        args.wrong_usage("--suite gpu needs a GPU; use --device cuda or cuda:N")
    if device == "cpu" and args.backend is not None:
        args.wrong_usage("--backend can only be used on a GPU; use --device cuda or cuda:N")
    if args.max_autotune and (device == "cpu" or AUTOTUNED_CASE not in cases):
        args.wrong_usage(f"--max-autotune needs the case {AUTOTUNED_CASE} on a GPU; use --suite gpu or --device cuda")
    for name in cases:
        if device != "cpu" and CASES[name].kind not in ON_GPU:
            args.wrong_usage(f"{name} can only be measured on the CPU; remove it, or remove --device")
    return device


def _epilog() -> str:
    lines = ["cases:", *(f"  {case.name:<18} {case.summary}" for case in CASES.values()), "", "suites:"]
    for suite, names in SUITES.items():
        label, cases = f"  {suite:<6} ", ", ".join(names)
        lines += textwrap.wrap(cases, 99, initial_indent=label, subsequent_indent=" " * 9, break_on_hyphens=False)
    lines += [
        "",
        "query-dummy-image creates a fused graph of both towers in the cache (3.5 GB for the full size). It is reused",
        "in later runs, and also measured in text-1x32.",
    ]
    return "\n".join(lines)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1")
    return int(text)


def _names(kind: str, known: Collection[str], text: str) -> tuple[str, ...]:
    """An argparse type for comma-separated names."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a {kind}; expected one or more of {','.join(known)}")
    return names
