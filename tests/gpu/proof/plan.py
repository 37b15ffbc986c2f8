"""The parts of the two passes, in the order they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One process of a pass.

    Attributes:
        name: for --parts and the results.
        run: "module:function" of tests.gpu.proof; the function takes a Context.
        limit: seconds after which it is stopped.
        least: seconds that parts before it leave to it; with less it is skipped.
        beside: it runs beside the parts that follow, until one that names it in `after`, or to its own end.
        after: parts beside that are waited for, up to `least` seconds each, and then stopped.
    """

    name: str
    run: str
    limit: float
    least: float
    beside: bool = False
    after: Sequence[str] = ()


_WARM = ("warm-image", "warm-text")
_SANITIZER = ("memcheck", "racecheck", "synccheck")
_AFTER_SANITIZER = tuple(f"sanitizer-{tool}" for tool in _SANITIZER)
_MACHINE = Part("machine", "machine:run", limit=40, least=5)
_WEIGHTS = Part("weights", "weights:run", limit=100, least=30)

PASSES: dict[str, tuple[Part, ...]] = {
    "first": (
        _MACHINE,
        Part("warm-image", "fast:warm_image", limit=200, least=20, beside=True),
        Part("warm-text", "fast:warm_text", limit=200, least=20, beside=True),
        Part("smoke", "smoke:run", limit=60, least=10),
        Part("operators", "operators:run", limit=60, least=5),
        _WEIGHTS,
        Part("right", "right:run", limit=70, least=25),
        Part("fast-image-32", "fast:image_32", limit=60, least=20, after=_WARM),
        Part("fast-mix", "fast:mix", limit=100, least=40),
        Part("fast-text-1", "fast:text_1", limit=40, least=12),
        Part("fast-image-1", "fast:image_1", limit=40, least=12),
        Part("kernels-image-32", "kernels:image_32", limit=30, least=10),
        Part("kernels-text-1", "kernels:text_1", limit=20, least=8),
    ),
    "second": (
        _MACHINE,
        Part("operators", "operators:run", limit=90, least=5),
        *(Part(f"sanitizer-{tool}", f"operators:{tool}", limit=120, least=0, beside=True) for tool in _SANITIZER),
        Part("weights", "weights:run_if_missing", limit=100, least=30),
        Part("study-kernels", "study:kernels", limit=40, least=10),
        Part("study-packing", "study:packing", limit=30, least=10),
        Part("study-early-launch", "study:without_early_launch", limit=20, least=5),
        Part("study-sizes", "study:sizes", limit=40, least=10),
        Part("variants-image-32", "variants:image_32", limit=60, least=20, after=_AFTER_SANITIZER),
        Part("variants-text", "variants:text", limit=60, least=20),
        Part("autotune-image-32", "fast:autotune", limit=120, least=60),
        Part("kernels-image-32", "kernels:image_32", limit=30, least=10),
    ),
}
BUDGET = {"first": 330.0, "second": 300.0}
