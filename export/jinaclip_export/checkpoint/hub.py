"""Download a checkpoint by its hub id. Its size and licence are printed before the download starts."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from jinaclip_export.errors import CheckpointError

PUBLISHED_ID = "jinaai/jina-clip-v2"
# The revision this exporter was written for. Its weights file has the SHA-256 below.
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
    """Directory of a hub checkpoint. It is downloaded unless it is in the hub client's cache.

    Raises:
        CheckpointError: the download failed: offline, gated model, unknown model or revision.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read once, when huggingface_hub is imported
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if revision is None and model_id == PUBLISHED_ID:
        revision = PUBLISHED_REVISION
    if not sys.stderr.isatty():
        disable_progress_bars()
    # Hide the client's warning for each retry. The error that ends the download is reported below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    where = f"{model_id} at {revision or 'its newest revision'}"
    with suppress(Exception):  # the client raises several exception types if the model is not in its cache
        cached = Path(snapshot_download(model_id, revision=revision, allow_patterns=list(FILES), local_files_only=True))
        if all((cached / name).is_file() for name in FILES[:4]):  # the client also returns incomplete snapshots
            return cached
    if not HF_HUB_OFFLINE:
        terms = "see the model's page for its licence and size"
        if model_id == PUBLISHED_ID:
            terms = f"licence {PUBLISHED_LICENCE} (no commercial use), 1.7 GB"
        print(f"jinaclip: downloading {where}: {terms}", file=sys.stderr)
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the client raises its own exceptions, those of requests, and OSError
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"cannot download {where}: {type(error).__name__}: {reason}; check the network, the id and "
            "(for a gated model) your login, or pass a directory that holds the checkpoint"
        ) from error
