"""Prove what each precision of a bundle costs on real inputs, and write its certificates.

Every precision is compared with the bundle's fp32 graphs, fp32 itself with torch's (--against). A certificate
that passed lets precision="auto" take that precision on machines with the same CPU and library version. The
table is for people, on stderr; the exit status is 1 if a bound was missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.bundle import PRECISION_CLASS, TOWERS, Bundle
from jinaclip.certificates import note_name
from jinaclip.errors import BackendMissing, BundleError, InputError
from jinaclip.progress import say
from jinaclip_export.certify_inputs import built_in_images, built_in_texts, images_of, texts_of
from jinaclip_export.certify_measure import TowerInputs, Vectors, certificate, run_graph, try_graph, with_other_towers
from jinaclip_export.cli import words_of
from jinaclip_export.errors import CertificationError

EXTRA = "certify"
PLOTS = (".png", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="directory made by `jinaclip export`")
    parser.add_argument("--against", metavar="CHECKPOINT", help="directory that the bundle was exported from")
    parser.add_argument("--images", metavar="DIR", help="measure on these (default: 144 crops of public photos)")
    parser.add_argument("--texts", metavar="FILE", help="one a line (default: 260 sentences in 26 languages)")
    parser.add_argument("--precision", type=words_of(tuple(PRECISION_CLASS)),
                        help="fp32, fp16, int8 (default: all that the bundle has)")  # fmt: skip
    parser.add_argument("--towers", type=words_of(TOWERS), help="text, image (default: those of the bundle)")
    parser.add_argument("--threads", type=int, help="cores to use (default: those this process may use)")
    parser.add_argument("--cache", metavar="DIR", help="for the certificates of a bundle that is read-only")
    parser.add_argument("--plot", metavar="FILE", help="distribution of the cosines, .png or .svg")
    parser.add_argument("--json", action="store_true", help="the certificates on stdout")


def run(args: argparse.Namespace) -> int:
    bundle = Bundle(args.bundle, args.cache)
    towers = args.towers or tuple(bundle.towers)
    precisions = args.precision or tuple(p for p in PRECISION_CLASS if any(_has(bundle, t, p) for t in towers))
    _check(args, bundle, towers, precisions)
    plot = _plotter(args, precisions)
    against = _against(args, bundle)
    inputs = {tower: TowerInputs(bundle, tower, _items(args, tower)) for tower in towers}
    fp32 = {tower: run_graph(inputs[tower], "fp32", args.threads) for tower in towers}
    session = next(iter(fp32.values())).session
    references = {tower: vectors.alone for tower, vectors in fp32.items()}
    done: list[dict[str, Any]] = []
    found: dict[str, dict[str, Vectors | str]] = {}
    compared_with: dict[str, dict[str, np.ndarray]] = {}
    for precision in precisions:
        if precision == "fp32":
            found[precision] = dict(fp32)
            compared_with[precision], name = against(inputs)
        else:
            measurable = [tower for tower in towers if _has(bundle, tower, precision)]
            found[precision] = {t: try_graph(inputs[t], precision, args.threads) for t in measurable}
            compared_with[precision], name = references, None
        fresh = certificate(
            bundle, precision, found[precision], compared_with[precision], inputs, session, reference_name=name
        )
        if not bundle.write_note(note_name(precision, session), with_other_towers(fresh, bundle)):
            raise BundleError(
                f"the certificate of {precision} cannot be written beside {args.bundle}; is the disk full?"
            )
        done.append(fresh)
    print(_table(done), file=sys.stderr)
    plot(found, compared_with, bundle.dims)
    if args.json:
        print(json.dumps(done, ensure_ascii=False))
    missed = [
        f"{c['precision']} {tower}: {reason}"
        for c in done
        for tower, entry in c["towers"].items()
        if entry["verdict"] == "failed"
        for reason in entry["reasons"]
    ]
    if missed:
        more = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
        raise CertificationError(f"{missed[0]}{more}; precision=auto will not take what failed")
    return 0


def _has(bundle: Bundle, tower: str, precision: str) -> bool:
    return precision in bundle.tower(tower).graphs


def _check(args: argparse.Namespace, bundle: Bundle, towers: tuple[str, ...], precisions: tuple[str, ...]) -> None:
    """Everything that can be refused before the long part."""
    if args.threads is not None and args.threads < 1:
        args.usage_error(f"--threads is {args.threads}, expected a whole number from 1")
    for tower in towers:
        bundle.graph(tower, "fp32")  # the reference of every other
    for precision in precisions:
        if not any(_has(bundle, tower, precision) for tower in towers):
            bundle.graph(towers[0], precision)  # says what there is
    for name, tower in (("texts", "text"), ("images", "image")):
        if getattr(args, name) and tower not in towers:
            args.usage_error(f"--{name} goes with the {tower} tower, which is not measured")
    if not bundle.can_write_notes():
        raise BundleError(f"{args.cache or args.bundle} cannot be written to; name another place with --cache DIR")


def _items(args: argparse.Namespace, tower: str) -> Any:
    if tower == "text":
        return texts_of(args.texts) if args.texts else built_in_texts()
    return images_of(args.images) if args.images else built_in_images()


def _against(args: argparse.Namespace, bundle: Bundle) -> Any:
    """Function from the inputs to torch's vectors of each tower and what they are of; both empty without --against."""
    if not args.against:
        return lambda inputs: ({}, None)
    try:
        import torch

        from jinaclip_export.certify_torch import REFERENCE, open_checkpoint, torch_vectors
    except ImportError as error:
        raise BackendMissing(f"--against needs {error.name}; run: pip install 'jinaclip[export]'") from error
    checkpoint = open_checkpoint(args.against, bundle)

    def measure(inputs: dict[str, TowerInputs]) -> tuple[dict[str, np.ndarray], str]:
        if args.threads:
            torch.set_num_threads(args.threads)
        vectors = {}
        for tower, rows in inputs.items():
            say(f"torch {tower}")
            vectors[tower] = torch_vectors(checkpoint, bundle, tower, (rows.row(i) for i in range(len(rows))))
        return vectors, REFERENCE

    return measure


def _plotter(args: argparse.Namespace, precisions: tuple[str, ...]) -> Any:
    """Function that draws what was found; its library and its file's place are looked at now."""
    if not args.plot:
        return lambda *_: None
    path = Path(args.plot)
    if path.suffix.lower() not in PLOTS:
        args.usage_error(f"--plot {args.plot}: expected a name that ends in {' or '.join(PLOTS)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--plot {args.plot}: its directory does not exist; make it first")
    if precisions == ("fp32",) and not args.against:
        args.usage_error("--plot: fp32 alone is compared with nothing; give --against CHECKPOINT")
    from jinaclip_export.certify_plot import draw

    return lambda found, compared_with, dims: draw(path, found, compared_with, dims)


def _table(certificates: list[dict[str, Any]]) -> str:
    """Every number for people: a line a dim, and the verdicts under them."""
    lines, verdicts = [], []
    head = ("", "dim", "cosine min", "1 %", "mean", "max abs", "error÷nearest", "median", "top 10", "across")
    for c in certificates:
        for tower, entry in c["towers"].items():
            name = f"{c['precision']} {tower}"
            for dim, n in entry.get("dims", {}).items():
                cosine, ratio, top10 = n["cosine"], n["error_ratio"], n["top10"]
                lines.append((
                    name, dim, f"{cosine['min']:.7f}", f"{cosine['p1']:.7f}", f"{cosine['mean']:.7f}",
                    f"{n['max_abs']:.1e}", f"{ratio['max']:.2g}", f"{ratio['median']:.2g}", f"{top10['within']:.3f}",
                    f"{top10['across']:.3f}" if "across" in top10 else "-",
                ))  # fmt: skip
            said = f"{name}: {entry['verdict']}; {entry['items']} items ({entry['source']})"
            if "batch" in entry:
                said += f"; beside an outlier: cosine {entry['batch']['cosine']:.8f}, max abs {entry['batch']['max_abs']:.1e}"
            if "known_answers" in entry:
                said += f"; known answers: off by {entry['known_answers']['max_error']:.1e}"
            verdicts += [said, *(f"  {reason}" for reason in entry["reasons"])]
    if not lines:
        return "\n".join(verdicts)
    widths = [max(len(row[i]) for row in (head, *lines)) for i in range(len(head))]
    rows = ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in (head, *lines)]  # fmt: skip
    return "\n".join([*rows, "", *verdicts])
