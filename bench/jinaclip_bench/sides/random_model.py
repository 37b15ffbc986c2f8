"""A random model to measure without a bundle. It is generated once and stored in the user's cache.

Speed does not depend on the values of the weights. Random weights of the published shape need no download and no
licence.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from jinaclip.bundle.manifest import Bundle
from jinaclip_bench.measuring.cache import Cached, exporter
from jinaclip_bench.sides.torch_cpu import matching_checkpoint
from jinaclip_engines.onnxruntime.prepare import prepare
from jinaclip_export.bundle.manifest import Identity
from jinaclip_export.bundle.writer import export_bundle
from jinaclip_export.checkpoint.random_weights import SIZES, published_config, write_random_checkpoint
from jinaclip_export.checkpoint.reader import Checkpoint

# Precisions to export and prepare, by device.
PRECISIONS = {"cpu": ("fp32", "int8"), "cuda": ("fp16",)}
_DISK_GB = {"small": 0.2, "full": 14.0}
_COST = {"small": "some seconds", "full": "about 9 GB of memory, some minutes"}


def random_model(
    size: str, *, seed: int = 0, device: str = "cpu", tell: Callable[[str], None]
) -> tuple[Bundle, Checkpoint]:
    """The cached random model. It is generated if it is missing, damaged or written by other code of the exporter.

    Args:
        size: "small" or "full".
        seed: random seed of the weights.
        device: device to measure it on, "cpu" or "cuda".
        tell: function that receives a message before a slow step.

    Raises:
        BenchError: there is not enough free disk space.
    """
    return cached_model(size, seed, device).get(tell)


def cached_model(size: str, seed: int = 0, device: str = "cpu") -> Cached[tuple[Bundle, Checkpoint]]:
    """The cache entry of the random model."""

    def make(directory: Path) -> None:
        write_random_checkpoint(directory / "checkpoint", published_config(**SIZES[size]), seed=seed)
        identity = Identity(f"random-{size}", f"seed-{seed}", "none: random weights")
        checkpoint = Checkpoint(directory / "checkpoint")
        export_bundle(checkpoint, directory / "bundle", identity=identity, precisions=PRECISIONS[device])
        bundle = Bundle(directory / "bundle")
        for tower in bundle.towers:
            for precision in PRECISIONS[device]:
                prepare(bundle, tower, precision, device)

    torch_version = version("torch").partition("+")[0]
    of_device = "" if device == "cpu" else f"-{device}"
    return Cached(
        name=f"random-{size}-seed{seed}-jinaclip{version('jinaclip')}-torch{torch_version}{of_device}",
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
