"""Build a bundle's engines: prepared graphs for ONNX Runtime, or TensorRT plans for a GPU.

onnxruntime: prepared graphs for this CPU. They are used automatically on machines with the same CPU features and the
same onnxruntime version. With --device cuda: prepared fp16 graphs for the CUDA provider, usable on any GPU.
tensorrt: plans for the GPU of this machine. tensorrt-rtx: the same, or plans compiled ahead of time, without a GPU, for
the GPU generations in --target. The output is written to BUNDLE/engines, or to --cache DIR if the bundle is read-only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from jinaclip.backends.cuda.gpu import device_index, driver_problem
from jinaclip.backends.onnxruntime.cuda_operators import operators_library
from jinaclip.backends.onnxruntime.cuda_provider import cuda_problem
from jinaclip.backends.selection import GPU_BACKENDS, choose_backend
from jinaclip.bundle.manifest import PRECISION_CLASS, TOWERS, Bundle
from jinaclip.cli.arguments import words_of
from jinaclip.encoders import ENCODERS
from jinaclip.errors import BackendError
from jinaclip.terminal import say

EXTRA = "build"
DEFAULT_POLICY, DEFAULT_PROFILE = "fp16-acc32", "server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="directory made by `jinaclip export`")
    parser.add_argument("--backend", choices=sorted(GPU_BACKENDS), default="onnxruntime", help="backend to build for")
    towers = "text, image or both (default: those of the bundle)"
    parser.add_argument("--towers", type=words_of(TOWERS), metavar="T,…", help=towers)
    parser.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: cpu for onnxruntime, else cuda)")
    parser.add_argument("--cache", metavar="DIR", help="output directory when the bundle is read-only")
    parser.add_argument("--force", action="store_true", help="build again even if a usable engine exists")
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    cpu = parser.add_argument_group("onnxruntime")
    precisions = "fp32, int8; with --device cuda: fp16 (default: those of the bundle)"
    cpu.add_argument("--precision", type=words_of(tuple(PRECISION_CLASS)), metavar="P,…", help=precisions)
    plans = parser.add_argument_group("tensorrt, tensorrt-rtx (from the bundle's fp16 graphs)")
    sums = "accumulation of float16 products: float32, or the compiler's choice (default: fp16-acc32)"
    plans.add_argument("--policy", choices=("fp16-acc32", "fp16-fast"), help=sums)
    plans.add_argument("--profile", metavar="P", help="shapes: server, edge or a TOML file (default: server)")
    targets = "tensorrt-rtx: GPU generations to compile for (default: this machine's GPU, or all if it has none)"
    plans.add_argument("--target", type=lambda text: tuple(text.lower().split(",")), metavar="sm80,…", help=targets)
    workspace = "largest scratch memory of a kernel (default: the GPU's)"
    plans.add_argument("--workspace", type=_mebibytes, metavar="MIB", help=workspace)


def _mebibytes(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 1 << 24:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of MiB from 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    bundle = Bundle(args.bundle, args.cache)
    towers = args.towers or tuple(bundle.towers)
    for tower in towers:
        bundle.tower(tower)
    _refuse_others_options(args)
    results = _prepare(args, bundle, towers) if args.backend == "onnxruntime" else _build(args, bundle, towers)
    if args.json:
        print(json.dumps(results, indent=1))
    return 0


def _refuse_others_options(args: argparse.Namespace) -> None:
    """Raise an error for options that only another backend uses, instead of ignoring them."""
    others = {"policy", "profile", "target", "workspace"} if args.backend == "onnxruntime" else {"precision"}
    for name in sorted(others):
        if getattr(args, name) is not None:
            raise BackendError(f"--{name} has no effect with --backend {args.backend}; remove it")


def _prepare(args: argparse.Namespace, bundle: Bundle, towers: Sequence[str]) -> list[dict[str, Any]]:
    from jinaclip_engines.onnxruntime.prepare import PREPARED_PRECISIONS, prepare

    device = args.device or "cpu"
    kind = "cpu" if device == "cpu" else "cuda"
    if kind == "cuda":
        device_index(device)  # raises if it is not "cuda" or "cuda:N"
    can_test = kind == "cpu" or (driver_problem() is None and cuda_problem() is None)
    operators = kind == "cuda" and operators_library() is not None
    possible = PREPARED_PRECISIONS[kind]
    for precision in args.precision or ():
        if precision not in possible:
            raise BackendError(
                f"--precision {precision} cannot be prepared for {kind}; expected {' or '.join(possible)}"
            )
    results = []
    for tower in towers:
        graphs = bundle.tower(tower).graphs
        for precision in args.precision or [p for p in possible if p in graphs] or possible[:1]:
            bundle.graph(tower, precision)  # raises if the bundle has no such graph
            start = time.monotonic()
            say(f"{tower} {precision}")
            key, new = prepare(bundle, tower, precision, kind, operators=operators, force=args.force)
            test = _self_test(bundle, tower, precision, device) if can_test else None
            results.append({"tower": tower, "precision": precision, "engine": key, "made": new, "self_test": test})
            if not args.json:
                how = f"{time.monotonic() - start:.1f} s" if new else "up to date"
                untested = "" if test else "; not tested: onnxruntime has no GPU on this machine"
                print(f"{tower} {precision}: {key}, {how}{untested}", file=sys.stderr)
    return results


def _self_test(bundle: Bundle, tower: str, precision: str, device: str) -> dict[str, float | bool]:
    backend = choose_backend(bundle, (tower,), backend="onnxruntime", device=device)
    session, _ = backend.open(bundle, tower, precision)
    with closing(session):
        return ENCODERS[tower](bundle, precision, session).check(always=False)


def _build(args: argparse.Namespace, bundle: Bundle, towers: Sequence[str]) -> list[dict[str, Any]]:
    from jinaclip.backends.tensorrt.library import load_library
    from jinaclip_engines.tensorrt.builder import EngineBuilder, choose_target
    from jinaclip_engines.tensorrt.profiles import load_profiles

    library = load_library(args.backend)
    if args.device == "cpu":
        raise BackendError(f"--backend {args.backend} builds for GPUs; remove --device, or use cuda or cuda:N")
    target = choose_target(library, device_index(args.device or "cuda"), args.target)
    policy, profile_set = args.policy or DEFAULT_POLICY, args.profile or DEFAULT_PROFILE
    profiles = load_profiles(profile_set, max_tokens=bundle.max_tokens or None)
    for tower in towers:
        bundle.graph(tower, "fp16")
        if tower not in profiles:
            raise BackendError(
                f"--profile {profile_set} has no profile for the {tower} tower; add one, or select the other tower "
                "with --towers"
            )
    results = []
    for tower in towers:
        start = time.monotonic()

        def progress(line: str, tower: str = tower, start: float = start) -> None:
            if not args.json:
                print(f"{tower} {time.monotonic() - start:5.1f} s  {line}", file=sys.stderr, flush=True)

        builder = EngineBuilder(
            bundle, tower, library, target, policy, profiles[tower], profile_set, args.workspace, progress
        )
        built = builder.build(force=args.force)
        report, test = built.sidecar["report"], built.sidecar["self_test"]
        result = {"tower": tower, "precision": "fp16", "engine": built.key, "made": built.new, "report": report}
        results.append(result | {"self_test": test})
        progress(f"{built.key}{'' if built.new else ', up to date'}")
        if not args.json:
            _print_report(report, test)
    return results


def _print_report(report: dict[str, Any], test: dict[str, Any] | None) -> None:
    from jinaclip_engines.tensorrt.build_report import Report

    tested = f"passed, relative error {test['ratio']:.2g}" if test else "not run: this machine has no GPU for it"
    for line in (*Report(**report).lines(), f"self-test: {tested}"):
        print(f"  {line}", file=sys.stderr)
