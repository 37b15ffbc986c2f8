"""Inputs of a certificate's measurement: built-in texts and pictures, or the user's own.

The texts are those of captions.py: 1,230 in 26 languages. The pictures are the generated ones of pictures/ and twelve
photos, which are files of scikit-image's wheel. Only photos in the public domain or under CC0 are used (scikit-image's
documentation lists them):

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
from pathlib import Path

from jinaclip.bundle.files import file_sha256
from jinaclip.cli.arguments import find_images, read_texts
from jinaclip.errors import InputError
from jinaclip.preprocessing.image_sources import ImageInput
from jinaclip_export.certification import captions
from jinaclip_export.certification.pictures.generated import generated_pictures

PHOTOS = """
astronaut.png brick.png camera.png cell.png chelsea.png clock_motion.png coffee.png grass.png gravel.png
hubble_deep_field.jpg retina.jpg rocket.jpg
""".split()


@dataclass(frozen=True)
class Items:
    """The inputs of one tower.

    Attributes:
        items: texts or images.
        source: "built-in", or "sha256:" and 16 hex digits of a hash of the user's items.
    """

    items: Sequence[str] | Sequence[ImageInput]
    source: str

    def __len__(self) -> int:
        return len(self.items)


def built_in_texts() -> Items:
    """The 1,230 built-in texts."""
    return Items(captions.built_in_texts(), "built-in")


def built_in_images() -> Items:
    """234 generated pictures and 12 photos."""
    import skimage

    directory = Path(skimage.__file__).parent / "data"
    for name in PHOTOS:
        if not (directory / name).is_file():
            raise InputError(f"scikit-image has no file {name}; install another version of it, or use --images DIR")
    return Items([*generated_pictures(), *(directory / name for name in PHOTOS)], "built-in")


def texts_of(file: str) -> Items:
    """The lines of a UTF-8 file, without duplicates.

    Raises:
        InputError: the file cannot be read.
    """
    lines = read_texts(file)
    for line in lines:
        if isinstance(line, InputError):
            raise line
    texts = list(dict.fromkeys(str(line) for line in lines))
    return Items(texts, _identity(text.encode() for text in texts))


def images_of(directory: str) -> Items:
    """The image files of a directory, without files of the same content."""
    by_hash: dict[str, str] = {}
    for path in find_images([directory]):
        by_hash.setdefault(file_sha256(Path(path)), path)
    return Items(list(by_hash.values()), _identity(h.encode() for h in by_hash))


def _identity(contents: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for content in contents:
        whole.update(hashlib.sha256(content).digest())
    return f"sha256:{whole.hexdigest()[:16]}"
