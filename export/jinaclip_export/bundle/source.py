"""What a bundle is made from: `Source`, of which `Checkpoint` is one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from jinaclip_export.towers.config import ModelConfig
from jinaclip_export.towers.image import ImageTower
from jinaclip_export.towers.text import TextTower


class Source(Protocol):
    """A model to export: its configuration, its towers, its tokenizer and its image preprocessing.

    The methods have the meaning of those of `Checkpoint`. A source that is not a checkpoint has only the towers that
    are exported. Its files are tokenizer.json and preprocessor_config.json.
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def adaptation(self) -> str | None: ...
    @property
    def logit_scale(self) -> float: ...
    def file(self, name: str) -> Path: ...
    def read_json(self, name: str) -> dict[str, Any]: ...
    def weights_sha256(self) -> str: ...
    def check(self, towers: Iterable[str]) -> None: ...
    def text_tower(self) -> TextTower: ...
    def image_tower(self) -> ImageTower: ...
