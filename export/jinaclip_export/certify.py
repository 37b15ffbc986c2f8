"""Measure the accuracy of each precision of a bundle on real inputs, and write its certificates.

Every precision is compared with the bundle's fp32 graphs. fp32 itself is compared with torch, if --against is given.
A certificate that passed lets precision="auto" use that precision on machines with the same CPU or GPU and library
version. With the TensorRT backend the fp32 graphs run in ONNX Runtime. The table of results is printed on stderr. The
exit status is 1 if a bound was missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinaclip.backends.base import Backend
from jinaclip.backends.onnxruntime.backend import OnnxRuntimeCpu, OnnxRuntimeCuda
from jinaclip.backends.onnxruntime.cuda_provider import cuda_problem
from jinaclip.backends.selection import BACKENDS, choose_backend
from jinaclip.bundle.certificates import note_name
from jinaclip.bundle.manifest import PRECISION_CLASS, TOWERS, Bundle
from jinaclip.cli.arguments import words_of
from jinaclip.errors import BackendMissing, BundleError, InputError
from jinaclip_export.certification.inputs import Items, built_in_images, built_in_texts, images_of, texts_of
from jinaclip_export.certification.measure import (
    Measurement,
    Vectors,
    certificate,
    run_graph,
    try_graph,
    with_other_towers,
    without_duplicates,
)
from jinaclip_export.certification.table import render
from jinaclip_export.errors import CertificationError

if TYPE_CHECKING:
    from jinaclip_export.certification.torch_reference import TorchReference

EXTRA = "certify"
PLOTS = (".png", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="directory made by `jinaclip export`")
    parser.add_argument("--against", metavar="CHECKPOINT", help="directory that the bundle was exported from")
    parser.add_argument("--images", metavar="DIR", help="images to measure on (default: 246 generated and public ones)")
    parser.add_argument("--texts", metavar="FILE", help="texts, one per line (default: 1230 in 26 languages)")
    precisions = "fp32, fp16, int8 (default: every precision of the bundle)"
    parser.add_argument("--precision", type=words_of(tuple(PRECISION_CLASS)), help=precisions)
    parser.add_argument("--towers", type=words_of(TOWERS), help="text, image (default: those of the bundle)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="backend that runs the graphs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="number of cores (default: all that this process may use)")
    parser.add_argument("--cache", metavar="DIR", help="directory for the certificates when the bundle is read-only")
    parser.add_argument("--plot", metavar="FILE", help="plot the distribution of the cosines, .png or .svg")
    parser.add_argument("--json", action="store_true", help="print the certificates on stdout")


def run(args: argparse.Namespace) -> int:
    bundle = Bundle(args.bundle, args.cache)
    towers = args.towers or tuple(bundle.towers)
    backend = choose_backend(bundle, towers, backend=args.backend, device=args.device, precision=_one_precision(args))
    precisions = args.precision or tuple(
        p for p in PRECISION_CLASS if any(p in backend.precisions(bundle, t) for t in towers)
    )
    _check(args, bundle, towers, precisions)
    draw = _plotter(args, precisions)
    torch_reference = _torch_reference(args, bundle)
    items = {tower: without_duplicates(bundle, tower, _items(args, tower)) for tower in towers}
    fp32_backend = _fp32_backend(backend)
    fp32 = {tower: run_graph(bundle, tower, items[tower], "fp32", fp32_backend, args.threads) for tower in towers}
    measurements: list[Measurement] = []
    certificates: list[dict[str, Any]] = []
    for precision in precisions:
        if precision != "fp32":
            found = {
                tower: try_graph(bundle, tower, items[tower], precision, backend, args.threads)
                for tower in towers
                if precision in backend.precisions(bundle, tower)
            }
            measurement = Measurement(precision, found, {tower: vectors.alone for tower, vectors in fp32.items()})
        elif torch_reference is None:
            measurement = Measurement("fp32", fp32, {})
        else:
            references = {tower: torch_reference.vectors(tower, items[tower]) for tower in towers}
            measurement = Measurement("fp32", fp32, references, torch_reference.name)
        session = _session_of(measurement, backend)
        fresh = certificate(bundle, measurement, items, backend, session)
        if not bundle.write_note(note_name(precision, session), with_other_towers(fresh, bundle, backend)):
            raise BundleError(f"cannot write the {precision} certificate of {args.bundle}; check the free disk space")
        measurements.append(measurement)
        certificates.append(fresh)
    print(render(certificates), file=sys.stderr)
    draw(measurements)
    if args.json:
        print(json.dumps(certificates, ensure_ascii=False))
    _raise_if_failed(certificates)
    return 0


def _raise_if_failed(certificates: Sequence[Mapping[str, Any]]) -> None:
    failures = [
        f"{certificate['precision']} {tower}: {reason}"
        for certificate in certificates
        for tower, entry in certificate["towers"].items()
        if entry["verdict"] == "failed"
        for reason in entry["reasons"]
    ]
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise CertificationError(f"{failures[0]}{more}; precision=auto does not use a precision that failed")


def _session_of(measurement: Measurement, backend: Backend) -> Mapping[str, Any]:
    """Description of the session that ran a precision; the backend's facts if no graph could be run."""
    ran = (vectors.session for vectors in measurement.found.values() if isinstance(vectors, Vectors))
    return next(ran, backend.facts())


def _fp32_backend(backend: Backend) -> Backend:
    """Backend for the fp32 reference: ONNX Runtime, on the same device if it can use it."""
    if backend.name == OnnxRuntimeCpu.name or backend.gpu is None:
        return backend
    return OnnxRuntimeCpu() if cuda_problem() else OnnxRuntimeCuda(backend.gpu)


def _one_precision(args: argparse.Namespace) -> Mapping[str, str]:
    """The single requested precision of each tower, from which backend "auto" is chosen; empty if there are several."""
    return dict.fromkeys(TOWERS, args.precision[0]) if args.precision and len(args.precision) == 1 else {}


def _check(args: argparse.Namespace, bundle: Bundle, towers: tuple[str, ...], precisions: tuple[str, ...]) -> None:
    """Validate the arguments before the long measurement starts."""
    if args.threads is not None and args.threads < 1:
        args.usage_error(f"--threads is {args.threads}, expected a whole number from 1")
    for tower in towers:
        bundle.graph(tower, "fp32")  # the reference of every other precision
    for precision in precisions:
        if not any(precision in bundle.tower(tower).graphs for tower in towers):
            bundle.graph(towers[0], precision)  # raises an error that lists the available precisions
    for name, tower in (("texts", "text"), ("images", "image")):
        if getattr(args, name) and tower not in towers:
            args.usage_error(f"--{name} is for the {tower} tower, which is not measured; remove it or change --towers")
    if not bundle.can_write_notes():
        raise BundleError(f"{args.cache or args.bundle} is not writable; choose another directory with --cache DIR")


def _items(args: argparse.Namespace, tower: str) -> Items:
    if tower == "text":
        return texts_of(args.texts) if args.texts else built_in_texts()
    return images_of(args.images) if args.images else built_in_images()


def _torch_reference(args: argparse.Namespace, bundle: Bundle) -> TorchReference | None:
    if not args.against:
        return None
    try:
        from jinaclip_export.certification.torch_reference import TorchReference
    except ImportError as error:
        raise BackendMissing(f"--against needs {error.name}; run: pip install 'jinaclip[export]'") from error
    return TorchReference(args.against, bundle, args.threads)


def _plotter(args: argparse.Namespace, precisions: tuple[str, ...]) -> Callable[[Sequence[Measurement]], None]:
    """Function that draws --plot. The file name and the plotting library are checked before the long measurement."""
    if not args.plot:
        return lambda measurements: None
    path = Path(args.plot)
    if path.suffix.lower() not in PLOTS:
        args.usage_error(f"--plot {args.plot}: expected a name that ends in {' or '.join(PLOTS)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {args.plot}: the directory does not exist; create it first")
    if precisions == ("fp32",) and not args.against:
        args.usage_error("--plot: fp32 alone has no reference to compare with; add --against CHECKPOINT")
    from jinaclip_export.certification.plot import draw

    return lambda measurements: draw(path, measurements)
