"""One graph of both towers, like the publisher's ONNX file, to measure the cost of a text query with it.

Both inputs are required, so a text needs a dummy image. The operators are the same as in jinaclip's graphs, with one
fused Attention per block, so the ratio shows only the cost of having both towers in one graph.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from jinaclip.backends.onnxruntime.library import import_onnxruntime
from jinaclip_bench.measuring.cache import CacheEntry, sources_digest
from jinaclip_export.checkpoint.reader import WEIGHTS, Checkpoint

OUTPUTS = ("text_embeddings", "image_embeddings", "l2norm_text_embeddings", "l2norm_image_embeddings")


def fused_graph(checkpoint: Checkpoint) -> Path:
    """Path of the cached .onnx file of a checkpoint. It is generated if it is missing. Its weights are in the same
    directory.

    Raises:
        BenchError: there is not enough free disk space.
    """
    gb = checkpoint.file(WEIGHTS).stat().st_size * 2 / 1e9  # the checkpoint has 16 bits per weight, the graph 32
    entry = CacheEntry(
        name=f"fused-{checkpoint.weights_sha256()[:16]}",
        description="fused graph like the publisher's",
        disk_gb=gb,
        cost=f"about {0.5 + 1.5 * gb:.1f} GB of memory",  # 0.54 GB at 0.066, 1.06 at 0.38, 1.68 at 0.80
        digest=f"{sources_digest(Path(__file__))} {checkpoint.adaptation}",
        generate=lambda directory: write_fused(checkpoint, directory),
        read=_read,
    )
    return entry.get()


def write_fused(checkpoint: Checkpoint, directory: Path) -> None:
    """Export both towers into directory/model.onnx.

    input_ids int64 [texts, tokens] and pixel_values float32 [images, 3, S, S], normalised -> OUTPUTS, float32 [·, D].
    """
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.export import Dim

    from jinaclip_export.onnx_export.graphs import OPSET

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image = checkpoint.text_tower(), checkpoint.image_tower()

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, ...]:
            text, image = self.text(input_ids), self.image(pixel_values)
            return text, image, F.normalize(text, dim=-1), F.normalize(image, dim=-1)

    text, image = checkpoint.config.text, checkpoint.config.image
    ids = torch.full((2, 7), text.eos_token_id, dtype=torch.int64)
    pixels = torch.zeros(2, 3, image.image_size, image.image_size)
    shapes = ({0: Dim("texts"), 1: Dim("tokens", min=1, max=text.max_tokens)}, {0: Dim("images")})
    directory.mkdir(parents=True)
    options: dict[str, Any] = {"opset_version": OPSET, "dynamic_shapes": shapes, "verbose": False}
    options |= {"input_names": ["input_ids", "pixel_values"], "output_names": OUTPUTS}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's deprecation warnings
            program = torch.onnx.export(Fused(), (ids, pixels), dynamo=True, **options)
    finally:
        logger.setLevel(level)
    assert program is not None  # dynamo=True always returns one
    program.save(directory / "model.onnx", external_data=True)


class FusedSession:
    """The graph in onnxruntime, with default options except for the number of threads.

    Args:
        path: path that `fused_graph` returned.
        threads: number of threads of a run.
    """

    def __init__(self, path: Path, threads: int) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised as exceptions
        self._session: Any = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        size = self._session.get_inputs()[1].shape[-1]
        self._dummy = np.zeros((1, 3, size, size), np.float32)

    def run(self, ids: np.ndarray, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """All outputs by name."""
        feeds = {"input_ids": ids, "pixel_values": pixels}
        return dict(zip(OUTPUTS, self._session.run(list(OUTPUTS), feeds), strict=True))

    def embed_text(self, ids: np.ndarray) -> np.ndarray:
        """ids [B, T] -> unit vectors [B, D], with the dummy image that the graph requires."""
        return self.run(ids, self._dummy)["l2norm_text_embeddings"]

    def close(self) -> None:
        """Free the graph."""
        self._session = None


def _read(directory: Path) -> Path:
    path = directory / "model.onnx"
    for file in (path, directory / "model.onnx.data"):
        file.stat()  # raises OSError if the file is missing
    return path
