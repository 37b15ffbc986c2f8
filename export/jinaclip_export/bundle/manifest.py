"""The sections of bundle.json. docs/bundle.md describes the format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch

from jinaclip.bundle.files import file_sha256
from jinaclip.bundle.manifest import FORMAT, FORMAT_VERSION, MANIFEST
from jinaclip.errors import BundleError
from jinaclip.preprocessing.image import ImagePreprocessing
from jinaclip_export.bundle.source import Source
from jinaclip_export.checkpoint.hub import PUBLISHED_ID, PUBLISHED_LICENCE, PUBLISHED_SHA256
from jinaclip_export.errors import CheckpointError
from jinaclip_export.onnx_export.graphs import OPSET
from jinaclip_export.towers.config import ImageConfig, TextConfig


@dataclass(frozen=True)
class Identity:
    """Name, revision and licence of the model that a bundle was made from."""

    model_id: str
    revision: str | None = None
    licence: str | None = None


def new_manifest(source: Source, identity: Identity) -> dict[str, Any]:
    """A manifest with the sections common to both towers. The towers' own sections are empty.

    Raises:
        CheckpointError: preprocessor_config.json is invalid, or does not match this checkpoint.
    """
    weights = source.weights_sha256()
    published = weights == PUBLISHED_SHA256
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": {
            "id": PUBLISHED_ID if published else identity.model_id,
            "revision": identity.revision,
            "licence": PUBLISHED_LICENCE if published else identity.licence,
            "weights_sha256": weights,
            "adaptation": source.adaptation,
        },
        "created_by": {
            "jinaclip": version("jinaclip"),
            "torch": torch.__version__.partition("+")[0],
            "onnx": onnx.__version__,
            "opset": OPSET,
        },
        "dims": list(source.config.matryoshka_dimensions),
        "logit_scale": source.logit_scale,
        # These two are written even if their tower is not exported, because the provenance covers the whole model.
        "tokenizer_sha256": file_sha256(source.file("tokenizer.json")),
        "image": read_preprocessing(source).to_manifest(),
        "towers": {},
        "goldens": {},
        "parity": {},
        "precisions": {},
    }


def add_text(manifest: dict[str, Any], config: TextConfig) -> None:
    """Add the text tower, without its graphs, and its tokenizer."""
    manifest["towers"]["text"] = {
        "input": {"name": "input_ids", "dtype": "int64", "shape": ["batch", "tokens"]},
        "outputs": ["text_embeddings", "l2norm_text_embeddings"],
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "hidden_size": config.intermediate_size,
        "graphs": {},
    }
    manifest["text"] = {
        "tokenizer": "tokenizer.json",
        "vocab_size": config.vocab_size,
        "special_ids": special_ids(config),
        "max_tokens": config.max_tokens,
        "tasks": dict(config.task_instructions),
        "default_task": config.default_instruction_task,
    }


def add_image(manifest: dict[str, Any], config: ImageConfig, pixels: str) -> None:
    """Add the image tower, without its graphs.

    Args:
        pixels: input type of its graphs, "uint8" or "float32".
    """
    size = config.image_size
    shape = ["batch", size, size, 3] if pixels == "uint8" else ["batch", 3, size, size]
    manifest["towers"]["image"] = {
        "input": {"name": "pixel_values", "dtype": pixels, "shape": shape},
        "outputs": ["image_embeddings", "l2norm_image_embeddings"],
        "layers": config.layers,
        "width": config.width,
        "heads": config.heads,
        "hidden_size": config.hidden_size,
        "graphs": {},
    }


def special_ids(config: TextConfig) -> dict[str, int]:
    """Ids of the tokens that a tokenizer puts around a text (bos, eos) and after it (pad)."""
    return {"bos": config.bos_token_id, "pad": config.pad_token_id, "eos": config.eos_token_id}


def read_preprocessing(source: Source) -> ImagePreprocessing:
    """Read preprocessor_config.json.

    Raises:
        CheckpointError: the file is invalid, or does not match this checkpoint.
    """
    try:
        preprocessing = ImagePreprocessing.from_manifest(source.read_json("preprocessor_config.json"))
    except BundleError as error:
        raise CheckpointError(f"preprocessor_config.json: {error}") from error
    size = source.config.image.image_size
    if preprocessing.size != size:
        raise CheckpointError(
            f"preprocessor_config.json has size {preprocessing.size}, config.json has image_size {size}; "
            "expected both files from the same checkpoint"
        )
    return preprocessing


def listed(path: Path) -> dict[str, Any]:
    """A file's entry under "files"."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write bundle.json."""
    (directory / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8")
