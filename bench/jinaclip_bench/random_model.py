"""A random model to measure when there is no bundle: made once, kept in the user's cache.

Speed does not depend on the values of the weights, so random ones of the published shape stand in for the
published ones, which nobody has to download or accept a licence for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from jinaclip.bundle import Bundle
from jinaclip_bench.cache import Cached, exporter
from jinaclip_bench.torch_side import matching_checkpoint
from jinaclip_engines.prepare import prepare
from jinaclip_export.checkpoint import Checkpoint
from jinaclip_export.random_checkpoint import SIZES, published_config, write_random_checkpoint
from jinaclip_export.write import Identity, export_bundle

PRECISIONS = ("fp32", "int8")
_DISK_GB = {"small": 0.2, "full": 14.0}
_COST = {"small": "some seconds", "full": "about 9 GB of memory, some minutes"}


def random_model(size: str, *, seed: int = 0, tell: Callable[[str], None]) -> tuple[Bundle, Checkpoint]:
    """The cached random model, made if it is not there, is damaged or is another exporter's.

    Args:
        size: "small" or "full".
        tell: called with a sentence before anything that takes long.

    Raises:
        BenchError: the disk is too small for it.
    """
    return cached_model(size, seed).get(tell)


def cached_model(size: str, seed: int = 0) -> Cached[tuple[Bundle, Checkpoint]]:
    """The random model as the cache keeps it."""

    def make(directory: Path) -> None:
        write_random_checkpoint(directory / "checkpoint", published_config(**SIZES[size]), seed=seed)
        identity = Identity(f"random-{size}", f"seed-{seed}", "none: random weights")
        checkpoint = Checkpoint(directory / "checkpoint")
        export_bundle(checkpoint, directory / "bundle", identity=identity, precisions=PRECISIONS)
        bundle = Bundle(directory / "bundle")
        for tower in bundle.towers:
            for precision in PRECISIONS:
                prepare(bundle, tower, precision)

    torch_version = version("torch").partition("+")[0]
    return Cached(
        name=f"random-{size}-seed{seed}-jinaclip{version('jinaclip')}-torch{torch_version}",
        what=f"random {size} model",
        gb=_DISK_GB[size],
        cost=_COST[size],
        maker=exporter(),
        make=make,
        open=_open,
    )


def _open(directory: Path) -> tuple[Bundle, Checkpoint]:
    bundle = Bundle(directory / "bundle")
    return bundle, matching_checkpoint(bundle, directory / "checkpoint")
