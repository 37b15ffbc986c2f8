"""The image tower of jina-clip-v2: EVA02 with sub-LayerNorm and 2-D rotary positions, pre-norm, CLS-pooled.

References: EVA-02 (arXiv 2303.11331), EVA-CLIP (arXiv 2303.15389), GLU variants (arXiv 2002.05202).

Symbols: B images, S image size in px, P patches = grid², N = P + 1 tokens (CLS first), D width, H heads,
K head size, F SwiGLU width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import rotary_embedding

from jinaclip_export.towers.config import ImageConfig


class ImageTower(nn.Module):
    """Normalised pixels [B, 3, S, S] float32 -> raw image embeddings [B, D] float32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        D, patches = config.width, config.grid**2
        self.config = config
        self.patch_embed = nn.Conv2d(3, D, config.patch_size, stride=config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, D))
        self.blocks = nn.ModuleList(ImageBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(D, eps=config.layer_norm_eps)
        cos, sin = rotary_table_2d(config.grid, config.head_width, config.pt_hw_seq_len)
        self.register_buffer("cos", cos, persistent=False)  # [N, K/2]
        self.register_buffer("sin", sin, persistent=False)

    def hidden(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S] -> hidden state after the final norm [B, N, D]."""
        x = self.patches(pixels)  # [B, P, D]
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed  # [B, N, D]
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])  # [B, N], into the tables
        for block in self.blocks:
            x = block(x, self.cos, self.sin, positions)
        return self.norm(x)  # type: ignore[no-any-return]

    def patches(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, S, S] -> [B, P, D]: `patch_embed` as one matrix product.

        It does not use Conv, whose CUDA kernel in ONNX Runtime needs cuDNN.
        """
        grid, side = self.config.grid, self.config.patch_size
        used = pixels[:, :, : grid * side, : grid * side]
        x = used.reshape(-1, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)  # [B, grid, grid, 3, side, side]
        x = x.reshape(-1, grid * grid, 3 * side * side)
        return F.linear(x, self.patch_embed.weight.flatten(1), self.patch_embed.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.hidden(pixels)[:, 0].float()  # [B, D]


class ImageBlock(nn.Module):
    """Pre-norm: x += attention(norm1(x)); x += swiglu(norm2(x)); a LayerNorm before each last projection."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        D, F_, eps = config.width, config.hidden_size, config.layer_norm_eps
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(D, eps=eps)
        self.q = nn.Linear(D, D)
        self.k = nn.Linear(D, D, bias=False)
        self.v = nn.Linear(D, D)
        self.inner_norm = nn.LayerNorm(D, eps=eps)
        self.out = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=eps)
        self.gate = nn.Linear(D, F_)
        self.up = nn.Linear(D, F_)
        self.ffn_norm = nn.LayerNorm(F_, eps=eps)
        self.down = nn.Linear(F_, D)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (self._heads(project(y)) for project in (self.q, self.k, self.v))  # each [B, H, N, K]
        q, k = (rotary_embedding(t, cos, sin, positions, interleaved=True) for t in (q, k))  # on pairs (2i, 2i + 1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, N, D]
        x = x + self.out(self.inner_norm(attended))
        y = self.norm2(x)
        return x + self.down(self.ffn_norm(F.silu(self.gate(y)) * self.up(y)))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # [B, N, D] -> [B, H, N, K]


def rotary_table_2d(grid: int, head_size: int, pt_hw_seq_len: int) -> tuple[Tensor, Tensor]:
    """cos and sin [1 + grid², K/2]. CLS is not rotated. The first K/4 angles encode the row, the rest the column.

    Row and column indices are scaled to the grid of the pre-training: j / grid · pt_hw_seq_len.
    """
    frequency = 10000.0 ** (
        -torch.arange(0, head_size // 2, 2, dtype=torch.float64, device="cpu") / (head_size // 2)
    )  # [K/4]
    place = torch.arange(grid, dtype=torch.float64, device="cpu") / grid * pt_hw_seq_len
    angle = place[:, None] * frequency  # [grid, K/4]
    rows = angle[:, None, :].expand(grid, grid, -1)
    columns = angle[None, :, :].expand(grid, grid, -1)
    angle = torch.cat((rows, columns), dim=-1).flatten(0, 1)  # [P, K/2]
    angle = torch.cat((torch.zeros(1, head_size // 2, dtype=torch.float64, device="cpu"), angle))  # [N, K/2]
    return angle.cos().float(), angle.sin().float()
