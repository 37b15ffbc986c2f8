"""A checkpoint by its hub id: what it costs and under which licence it comes is said before it is fetched."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from jinaclip_export.errors import CheckpointError

PUBLISHED_ID = "jinaai/jina-clip-v2"
# The revision this exporter was written to; its weights file has the sha256 below.
PUBLISHED_REVISION = "e10d47f5691d0454a0fb5d13f46f2199b74cb436"
PUBLISHED_SHA256 = "eff4c0a13ab4de71a9927a56968fef44e626920ff935e503f1bd3e6ec797062d"
PUBLISHED_LICENCE = "CC BY-NC 4.0"
FILES = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def fetch(model_id: str, revision: str | None) -> Path:
    """Directory of a hub checkpoint, downloaded unless the hub client's cache has it.

    Raises:
        CheckpointError: it cannot be had: offline, gated, no such model or revision.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read once, by the import
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if revision is None and model_id == PUBLISHED_ID:
        revision = PUBLISHED_REVISION
    if not sys.stderr.isatty():
        disable_progress_bars()
    # Its warnings of every retry would stand between our two lines; what ends the download is told below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    where = f"{model_id} at {revision or 'its newest revision'}"
    with suppress(Exception):  # not in the cache, whatever the client calls that
        cached = Path(snapshot_download(model_id, revision=revision, allow_patterns=list(FILES), local_files_only=True))
        if all((cached / name).is_file() for name in FILES[:4]):  # the client takes a part for the whole
            return cached
    if not HF_HUB_OFFLINE:
        licence = f"licence {PUBLISHED_LICENCE} (no commercial use), 1.7 GB" if model_id == PUBLISHED_ID else (
            "its own licence and size apply: see its page"
        )  # fmt: skip
        print(f"jinaclip: downloading {where}: {licence}", file=sys.stderr)
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the client raises its own, requests' and OSError
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"cannot download {where}: {type(error).__name__}: {reason}; check the network, the id and "
            "(for a gated model) your login, or name a directory that holds the checkpoint"
        ) from error
