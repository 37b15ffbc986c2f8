"""A random model to measure without a bundle. It is generated once and stored in the user's cache.

Speed does not depend on the values of the weights. Random weights of the published shape need no download and no
licence.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from jinaclip.bundle.manifest import Bundle
from jinaclip_bench.measuring.cache import CacheEntry, sources_digest
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


def cached_model(size: str, *, seed: int = 0, device: str = "cpu") -> CacheEntry[tuple[Bundle, Checkpoint]]:
    """The cache entry of a random model. It is out of date if other code of the exporter has written it.

    Args:
        size: "small" or "full".
        seed: random seed of the weights.
        device: device to measure it on, "cpu" or "cuda".
    """

    def generate(directory: Path) -> None:
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
    return CacheEntry(
        name=f"random-{size}-seed{seed}-jinaclip{version('jinaclip')}-torch{torch_version}{of_device}",
        description=f"random {size} model",
        disk_gb=_DISK_GB[size],
        cost=_COST[size],
        digest=sources_digest(),
        generate=generate,
        read=_read,
    )


def _read(directory: Path) -> tuple[Bundle, Checkpoint]:
    bundle = Bundle(directory / "bundle")
    return bundle, matching_checkpoint(bundle, directory / "checkpoint")
