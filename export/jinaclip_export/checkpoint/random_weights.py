"""Seeded random checkpoints in the published layout, for tests, benchmarks and the demo.

Torch's default initialisation is not usable here: its vectors hardly depend on the input (reversing a sentence gives a
cosine of 0.9999), so a graph without rotary positions or mask would pass any comparison. The scales below make the
towers sensitive: different inputs, and a sentence in reverse order, get clearly different vectors. At the same time,
rounding weights and activations to int8 changes a vector only a little, at any depth. docs/decisions/003 has the
figures; tests/export/test_parity.py and tests/export/test_certify.py check them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from jinaclip_export.checkpoint.random_tokenizer import random_tokenizer
from jinaclip_export.checkpoint.reader import WEIGHTS, image_shapes, text_shapes
from jinaclip_export.errors import ExportError
from jinaclip_export.towers.config import PUBLISHED_MATRYOSHKA, read_config

_SMALL_TEXT = {
    "vocab_size": 36864,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 512,
}
_SMALL_VISION = {"width": 128, "layers": 3, "image_size": 140}
SIZES: dict[str, dict[str, Any]] = {
    "small": {"projection_dim": 128, "text": _SMALL_TEXT, "vision": _SMALL_VISION},
    "full": {"projection_dim": 1024, "text": {}, "vision": {}},
}


_PUBLISHED_VISION = {
    "layers": 24,
    "head_width": 64,
    "mlp_ratio": 2.6667,
    "image_size": 512,
    "patch_size": 14,
    "qkv_bias": True,
    "rope_embeddings": True,
    "pt_hw_seq_len": 16,
    "intp_freq": True,
    "naive_swiglu": True,
    "subln": True,
    "post_norm": False,
    "ls_init_value": None,
    "proj_type": None,
    "patch_dropout": 0.1,
    "x_attention": True,
    "fused_layer_norm": False,
}


def published_config(
    projection_dim: int = 1024, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Content of a config.json in the published format.

    Args:
        projection_dim: width of both towers and length of the vectors.
        text: settings that override those of hf_model_config_kwargs.
        vision: settings that override those of vision_config.
    """
    return {
        "model_type": "jina_clip",
        "architectures": ["JinaCLIPModel"],
        "add_projections": False,
        "projection_dim": projection_dim,
        "logit_scale_init_value": 2.6592,
        "matryoshka_dimensions": [d for d in PUBLISHED_MATRYOSHKA if d <= projection_dim],
        "truncate_dim": None,
        "text_config": {
            "model_type": "jina_clip_text",
            "embed_dim": projection_dim,
            "pooler_type": "mean_pooler",
            "proj_type": None,
            "default_lora_task": "retrieval.query",
            "default_instruction_task": None,
            "hf_model_name_or_path": "jinaai/jina-embeddings-v3",
            "hf_model_config_kwargs": {
                "load_trained_adapters": False,
                "lora_adaptations": ["retrieval.query"],
                "lora_alpha": 4,
                "lora_dropout_p": 0.0,
                "lora_main_params_trainable": False,
                "lora_rank": 4,
                "task_instructions": {"retrieval.query": "Represent the query for retrieving evidence documents: "},
                "use_flash_attn": True,
            }
            | (text or {}),
        },
        "vision_config": {
            "model_type": "jina_clip_vision",
            "embed_dim": projection_dim,
            "width": projection_dim,
            **_PUBLISHED_VISION,
        }
        | (vision or {}),
    }


def published_preprocessing(image_size: int) -> dict[str, Any]:
    """Content of a preprocessor_config.json in the published format."""
    return {
        "size": image_size,
        "resize_mode": "shortest",
        "interpolation": "bicubic",
        "fill_color": 0,
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    }


def write_random_checkpoint(
    directory: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
) -> None:
    """Write a checkpoint directory with random weights.

    Args:
        directory: output directory, created if needed. Existing files of the same names are overwritten.
        config: content of config.json, for instance from `published_config`.
        seed: random seed. The same seed, configuration, torch version and device type give the same bytes.
        tokenizer: a tokenizer.json to copy; None generates one whose ids fill the vocabulary.
        dtype: stored type of the weights; the published file is float16.
        device: device that draws the weights. Another type of device draws different weights.

    Raises:
        ExportError: `tokenizer` is not a file.
        CheckpointError: `config` is invalid.
    """
    model = read_config(config)
    directory.mkdir(parents=True, exist_ok=True)
    shapes = text_shapes(model.text) | image_shapes(model.image)
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {name: _random(name, shape, generator).to(dtype) for name, shape in shapes.items()}
    tensors["logit_scale"] = torch.tensor(model.logit_scale_init_value, dtype=dtype)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    del tensors
    (directory / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    preprocessing = json.dumps(published_preprocessing(model.image.image_size), indent=2)
    (directory / "preprocessor_config.json").write_text(preprocessing, "utf-8")
    if tokenizer is None:
        (directory / "tokenizer.json").write_text(random_tokenizer(model.text.vocab_size), "utf-8")
    elif tokenizer.is_file():
        shutil.copyfile(tokenizer, directory / "tokenizer.json")
    else:
        raise ExportError(f"{tokenizer} is not a file; expected a tokenizer.json")


# Standard deviation of each kind of tensor, by the end of its name; `fan` is its input width. LayerNorm gives every
# projection inputs of unit variance, so gain / sqrt(fan) makes a projection's output about `gain` at every width. Each
# block adds little to the residual stream, so rounding errors do not grow with depth.
_STANDARD_DEVIATION: tuple[tuple[str, Callable[[int], float]], ...] = (
    ("word_embeddings.parametrizations.weight.original", lambda fan: 1.0),
    ("word_embeddings.weight", lambda fan: 1.0),
    ("lora_A", lambda fan: 1.0 / math.sqrt(fan)),
    ("lora_B", lambda fan: 0.1),
    ("q_proj.weight", lambda fan: 1.0 / math.sqrt(fan)),
    ("k_proj.weight", lambda fan: 1.0 / math.sqrt(fan)),
    ("patch_embed.proj.weight", lambda fan: 2.0 / math.sqrt(fan)),
    ("pos_embed", lambda fan: 0.5),
    ("cls_token", lambda fan: 0.5),
    ("attn.q_bias", lambda fan: 2.0),
    ("bias", lambda fan: 0.02),
    ("", lambda fan: 1.0 / math.sqrt(fan)),
)
_CONTENT = 0.7  # text: gain of queries and keys
_POSITION = 2.0  # text: standard deviation of their biases


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator, device=generator.device)
    layer = name.removesuffix(".parametrizations.weight.original").removesuffix(".weight").removesuffix(".bias")
    if layer.endswith(("norm", "norm1", "norm2", "_ln")):
        return 1.0 + 0.1 * noise if name.endswith(".weight") else 0.02 * noise
    fan = math.prod(shape[1:]) if len(shape) != 3 else shape[-1]
    weight = noise.mul_(next(rule(fan) for end, rule in _STANDARD_DEVIATION if name.endswith(end)))
    if "token_type_embeddings" in name:
        weight *= 0.1  # one vector added to every token makes all texts alike
    if layer.endswith("mixer.Wqkv"):
        # After the rotary embedding, the biases of queries and keys make each head attend to tokens at certain
        # distances, as trained heads do. The vector then depends on word order, without attention so sharp that
        # rounding changes the result.
        keys = 2 * shape[0] // 3
        weight[:keys] *= _CONTENT if len(shape) == 2 else _POSITION / 0.02
    elif layer.endswith("mlp.fc2") and len(shape) == 2:
        # GELU's outputs have a positive mean, which would add the same vector to every token.
        weight = 0.3 * (weight - weight.mean(1, keepdim=True))
    return weight
