"""BERT (arXiv 1810.04805) in the text tower, and in transformers as its reference.

The text tower has rotary positions, BERT has learned ones. The learned positions are added to the embeddings, and the
rotary tables are set to an angle of zero, which rotates nothing. Everything else is the same network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from jinaclip_export.towers.config import TextConfig
from jinaclip_export.towers.text import TextTower
from tests.support.references import import_references

Reference = Callable[[Tensor], Tensor]  # ids [B, T] or pixels [B, 3, S, S] -> raw vectors [B, D]

# Name in BERT -> name in the text tower, inside a block. Queries, keys and values are one layer of the tower.
BLOCK = {
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "norm2",
}


class BertTower(TextTower):
    """The text tower with learned positions in place of rotary ones.

    Args:
        config: settings of the text tower. `max_tokens` is the number of learned positions.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.position_embeddings = nn.Parameter(torch.zeros(config.max_tokens, config.hidden_size))
        self.cos = torch.ones_like(self.cos)
        self.sin = torch.zeros_like(self.sin)

    def hidden(self, ids: Tensor) -> Tensor:
        T = ids.shape[1]
        keep = ids != self.config.pad_token_id  # [B, T]
        mask = keep[:, None, None, :].expand(-1, 1, T, -1)  # [B, 1, T, T]
        positions = torch.arange(T, device=ids.device).expand_as(ids)
        embeddings = self.word_embeddings(ids) + self.type_embeddings.weight[0] + self.position_embeddings[:T]
        x = self.norm(embeddings)
        for block in self.blocks:
            x = block(x, mask, self.cos, self.sin, positions)
        return x  # type: ignore[no-any-return]


def bert_tower(weights: Mapping[str, Tensor], config: TextConfig) -> BertTower:
    """A tower with the weights of a BERT model, by their names in transformers' BertModel."""
    state = {
        "word_embeddings.weight": weights["embeddings.word_embeddings.weight"],
        "type_embeddings.weight": weights["embeddings.token_type_embeddings.weight"],
        "position_embeddings": weights["embeddings.position_embeddings.weight"],
    }
    for part in ("weight", "bias"):
        state[f"norm.{part}"] = weights[f"embeddings.LayerNorm.{part}"]
        for block in range(config.num_hidden_layers):
            theirs, ours = f"encoder.layer.{block}.", f"blocks.{block}."
            three = [weights[f"{theirs}attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            state[f"{ours}qkv.{part}"] = torch.cat(three)
            state |= {f"{ours}{name}.{part}": weights[f"{theirs}{layer}.{part}"] for layer, name in BLOCK.items()}
    tower = BertTower(config)
    tower.load_state_dict(state, strict=True)
    return tower.eval().requires_grad_(False)


def bert_reference(weights: Mapping[str, Tensor], config: TextConfig) -> Reference:
    """transformers' BertModel with the same weights, without fused attention, and with mean pooling."""
    import_references()  # makes `transformers` importable
    from transformers import BertConfig, BertModel

    settings = BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_tokens,
        type_vocab_size=config.type_vocab_size,
        layer_norm_eps=config.layer_norm_eps,
        pad_token_id=config.pad_token_id,
        hidden_act="gelu",
    )
    settings._attn_implementation = "eager"
    model: Any = BertModel(settings, add_pooling_layer=False)
    model.eval()
    model.load_state_dict(dict(weights), strict=True)

    def reference(ids: Tensor) -> Tensor:
        keep = (ids != config.pad_token_id).long()
        hidden = model(input_ids=ids, attention_mask=keep).last_hidden_state
        return (hidden * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)  # type: ignore[no-any-return]

    return reference
