"""Inputs of a certificate's measurement: built-in photo crops and sentences, or the user's own images and texts.

The sentences were written for this project: 26 languages, ten each, 2 to 61 words. The crops are cut from photos in
scikit-image's wheel. Only photos in the public domain or under CC0 are used (scikit-image's documentation lists them):

    astronaut.png            public domain (NASA)
    hubble_deep_field.jpg    public domain (NASA)
    rocket.jpg               public domain (SpaceX)
    clock_motion.png         public domain (Stefan van der Walt)
    brick.png, grass.png, gravel.png    CC0 (CC0 Textures)
    camera.png               CC0 (Lav Varshney)
    cell.png                 CC0 (Paul Müller and others)
    chelsea.png              CC0 (Stefan van der Walt)
    coffee.png               CC0 (Rachel Michetti)
    retina.jpg               CC0 (Mikael Häggström)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from jinaclip.bundle.files import file_sha256
from jinaclip.cli.arguments import find_images, read_texts
from jinaclip.errors import InputError
from jinaclip.preprocessing.image import to_rgb
from jinaclip.preprocessing.image_sources import ImageInput, open_image

PHOTOS = """
astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png grass.png gravel.png
hubble_deep_field.jpg retina.jpg rocket.jpg
""".split()
CROPS = 12  # of each photo


@dataclass(frozen=True)
class Items:
    """The inputs of one tower.

    Attributes:
        items: texts or images, without duplicates.
        source: "built-in", or "sha256:" and 16 hex digits of a hash of the user's items.
    """

    items: Sequence[str] | Sequence[ImageInput]
    source: str

    def __len__(self) -> int:
        return len(self.items)


def built_in_texts() -> Items:
    """The 260 built-in sentences."""
    content = files("jinaclip_export").joinpath("certificate_texts.tsv").read_text("utf-8")
    return Items([line.partition("\t")[2] for line in content.splitlines()], "built-in")


def built_in_images() -> Items:
    """144 crops. Position, size and aspect are drawn with a fixed seed; each side is 30 to 100 % of the photo's."""
    import skimage

    directory = Path(skimage.__file__).parent / "data"
    rng = np.random.default_rng(0)
    crops: list[Image.Image] = []
    for name in PHOTOS:
        if not (directory / name).is_file():
            raise InputError(f"scikit-image has no file {name}; install another version of it, or use --images DIR")
        photo = to_rgb(open_image(directory / name))
        for _ in range(CROPS):
            sides = np.array(photo.size)  # width, height
            size = np.round(sides * rng.uniform(0.3, 1.0, 2)).astype(int)
            left, top = (int(n) for n in rng.integers(0, sides - size + 1))
            crops.append(photo.crop((left, top, left + int(size[0]), top + int(size[1]))))
    return Items(crops, "built-in")


def texts_of(file: str) -> Items:
    """The lines of a UTF-8 file, without duplicates.

    Raises:
        InputError: the file cannot be read, or has fewer than two different texts.
    """
    lines = read_texts(file)
    for line in lines:
        if isinstance(line, InputError):
            raise line
    texts = list(dict.fromkeys(str(line) for line in lines))
    return Items(_enough(texts, f"--texts {file}"), _identity(text.encode() for text in texts))


def images_of(directory: str) -> Items:
    """The image files of a directory, without files of the same content.

    Raises:
        InputError: there are fewer than two different images.
    """
    by_hash: dict[str, str] = {}
    for path in find_images([directory]):
        by_hash.setdefault(file_sha256(Path(path)), path)
    return Items(_enough(list(by_hash.values()), f"--images {directory}"), _identity(h.encode() for h in by_hash))


def _enough(items: list[str], where: str) -> list[str]:
    if len(items) < 2:
        raise InputError(f"{where}: {len(items)} different items, expected at least 2 (a certificate needs 100)")
    return items


def _identity(contents: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for content in contents:
        whole.update(hashlib.sha256(content).digest())
    return f"sha256:{whole.hexdigest()[:16]}"
