"""The text tower of jina-clip-v2: XLM-RoBERTa with rotary positions, post-norm, mean-pooled.

References: XLM-RoBERTa (arXiv 1911.02116), RoFormer's rotary positions (arXiv 2104.09864),
jina-embeddings-v3 (arXiv 2409.10173), jina-clip-v2 (arXiv 2412.08802).

Symbols: B texts, T tokens (padding included), D width, H heads, K head size, F feed-forward width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import rotary_embedding

from jinaclip_export.towers.config import TextConfig


class TextTower(nn.Module):
    """ids [B, T] int64 -> raw text embeddings [B, D] float32. Padding is recognised by its token id."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.num_hidden_layers))
        cos, sin = rotary_table(config.max_tokens, config.head_size, config.rotary_emb_base)
        self.register_buffer("cos", cos, persistent=False)  # [max_tokens, K/2]
        self.register_buffer("sin", sin, persistent=False)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> last hidden state [B, T, D]. Rows of padding tokens have no meaning."""
        T = ids.shape[1]
        keep = ids != self.config.pad_token_id  # [B, T]
        mask = keep[:, None, None, :].expand(-1, 1, T, -1)  # [B, 1, T, T], True = attend
        positions = torch.arange(T, device=ids.device).expand_as(ids)  # [B, T], from the left
        x = self.norm(self.word_embeddings(ids) + self.type_embeddings.weight[0])  # [B, T, D]
        for block in self.blocks:
            x = block(x, mask, self.cos, self.sin, positions)
        return x  # type: ignore[no-any-return]

    def forward(self, ids: Tensor) -> Tensor:
        keep = (ids != self.config.pad_token_id).to(torch.float32)[..., None]  # [B, T, 1]
        return (self.hidden(ids).float() * keep).sum(1) / keep.sum(1)  # [B, D]


class TextBlock(nn.Module):
    """Post-norm: x = LN(x + attention(x)); x = LN(x + mlp(x))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.norm1 = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(D, F_)
        self.fc2 = nn.Linear(F_, D)
        self.norm2 = nn.LayerNorm(D, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (self._heads(t) for t in self.qkv(x).chunk(3, dim=-1))  # each [B, H, T, K]
        q, k = (rotary_embedding(t, cos, sin, positions) for t in (q, k))  # on pairs (i, i + K/2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [B, H, T, K]
        attended = attended.transpose(1, 2).flatten(2)  # [B, T, D]
        x = self.norm1(x + self.out(attended))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))  # type: ignore[no-any-return]  # [B, T, D]

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # [B, T, D] -> [B, H, T, K]


def rotary_table(positions: int, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position · base^(-2i/K), each [positions, K/2], computed in float64."""
    frequency = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu") / head_size)  # [K/2]
    angle = torch.arange(positions, dtype=torch.float64, device="cpu")[:, None] * frequency  # [positions, K/2]
    return angle.cos().float(), angle.sin().float()
