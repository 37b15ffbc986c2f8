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
from typing import Any

from jinaclip.backends.cuda.gpu import device_index, driver_problem
from jinaclip.backends.onnxruntime.cuda_operators import operators_library
from jinaclip.backends.onnxruntime.cuda_provider import cuda_problem
from jinaclip.bundle.manifest import TOWERS, Bundle
from jinaclip.cli.arguments import words_of
from jinaclip.errors import BackendError
from jinaclip.model import ClipModel
from jinaclip.terminal import say

EXTRA = "build"
PRECISIONS = ("fp32", "fp16", "int8")
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")
DEFAULT_POLICY, DEFAULT_PROFILE = "fp16-acc32", "server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="directory made by `jinaclip export`")
    parser.add_argument("--backend", choices=BACKENDS, default="onnxruntime", help="backend to build for")
    parser.add_argument(
        "--towers", type=words_of(TOWERS), metavar="T,…", help="text, image or both (default: those of the bundle)"
    )
    parser.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: cpu for onnxruntime, else cuda)")
    parser.add_argument("--cache", metavar="DIR", help="output directory when the bundle is read-only")
    parser.add_argument("--force", action="store_true", help="build again even if a usable engine exists")
    parser.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    cpu = parser.add_argument_group("onnxruntime")
    cpu.add_argument(
        "--precision",
        type=words_of(PRECISIONS),
        metavar="P,…",
        help="fp32, int8; with --device cuda: fp16 (default: those of the bundle)",
    )
    plans = parser.add_argument_group("tensorrt, tensorrt-rtx (from the bundle's fp16 graphs)")
    plans.add_argument(
        "--policy", choices=("fp16-acc32", "fp16-fast"),
        help="accumulation of float16 products: float32, or the compiler's choice (default: fp16-acc32)",
    )  # fmt: skip
    plans.add_argument("--profile", metavar="P", help="shapes: server, edge or a TOML file (default: server)")
    plans.add_argument(
        "--target", type=lambda text: tuple(text.lower().split(",")), metavar="sm80,…",
        help="tensorrt-rtx: GPU generations to compile for (default: this machine's GPU, or all if it has none)",
    )  # fmt: skip
    plans.add_argument(
        "--workspace", type=_mebibytes, metavar="MIB", help="largest scratch memory of a kernel (default: the GPU's)"
    )


def _mebibytes(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 1 << 24:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of MiB from 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    bundle = Bundle(args.bundle, args.cache)
    for tower in args.towers or ():
        bundle.tower(tower)
    _refuse_others_options(args)
    made = _prepare(args, bundle) if args.backend == "onnxruntime" else _build(args, bundle)
    if args.json:
        print(json.dumps(made, indent=1))
    return 0


def _refuse_others_options(args: argparse.Namespace) -> None:
    """Raise an error for options that only another backend uses, instead of ignoring them."""
    others = {"policy", "profile", "target", "workspace"} if args.backend == "onnxruntime" else {"precision"}
    for name in sorted(others):
        if getattr(args, name) is not None:
            raise BackendError(f"--{name} has no effect with --backend {args.backend}; remove it")


def _prepare(args: argparse.Namespace, bundle: Bundle) -> list[dict[str, Any]]:
    from jinaclip_engines.onnxruntime.prepare import PRECISIONS as POSSIBLE
    from jinaclip_engines.onnxruntime.prepare import prepare

    device = "cpu" if args.device in (None, "cpu") else "cuda"
    index = device_index(args.device) if device == "cuda" else None
    here = index is not None and driver_problem() is None and cuda_problem() is None
    for precision in args.precision or ():
        if precision not in POSSIBLE[device]:
            raise BackendError(
                f"--precision {precision} cannot be prepared for {device}; expected {' or '.join(POSSIBLE[device])}"
            )
    made = []
    for tower in args.towers or bundle.towers:
        graphs = bundle.tower(tower).graphs
        for precision in args.precision or [p for p in POSSIBLE[device] if p in graphs] or POSSIBLE[device][:1]:
            bundle.graph(tower, precision)  # raises if the bundle has no such graph
            start = time.monotonic()
            say(f"{tower} {precision}")
            operators = device == "cuda" and operators_library() is not None
            key, new = prepare(bundle, tower, precision, device, operators=operators, force=args.force)
            test = None
            if device == "cpu" or here:
                where = args.device or "cpu"
                with ClipModel(
                    args.bundle, backend="onnxruntime", device=where, towers=(tower,), precision=precision,
                    cache_dir=args.cache,
                ) as model:  # fmt: skip
                    test = model.info()["towers"][tower]["self_test"]
            made.append({"tower": tower, "precision": precision, "engine": key, "made": new, "self_test": test})
            if not args.json:
                how = f"{time.monotonic() - start:.1f} s" if new else "up to date"
                untested = "" if test else "; not tested: onnxruntime has no GPU on this machine"
                print(f"{tower} {precision}: {key}, {how}{untested}", file=sys.stderr)
    return made


def _build(args: argparse.Namespace, bundle: Bundle) -> list[dict[str, Any]]:
    from jinaclip.backends.tensorrt.library import load_library
    from jinaclip_engines.tensorrt.builder import build_engine, where_to_build
    from jinaclip_engines.tensorrt.profiles import load_profiles

    library = load_library(args.backend)
    if args.device == "cpu":
        raise BackendError(f"--backend {args.backend} builds for GPUs; remove --device, or use cuda or cuda:N")
    where = where_to_build(library, device_index(args.device or "cuda"), args.target)
    profile_set = args.profile or DEFAULT_PROFILE
    profiles = load_profiles(profile_set, max_tokens=bundle.max_tokens or None)
    towers = args.towers or tuple(bundle.towers)
    for tower in towers:
        bundle.graph(tower, "fp16")
        if tower not in profiles:
            raise BackendError(
                f"--profile {profile_set} has no profile for the {tower} tower; add one, or select the other tower "
                "with --towers"
            )
    made = []
    for tower in towers:
        start = time.monotonic()

        def stage(line: str, tower: str = tower, start: float = start) -> None:
            if not args.json:
                print(f"{tower} {time.monotonic() - start:5.1f} s  {line}", file=sys.stderr, flush=True)

        built = build_engine(
            bundle, tower, library, where, policy=args.policy or DEFAULT_POLICY, profiles=profiles[tower],
            profile_set=profile_set, workspace_mib=args.workspace, force=args.force, stage=stage,
        )  # fmt: skip
        sidecar = built.sidecar
        report, test = sidecar["report"], sidecar["self_test"]
        made.append(
            {"tower": tower, "precision": "fp16", "engine": built.key, "made": built.new, "report": report,
             "self_test": test}
        )  # fmt: skip
        stage(f"{built.key}{'' if built.new else ', up to date'}")
        if not args.json:
            _print_report(report, test)
    return made


def _print_report(report: dict[str, Any], test: dict[str, Any] | None) -> None:
    from jinaclip_engines.tensorrt.build_report import Report

    for line in Report(**report).lines():
        print(f"  {line}", file=sys.stderr)
    tested = (
        "not run: this machine has no GPU for it" if test is None else f"passed, relative error {test['ratio']:.2g}"
    )
    print(f"  self-test: {tested}", file=sys.stderr)
