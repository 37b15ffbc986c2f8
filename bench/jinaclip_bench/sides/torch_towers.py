"""Towers written for torch on a GPU: with operators that torch.compile can optimise, and for texts without padding.

The exporter's towers use `torch.onnx.ops.rotary_embedding`, which torch.compile cannot optimise and which is slow to
launch. The towers here use the exporter's modules and weights; tests/bench/test_bench_gpu.py compares their vectors
with the exporter's.

Symbols: B rows, T tokens, N tokens of all rows together, D width, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jinaclip.bundle.manifest import Bundle
from jinaclip_export.towers.image import ImageBlock, ImageTower
from jinaclip_export.towers.text import TextBlock, TextTower

# queries, keys, values [N, H, K]; offsets of the rows [B + 1] int32; tokens of the longest row -> [N, H, K]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def mean_and_std(bundle: Bundle, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of the bundle's preprocessing, each [3, 1, 1] float32."""
    preprocessing = bundle.preprocessing
    mean, std = torch.tensor([preprocessing.mean, preprocessing.std], device=device)[..., None, None]
    return mean, std


class ImagesOfPixels(nn.Module):
    """Pixels [B, S, S, 3] uint8 -> raw vectors [B, D] float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: ImageTower, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("mean", mean)  # [3, 1, 1] float32
        self.register_buffer("std", std)

    def forward(self, pixels: Tensor) -> Tensor:
        tower = self.tower
        scaled = (pixels.permute(0, 3, 1, 2).float() / 255.0 - self.mean) / self.std  # [B, 3, S, S]
        x = tower.patch_embed(scaled.to(tower.pos_embed.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat((tower.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + tower.pos_embed  # [B, T, D]
        for block in tower.blocks:
            assert isinstance(block, ImageBlock)
            x = _image_block(block, x, tower.cos, tower.sin)
        vectors: Tensor = tower.norm(x[:, 0]).float()
        return vectors


class TextsOfIds(nn.Module):
    """ids [B, T] int64, and whether some are padding -> raw vectors [B, D] float32, as in the publisher's code."""

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor, padded: bool) -> Tensor:
        tower = self.tower
        is_token = ids != tower.config.pad_token_id  # [B, T]
        mask = is_token[:, None, None, :] if padded else None
        cos, sin = tower.cos[: ids.shape[1]], tower.sin[: ids.shape[1]]
        x = tower.norm(tower.word_embeddings(ids) + tower.type_embeddings.weight[0])  # [B, T, D]
        for block in tower.blocks:
            assert isinstance(block, TextBlock)
            q, k, v = (_heads(t, block.heads) for t in block.qkv(x).chunk(3, dim=-1))  # each [B, H, T, K]
            q, k = (rotate(t, cos, sin) for t in (q, k))
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
            x = _after_attention(block, x, attended)
        weights = is_token[..., None].float()
        vectors: Tensor = (x.float() * weights).sum(1) / weights.sum(1)
        return vectors


class TextsWithoutPadding(nn.Module):
    """Concatenated texts -> raw vectors [B, D] float32. Rotary positions restart in each text.

    Args:
        tower: the text tower.
        attention: attention within each text; see `without_padding`.
    """

    def __init__(self, tower: TextTower, attention: Attention) -> None:
        super().__init__()
        self.tower, self.attention = tower, attention

    def forward(self, ids: Tensor, positions: Tensor, rows: Tensor, offsets: Tensor, longest: int) -> Tensor:
        """ids, positions in the text and indexes of the text, each int64 [N]; offsets of the texts int32 [B + 1]."""
        tower = self.tower
        cos, sin = tower.cos[positions][:, None], tower.sin[positions][:, None]  # [N, 1, K/2]
        x = tower.norm(tower.word_embeddings(ids) + tower.type_embeddings.weight[0])  # [N, D]
        for block in tower.blocks:
            assert isinstance(block, TextBlock)
            q, k, v = (t.view(len(x), block.heads, -1) for t in block.qkv(x).chunk(3, dim=-1))  # each [N, H, K]
            q, k = (rotate(t, cos, sin) for t in (q, k))
            x = _after_attention(block, x, self.attention(q, k, v, offsets, longest).flatten(1))
        sums = x.new_zeros((len(offsets) - 1, x.shape[1]), dtype=torch.float32).index_add_(0, rows, x.float())
        vectors: Tensor = sums / offsets.diff()[:, None]
        return vectors


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Flash attention over rows of different lengths. It needs a GPU and torch 2.10 or later."""
    from torch.nn.attention.varlen import varlen_attn

    attended = varlen_attn(q, k, v, offsets, offsets, longest, longest)
    assert isinstance(attended, Tensor)
    return attended


def jagged_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """The same with nested jagged tensors. It works in older versions and on a CPU, with more work on the host."""
    rows = offsets.long()
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(t.contiguous(), rows, min_seqlen=1, max_seqlen=longest).transpose(1, 2)
        for t in (q, k, v)
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()


def without_padding() -> Attention:
    """The fastest attention without padding that this torch version has for a GPU."""
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError:
        return jagged_attention
    return varlen_attention


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate pairs (i, i + K/2) of x [..., K], or (2i, 2i + 1) if interleaved, by cos and sin [..., K/2]."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


def _image_block(block: ImageBlock, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = block.norm1(x)
    q, k, v = (_heads(project(y), block.heads) for project in (block.q, block.k, block.v))  # each [B, H, T, K]
    q, k = (rotate(t, cos, sin, interleaved=True) for t in (q, k))
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + block.out(block.inner_norm(attended))
    y = block.norm2(x)
    result: Tensor = x + block.down(block.ffn_norm(F.silu(block.gate(y)) * block.up(y)))
    return result


def _after_attention(block: TextBlock, x: Tensor, attended: Tensor) -> Tensor:
    x = block.norm1(x + block.out(attended))
    result: Tensor = block.norm2(x + block.fc2(F.gelu(block.fc1(x))))
    return result


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)  # [B, T, D] -> [B, H, T, K]
