"""A trained model that was mapped into one of the towers, as a source of `export_bundle`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinaclip.bundle.files import file_sha256
from jinaclip.preprocessing.image import ImagePreprocessing
from jinaclip_export.towers.config import ImageConfig, ModelConfig, TextConfig
from jinaclip_export.towers.image import ImageTower
from jinaclip_export.towers.text import TextTower

WIDTH = 384  # of all three models
DIMS = (32, 64, 128, 256, 384)
IMAGENET = ImagePreprocessing(
    size=224, resize_mode="longest", fill_color=255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


@dataclass(frozen=True)
class MappedModel:
    """A model with one tower. See jinaclip_export.bundle.source.Source.

    Attributes:
        name: name of the model.
        directory: directory with tokenizer.json and preprocessor_config.json.
        weights: file that the weights were read from.
        text, image: the tower; None for the other one.
        config: configuration of the model. The section of the missing tower is not used.
    """

    name: str
    directory: Path
    weights: Path
    text: TextTower | None = None
    image: ImageTower | None = None

    adaptation = None
    logit_scale = 0.0

    def __post_init__(self) -> None:
        preprocessing = IMAGENET.to_manifest()
        (self.directory / "preprocessor_config.json").write_text(json.dumps(preprocessing), "utf-8")
        if self.text is None:
            (self.directory / "tokenizer.json").write_text("{}", "utf-8")

    @property
    def tower(self) -> str:
        """ "text" or "image"."""
        return "text" if self.image is None else "image"

    @property
    def config(self) -> ModelConfig:
        text = self.text.config if self.text is not None else TextConfig(hidden_size=WIDTH)
        image = self.image.config if self.image is not None else ImageConfig(width=WIDTH, image_size=IMAGENET.size)
        return ModelConfig(text, image, WIDTH, DIMS, self.logit_scale)

    def file(self, name: str) -> Path:
        return self.directory / name

    def read_json(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.file(name).read_text("utf-8"))
        return content

    def weights_sha256(self) -> str:
        return file_sha256(self.weights)

    def check(self, towers: Iterable[str]) -> None:
        """Nothing to do: every weight was checked when it was loaded into the tower."""

    def text_tower(self) -> TextTower:
        assert self.text is not None
        return self.text

    def image_tower(self) -> ImageTower:
        assert self.image is not None
        return self.image
