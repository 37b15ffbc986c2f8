"""The two towers again, from public libraries: what an exported tower is compared with.

Text is `transformers.JinaEmbeddingsV3Model`, image is `timm.models.eva.Eva`, fed from a checkpoint directory
of the published layout (config.json, model.safetensors in float16 or float32). Nothing here comes from
jinaclip_export, and attention is eager in both (matmul, softmax, matmul), so neither a shared mistake nor a
fused kernel can hide a difference. float32 on the CPU, no network.
"""

import importlib.util
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

Floats = NDArray[np.float32]
TextReference = Callable[[NDArray[np.int64]], Floats]  # input_ids [B, T] -> raw vectors [B, D]
ImageReference = Callable[[Floats], Floats]  # normalised pixel_values [B, 3, S, S] -> raw vectors [B, D]
Tensors = dict[str, torch.Tensor]

# Same name and, but for the rotary base, same default in transformers and in jina-embeddings-v3.
TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "type_vocab_size",
    "max_position_embeddings",
    "layer_norm_eps",
    "hidden_act",
    "pad_token_id",
)
TEXT_NAMES = (  # regular expression over the checkpoint's name -> transformers' name
    (r"^encoder\.layers", "layers"),
    (r"^emb_ln\.", "embeddings.LayerNorm."),
    (r"\.mixer\.out_proj\.", ".self_attn.o_proj."),
    (r"\.norm1\.", ".post_attention_layernorm."),
    (r"\.norm2\.", ".post_mlp_layernorm."),
)
IMAGE_NAMES = (  # regular expression over the checkpoint's name -> timm's name
    (r"\.attn\.([qv])_bias$", r".attn.\1_proj.bias"),
    (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


def import_references() -> tuple[Any, Any, Any]:
    """Eva, JinaEmbeddingsV3Config and JinaEmbeddingsV3Model, whether or not torchvision's operators load."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _declare_torchvision_ops()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is ", DeprecationWarning)  # Python 3.14
        warnings.filterwarnings("ignore", "Failed to load image Python extension", UserWarning)  # torchvision
        from timm.models.eva import Eva
        from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model
    return Eva, JinaEmbeddingsV3Config, JinaEmbeddingsV3Model


def text_reference(checkpoint: Path, adaptation: str | None = None) -> TextReference:
    """The text tower with the adapter of `adaptation` merged; None takes `default_lora_task`."""
    _, text_config, text_model = import_references()
    text = _config(checkpoint)["text_config"]
    _require(text, off=("proj_type",))
    overlay = text["hf_model_config_kwargs"]

    config = text_config(
        **{key: overlay[key] for key in TEXT_SIZES if key in overlay},
        rope_parameters={"rope_type": "default", "rope_theta": float(overlay.get("rotary_emb_base", 20000))},
        attn_implementation="eager",
    )
    model = text_model(config, add_pooling_layer=False).eval()
    index = overlay["lora_adaptations"].index(adaptation or text["default_lora_task"])
    scale = overlay["lora_alpha"] / overlay["lora_rank"]
    tensors = _merge_adapter(_tensors(checkpoint, "text_model.transformer.roberta."), index, scale)
    model.load_state_dict(_split_qkv(_rename(tensors, TEXT_NAMES)), assign=True)

    @torch.inference_mode()
    def encode(input_ids: NDArray[np.int64]) -> Floats:
        ids = torch.tensor(input_ids)
        mask = ids != config.pad_token_id
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        kept = mask.unsqueeze(-1)  # [B, T, 1]
        vectors: Floats = ((hidden * kept).sum(dim=1) / kept.sum(dim=1)).numpy()
        return vectors

    return encode


def image_reference(checkpoint: Path) -> ImageReference:
    """The image tower. A size that the patch does not divide leaves its last rows and columns unread."""
    eva, *_ = import_references()
    vision = _config(checkpoint)["vision_config"]
    _require(
        vision,
        on=("qkv_bias", "rope_embeddings", "naive_swiglu", "subln", "intp_freq"),
        off=("post_norm", "ls_init_value", "proj_type"),
    )
    model = eva(
        img_size=vision["image_size"],
        patch_size=vision["patch_size"],
        num_classes=0,
        global_pool="token",  # after the final norm
        embed_dim=vision["width"],
        depth=vision["layers"],
        num_heads=vision["width"] // vision["head_width"],
        mlp_ratio=vision["mlp_ratio"],
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        ref_feat_shape=vision["pt_hw_seq_len"],  # `intp_freq`: positions j/grid * pt_hw_seq_len
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    ).eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    model.load_state_dict(_rename(_tensors(checkpoint, "vision_model."), IMAGE_NAMES), assign=True)

    @torch.inference_mode()
    def encode(pixel_values: Floats) -> Floats:
        vectors: Floats = model(torch.tensor(pixel_values)).numpy()
        return vectors

    return encode


def unit(x: Floats) -> Floats:
    """Rows divided by their L2 norm."""
    rows: Floats = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return rows


def _declare_torchvision_ops() -> None:
    """Declare what torchvision's import asks for where its binary, a CUDA build, does not load."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))  # type: ignore[no-untyped-call]
    except OSError:
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)


def _config(checkpoint: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    _require(config, off=("add_projections",))
    return config


def _require(section: dict[str, Any], on: Iterable[str] = (), off: Iterable[str] = ()) -> None:
    other = [key for key in on if not section.get(key)] + [key for key in off if section.get(key)]
    if other:
        raise ValueError(f"the references cover the published architecture only, not this {', '.join(other)}")


def _tensors(checkpoint: Path, prefix: str) -> Tensors:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        # copied, because what get_tensor gives may be a view of a file that a test writes again
        return {name.removeprefix(prefix): x.to(torch.float32, copy=True) for name, x in read.items()}


def _merge_adapter(tensors: Tensors, index: int, scale: float) -> Tensors:
    """W + scale·B·A for a Linear, W + scale·A·B for an embedding, under the plain name of the weight."""
    merged = {name: tensor for name, tensor in tensors.items() if ".parametrizations." not in name}
    for name in tensors:
        if name.endswith(".parametrizations.weight.original"):
            stem = name.removesuffix(".original")
            a, b = tensors[f"{stem}.0.lora_A"][index], tensors[f"{stem}.0.lora_B"][index]
            update = a @ b if name.startswith("embeddings.") else b @ a
            merged[stem.replace(".parametrizations", "")] = tensors[name] + scale * update
    return merged


def _split_qkv(tensors: Tensors) -> Tensors:
    for name in [name for name in tensors if ".mixer.Wqkv." in name]:
        for letter, part in zip("qkv", tensors.pop(name).chunk(3), strict=True):  # [3h, ...] -> 3 × [h, ...]
            tensors[name.replace(".mixer.Wqkv.", f".self_attn.{letter}_proj.")] = part
    return tensors


def _rename(tensors: Tensors, table: Iterable[tuple[str, str]]) -> Tensors:
    for pattern, replacement in table:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors
