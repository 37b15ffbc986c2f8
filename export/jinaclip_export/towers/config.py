"""Read the published configuration of jina-clip-v2 into dataclasses.

config.json has only the settings that differ from the base text model (jina-embeddings-v3), so the base model's
defaults are defined here. A setting that this exporter does not implement raises an error with its name; ignoring it
would give wrong vectors without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from jinaclip_export.errors import CheckpointError

PUBLISHED_MATRYOSHKA = (32, 64, 128, 256, 512, 768, 1024)


@dataclass(frozen=True)
class TextConfig:
    """Settings of XLM-RoBERTa with rotary positions. The defaults are those of jina-embeddings-v3."""

    vocab_size: int = 250002
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    max_position_embeddings: int = 8194
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    rotary_emb_base: float = 20000.0
    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 2
    lora_adaptations: tuple[str, ...] = ()
    lora_rank: int = 4
    lora_alpha: float = 1.0
    default_lora_task: str | None = None
    default_instruction_task: str | None = None
    task_instructions: Mapping[str, str] = field(default_factory=dict)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def max_tokens(self) -> int:
        """Longest text in tokens, `<s>` and `</s>` included. RoBERTa does not use two of its positions."""
        return self.max_position_embeddings - 2


@dataclass(frozen=True)
class ImageConfig:
    """Settings of EVA02 with sub-LayerNorm, SwiGLU and 2-D rotary positions."""

    width: int = 1024
    layers: int = 24
    head_width: int = 64
    mlp_ratio: float = 2.6667
    image_size: int = 512
    patch_size: int = 14
    pt_hw_seq_len: int = 16
    layer_norm_eps: ClassVar[float] = 1e-6  # the published configuration does not state it

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @property
    def hidden_size(self) -> int:
        """Width of the SwiGLU layer."""
        return int(self.width * self.mlp_ratio)

    @property
    def grid(self) -> int:
        """Patches along one side. Pixels beyond the last whole patch are not used."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class ModelConfig:
    text: TextConfig
    image: ImageConfig
    dim: int
    matryoshka_dimensions: tuple[int, ...]
    logit_scale_init_value: float


# Allowed values of settings that this exporter does not vary; other values change the network.
_TEXT_SECTION_FIXED: dict[str, tuple[Any, ...]] = {"pooler_type": ("mean_pooler",), "proj_type": (None,)}
_TEXT_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("rotary",),
    "type_vocab_size": (1,),
    "lora_main_params_trainable": (False, True),  # training only
    "load_trained_adapters": (False,),  # True would download weights that are not in the checkpoint
    "use_flash_attn": (True, False, None),  # selects an implementation; the result is the same
}
_IMAGE_FIXED: dict[str, tuple[Any, ...]] = {
    "qkv_bias": (True,),
    "rope_embeddings": (True,),
    "intp_freq": (True,),
    "naive_swiglu": (True,),
    "subln": (True,),
    "post_norm": (False, None),
    "ls_init_value": (None,),
    "proj_type": (None,),
}


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig from the content of a published `config.json`.

    Raises:
        CheckpointError: the configuration is not of type jina_clip, or a setting has the wrong type or a value that
            this exporter does not implement. The message names the setting.
    """
    if config.get("model_type") != "jina_clip":
        raise CheckpointError(
            f"config.json has model_type {config.get('model_type')!r}, expected 'jina_clip'; "
            "this exporter reads checkpoints in the layout of jina-clip-v2"
        )
    text, image = (_section(config, name) for name in ("text_config", "vision_config"))
    if config.get("add_projections"):
        raise _unsupported("add_projections", True, (False,))
    result = ModelConfig(
        text=_text(text),
        image=_image(image),
        dim=_number(config, "projection_dim", int, 1024),
        matryoshka_dimensions=_dims(config),
        logit_scale_init_value=_number(config, "logit_scale_init_value", float, 2.6592),
    )
    for name, found in (("text hidden_size", result.text.hidden_size), ("vision width", result.image.width)):
        if found != result.dim:
            raise CheckpointError(
                f"config.json: {name} is {found} but projection_dim is {result.dim}; the towers have no "
                "projection, so the three must be equal"
            )
    return result


def _text(section: Mapping[str, Any]) -> TextConfig:
    _check_fixed("text_config", section, _TEXT_SECTION_FIXED)
    base = section.get("hf_model_name_or_path", "jinaai/jina-embeddings-v3")
    if "jina-embeddings-v3" not in str(base) and "xlm-roberta-flash" not in str(base):
        raise _unsupported("text_config.hf_model_name_or_path", base, ("jinaai/jina-embeddings-v3",))
    overlay = _section(section, "hf_model_config_kwargs", default={})
    _check_fixed("text_config.hf_model_config_kwargs", overlay, _TEXT_FIXED)
    adaptations = overlay.get("lora_adaptations") or ()
    if not isinstance(adaptations, (list, tuple)) or not all(isinstance(a, str) for a in adaptations):
        raise CheckpointError(f"config.json: lora_adaptations is {adaptations!r}, expected a list of names")
    instructions = overlay.get("task_instructions") or {}
    if not isinstance(instructions, Mapping) or not all(isinstance(v, str) for v in instructions.values()):
        raise CheckpointError(f"config.json: task_instructions is {instructions!r}, expected names and sentences")
    default_task = section.get("default_instruction_task")
    if default_task is not None and default_task not in instructions:
        raise CheckpointError(
            f"config.json: default_instruction_task {default_task!r} is not among task_instructions "
            f"({', '.join(instructions) or 'none'})"
        )
    result = TextConfig(
        **_numbers(overlay, TextConfig),
        lora_adaptations=tuple(adaptations),
        default_lora_task=section.get("default_lora_task"),
        default_instruction_task=default_task,
        task_instructions=dict(instructions),
    )
    _check_embed_dim("text", section, "hidden_size", result.hidden_size)
    _check_heads("text", result.hidden_size, result.num_attention_heads)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if not 0 <= getattr(result, name) < result.vocab_size:
            raise CheckpointError(
                f"config.json: {name} {getattr(result, name)} is outside the vocabulary of {result.vocab_size}"
            )
    if result.max_tokens < 8:
        raise CheckpointError(
            f"config.json: max_position_embeddings is {result.max_position_embeddings}, expected at least 10"
        )
    return result


def _image(section: Mapping[str, Any]) -> ImageConfig:
    _check_fixed("vision_config", section, _IMAGE_FIXED)
    result = ImageConfig(**_numbers(section, ImageConfig))
    _check_embed_dim("vision", section, "width", result.width)
    _check_heads("vision", result.width, result.heads, multiple=4)
    if result.width % result.head_width:
        raise CheckpointError(f"config.json: vision width {result.width} is not a multiple of head_width")
    if result.grid < 1:
        raise CheckpointError(
            f"config.json: image_size {result.image_size} is smaller than patch_size {result.patch_size}"
        )
    return result


def _check_fixed(name: str, section: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, allowed in fixed.items():
        if section.get(key, allowed[0]) not in allowed:
            raise _unsupported(f"{name}.{key}", section[key], allowed)


def _check_embed_dim(tower: str, section: Mapping[str, Any], width_name: str, width: int) -> None:
    if section.get("embed_dim", width) != width:
        raise CheckpointError(
            f"config.json: {tower} embed_dim is {section['embed_dim']} but {width_name} is {width}; "
            "the tower has no projection, so they must be equal"
        )


def _check_heads(tower: str, width: int, heads: int, multiple: int = 2) -> None:
    if heads < 1 or width % heads or (width // heads) % multiple:
        raise CheckpointError(
            f"config.json: {tower} width {width} cannot be divided into {heads} heads whose size is a "
            f"multiple of {multiple}, as rotary positions require"
        )


def _dims(config: Mapping[str, Any]) -> tuple[int, ...]:
    full = _number(config, "projection_dim", int, 1024)
    found = config.get("matryoshka_dimensions") or [d for d in PUBLISHED_MATRYOSHKA if d <= full]
    if not isinstance(found, list) or not all(isinstance(d, int) and 0 < d <= full for d in found):
        raise CheckpointError(f"config.json: matryoshka_dimensions is {found!r}, expected whole numbers up to {full}")
    return tuple(sorted({*found, full}))


def _section(config: Mapping[str, Any], name: str, default: Any = None) -> Mapping[str, Any]:
    section = config.get(name, default)
    if not isinstance(section, Mapping):
        raise CheckpointError(f"config.json has no {name} object; expected the published jina-clip-v2 file")
    return section


def _numbers(section: Mapping[str, Any], config: type[TextConfig] | type[ImageConfig]) -> dict[str, Any]:
    """The settings of a section that are int or float fields of a dataclass."""
    kinds = {"int": int, "float": float}  # annotations are strings
    found = [field for field in fields(config) if field.type in kinds and field.name in section]
    return {field.name: _number(section, field.name, kinds[str(field.type)], None) for field in found}


def _number(section: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = section.get(name, default)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18  # no NaN, no infinity
    zero = name.endswith("_token_id")
    signed = name == "logit_scale_init_value"
    if not good or (kind is int and value != int(value)) or not (value > 0 or (zero and value == 0) or signed):
        raise CheckpointError(f"config.json: {name} is {value!r:.80}, expected a positive number")
    return kind(value)


def _unsupported(name: str, found: Any, allowed: tuple[Any, ...]) -> CheckpointError:
    return CheckpointError(
        f"config.json: {name} is {found!r}; this exporter implements only "
        f"{' or '.join(repr(a) for a in allowed)}, as published for jina-clip-v2"
    )
