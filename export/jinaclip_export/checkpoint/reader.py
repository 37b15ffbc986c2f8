"""Read a checkpoint in the published layout: safetensors and JSON, no remote code.

The adapter (LoRA) is always active in this model, so it is merged into the weights once, in float32:
W + scale · B·A for a Linear, W + scale · A·B for an embedding, with scale = alpha / rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jinaclip.bundle.files import file_sha256
from jinaclip_export.errors import CheckpointError
from jinaclip_export.towers.config import ImageConfig, ModelConfig, TextConfig, read_config
from jinaclip_export.towers.image import ImageTower
from jinaclip_export.towers.text import TextTower

Tower = TypeVar("Tower", TextTower, ImageTower)
WEIGHTS = "model.safetensors"
_ROBERTA = "text_model.transformer.roberta."
_FLOATS = {"F16", "BF16", "F32"}

# Published name -> name in jinaclip_export.towers, inside a block. Each Linear of the text tower has an adapter.
_TEXT_LINEARS = {"mixer.Wqkv": "qkv", "mixer.out_proj": "out", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
_IMAGE_BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.q_proj.weight": "q.weight",
    "attn.q_bias": "q.bias",
    "attn.k_proj.weight": "k.weight",
    "attn.v_proj.weight": "v.weight",
    "attn.v_bias": "v.bias",
    "attn.inner_attn_ln.weight": "inner_norm.weight",
    "attn.inner_attn_ln.bias": "inner_norm.bias",
    "attn.proj.weight": "out.weight",
    "attn.proj.bias": "out.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.w1.weight": "gate.weight",
    "mlp.w1.bias": "gate.bias",
    "mlp.w2.weight": "up.weight",
    "mlp.w2.bias": "up.bias",
    "mlp.ffn_ln.weight": "ffn_norm.weight",
    "mlp.ffn_ln.bias": "ffn_norm.bias",
    "mlp.w3.weight": "down.weight",
    "mlp.w3.bias": "down.bias",
}


def text_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every published text tensor."""
    h, f, n, r = config.hidden_size, config.intermediate_size, len(config.lora_adaptations), config.lora_rank
    shapes: dict[str, tuple[int, ...]] = {}

    def weight(name: str, rows: int, columns: int, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        if n:
            shapes[f"{name}.parametrizations.weight.original"] = (rows, columns)
            shapes[f"{name}.parametrizations.weight.0.lora_A"] = a
            shapes[f"{name}.parametrizations.weight.0.lora_B"] = b
        else:
            shapes[f"{name}.weight"] = (rows, columns)

    for name, rows in (("word", config.vocab_size), ("token_type", config.type_vocab_size)):
        weight(f"{_ROBERTA}embeddings.{name}_embeddings", rows, h, (n, rows, r), (n, r, h))
    shapes |= {f"{_ROBERTA}emb_ln.{part}": (h,) for part in ("weight", "bias")}
    sizes = {"mixer.Wqkv": (3 * h, h), "mixer.out_proj": (h, h), "mlp.fc1": (f, h), "mlp.fc2": (h, f)}
    for block in range(config.num_hidden_layers):
        prefix = f"{_ROBERTA}encoder.layers.{block}."
        for name, (out, inner) in sizes.items():
            weight(prefix + name, out, inner, (n, r, inner), (n, out, r))
            shapes[f"{prefix}{name}.bias"] = (out,)
        shapes |= {f"{prefix}{norm}.{part}": (h,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    return shapes


def image_shapes(config: ImageConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every published image tensor."""
    h, f, p = config.width, config.hidden_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, h),
        "pos_embed": (1, config.grid**2 + 1, h),
        "patch_embed.proj.weight": (h, 3, p, p),
        "patch_embed.proj.bias": (h,),
        "norm.weight": (h,),
        "norm.bias": (h,),
    }
    matrices = {"mlp.w1": (f, h), "mlp.w2": (f, h), "mlp.w3": (h, f)}
    for block in range(config.layers):
        for name in _IMAGE_BLOCK:
            layer, _, part = name.rpartition(".")
            if layer in matrices:
                shape = matrices[layer] if part == "weight" else matrices[layer][:1]
            elif layer.startswith("attn.") and layer.endswith("proj") and part == "weight":
                shape = (h, h)
            else:
                shape = (f,) if layer == "mlp.ffn_ln" else (h,)
            shapes[f"blocks.{block}.{name}"] = shape
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


class Checkpoint:
    """An opened checkpoint directory.

    Args:
        directory: directory with config.json, model.safetensors, preprocessor_config.json and tokenizer.json.
        adaptation: adapter to merge, one of the configuration's `lora_adaptations`; None selects the checkpoint's
            default. It must be None for a checkpoint without adapters.

    Raises:
        CheckpointError: the checkpoint is invalid. The message names the file, setting or tensor, the value found and
            the value expected.
    """

    def __init__(self, directory: Path, adaptation: str | None = None) -> None:
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory; expected a jina-clip-v2 checkpoint")
        self.directory = directory
        self.config: ModelConfig = read_config(self.read_json("config.json"))
        self.adaptation, self._adapter = self._choose_adapter(adaptation)
        path = self.file(WEIGHTS)
        with path.open("rb") as file:
            if file.read(8) == b"version ":
                raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` there")
        try:
            self._tensors = cast(Any, safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
        self._names = set(self._tensors.keys())
        if stray := {n for n in self._names if not n.startswith(("text_model.", "vision_model.", "logit_scale"))}:
            raise CheckpointError(
                f"{path} has unknown tensors: {', '.join(sorted(stray)[:3])}; expected only logit_scale, text_model.* "
                "and vision_model.*"
            )

    def file(self, name: str) -> Path:
        """Path of a file of the checkpoint. Raises CheckpointError if the file does not exist."""
        path = self.directory / name
        if not path.is_file():
            found = sorted(p.name for p in self.directory.iterdir())[:8]
            raise CheckpointError(
                f"{self.directory} has no {name} (it has: {', '.join(found) or 'nothing'}); "
                "expected the files of a jina-clip-v2 checkpoint"
            )
        return path

    def read_json(self, name: str) -> dict[str, Any]:
        """One of the checkpoint's JSON files, as an object."""
        try:
            value = json.loads(self.file(name).read_text("utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise CheckpointError(f"{self.directory / name} is not readable JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.directory / name} holds a {type(value).__name__}, expected an object")
        return value

    def weights_sha256(self) -> str:
        """SHA-256 of the weights file, in hex. A bundle's manifest records it."""
        return file_sha256(self.file(WEIGHTS))

    @property
    def logit_scale(self) -> float:
        """Logarithm of the learned factor from cosine to logit."""
        return float(self._read("logit_scale", ()))

    def check(self, towers: Iterable[str]) -> None:
        """Check the name, shape and type of every tensor of these towers, without reading the values."""
        if "text" in towers:
            self._check("text_model.", text_shapes(self.config.text))
        if "image" in towers:
            self._check("vision_model.", image_shapes(self.config.image))
        self._check_shape("logit_scale", ())

    def text_tower(self) -> TextTower:
        """The text tower in float32 with the adapter merged."""
        return self._tower("text", lambda: TextTower(self.config.text), self._text_state(self.config.text))

    def image_tower(self) -> ImageTower:
        """The image tower in float32."""
        return self._tower("image", lambda: ImageTower(self.config.image), self._image_state(self.config.image))

    def _tower(self, name: str, make: Callable[[], Tower], state: Iterator[tuple[str, Tensor]]) -> Tower:
        self.check([name])
        with torch.device("meta"):
            tower = make()
        tower.load_state_dict(dict(state), strict=True, assign=True)
        return tower.eval().requires_grad_(False)

    def _choose_adapter(self, asked: str | None) -> tuple[str | None, int]:
        text = self.config.text
        known = text.lora_adaptations
        chosen = asked or text.default_lora_task or (known[0] if len(known) == 1 else None)
        if not known:
            if asked:
                raise CheckpointError(f"adaptation {asked!r} was requested, but the checkpoint has no adapters")
            return None, 0
        if chosen not in known:
            what = "no default adaptation" if chosen is None else f"no adaptation {chosen!r}"
            raise CheckpointError(f"the checkpoint has {what}; it has {', '.join(known)}: choose one with --adaptation")
        return chosen, known.index(chosen)

    def _check(self, prefix: str, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Check the tensor names of one tower, then the shapes. One error lists the missing or unknown names."""
        found = {name for name in self._names if name.startswith(prefix) and ".rope." not in name}
        for problem, names in (("lacks", expected.keys() - found), ("has unknown", found - expected.keys())):
            if names:
                listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise CheckpointError(
                    f"{self.directory / WEIGHTS} {problem} tensors: {listed}; expected the {len(expected)} "
                    f"{prefix[:-1]} tensors that config.json describes"
                )
        for name, shape in expected.items():
            self._check_shape(name, shape)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._names:
            raise CheckpointError(f"{self.directory / WEIGHTS} lacks tensor {name}")
        piece = self._tensors.get_slice(name)
        found = tuple(piece.get_shape())
        if found != shape:
            raise CheckpointError(f"tensor {name} has shape {list(found)}, expected {list(shape)} from config.json")
        if piece.get_dtype() not in _FLOATS:
            raise CheckpointError(f"tensor {name} is {piece.get_dtype()}, expected one of {sorted(_FLOATS)}")

    def _read(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        if shape is not None:
            self._check_shape(name, shape)
        tensor: Tensor = self._tensors.get_tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"tensor {name} holds NaN or infinity; the checkpoint is damaged")
        return tensor.float()

    def _merged(self, name: str, *, embedding: bool = False) -> Tensor:
        if not self.config.text.lora_adaptations:
            return self._read(f"{name}.weight")
        base = f"{name}.parametrizations.weight."
        weight = self._read(base + "original")
        a = self._read(base + "0.lora_A")[self._adapter]
        b = self._read(base + "0.lora_B")[self._adapter]
        first, second = (a, b) if embedding else (b, a)
        scale = self.config.text.lora_alpha / self.config.text.lora_rank
        return weight.addmm_(first, second, alpha=scale)

    def _text_state(self, config: TextConfig) -> Iterator[tuple[str, Tensor]]:
        yield "word_embeddings.weight", self._merged(f"{_ROBERTA}embeddings.word_embeddings", embedding=True)
        yield "type_embeddings.weight", self._merged(f"{_ROBERTA}embeddings.token_type_embeddings", embedding=True)
        for part in ("weight", "bias"):
            yield f"norm.{part}", self._read(f"{_ROBERTA}emb_ln.{part}")
        for block in range(config.num_hidden_layers):
            theirs, ours = f"{_ROBERTA}encoder.layers.{block}.", f"blocks.{block}."
            for name, linear in _TEXT_LINEARS.items():
                yield f"{ours}{linear}.weight", self._merged(theirs + name)
                yield f"{ours}{linear}.bias", self._read(f"{theirs}{name}.bias")
            for norm in ("norm1", "norm2"):
                for part in ("weight", "bias"):
                    yield f"{ours}{norm}.{part}", self._read(f"{theirs}{norm}.{part}")

    def _image_state(self, config: ImageConfig) -> Iterator[tuple[str, Tensor]]:
        names = {n: n for n in ("cls_token", "pos_embed", "norm.weight", "norm.bias")}
        names |= {f"patch_embed.proj.{part}": f"patch_embed.{part}" for part in ("weight", "bias")}
        for block in range(config.layers):
            names |= {f"blocks.{block}.{t}": f"blocks.{block}.{o}" for t, o in _IMAGE_BLOCK.items()}
        for theirs, ours in names.items():
            yield ours, self._read(f"vision_model.{theirs}")
