"""Prints, as JSON, what jinaclip.preprocessing.image makes of seeded random images with the Pillow on PYTHONPATH.

test_image.py runs this under two Pillows: `digests` must agree, and `one_call_differs` says for how many of
the `pictures` a single two-axis Image.resize gives other pixels than jinaclip does (0 before Pillow 13).
"""

from __future__ import annotations

import hashlib
import json
from io import BytesIO

import numpy as np
import PIL
from PIL import Image

from jinaclip.preprocessing.image import RESIZE_MODES, ImagePreprocessing, preprocess, resize

CHANNELS = {
    "L": 1, "P": 1, "LA": 2, "PA": 2, "RGB": 3, "YCbCr": 3, "HSV": 3, "LAB": 3,
    "RGBA": 4, "RGBX": 4, "RGBa": 4, "CMYK": 4, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2,
}  # fmt: skip
PREPROCESSING = ImagePreprocessing(size=48, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def random_image(rng: np.random.Generator, mode: str, width: int, height: int) -> Image.Image:
    """Noise: every difference in order or rounding shows."""
    content = rng.integers(0, 256, width * height * CHANNELS[mode], np.uint8).tobytes()
    image = Image.frombytes(mode, (width, height), content)
    if mode == "P":
        image.putpalette(rng.integers(0, 256, 768, np.uint8).tobytes())
    return image


def main() -> None:
    rng = np.random.default_rng(20_26)
    digests = {}
    for mode in [*CHANNELS, "1"]:
        digest = hashlib.sha256()
        for _ in range(8):
            width, height = (int(n) for n in rng.integers(1, 200, 2))
            image = random_image(rng, "L" if mode == "1" else mode, width, height)
            for resize_mode in RESIZE_MODES:
                source = image.convert("1") if mode == "1" else image
                digest.update(preprocess(source, PREPROCESSING, resize_mode=resize_mode).tobytes())
        digests[mode] = digest.hexdigest()

    digest, files = hashlib.sha256(), 0
    for mode, suffix in (("I;16", "PNG"), ("I;16B", "TIFF"), ("P", "PNG"), ("P", "GIF"), ("CMYK", "TIFF")):
        for _ in range(4):
            buffer = BytesIO()
            random_image(rng, mode, int(rng.integers(1, 90)), int(rng.integers(1, 90))).save(buffer, suffix)
            digest.update(preprocess(buffer.getvalue(), PREPROCESSING).tobytes())
            files += 1
    digests[f"{files} files"] = digest.hexdigest()

    digest, pictures, one_call_differs = hashlib.sha256(), 0, 0
    for tall in (1, 1, 4, 9):
        for _ in range(50):
            width, height = int(rng.integers(8, 160)), int(rng.integers(8, 160)) * tall
            image = random_image(rng, "RGB", width, height)
            ours = resize(image, PREPROCESSING)
            digest.update(ours.tobytes())
            size, short = PREPROCESSING.size, min(width, height)
            whole = image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
            left, top = round((whole.width - size) / 2), round((whole.height - size) / 2)
            theirs = np.asarray(whole)[top : top + size, left : left + size]
            one_call_differs += not np.array_equal(ours, theirs)
            pictures += 1
    digests["tall and wide"] = digest.hexdigest()

    report = {"pillow": PIL.__version__, "pictures": pictures, "one_call_differs": one_call_differs}
    print(json.dumps(report | {"digests": digests}))


if __name__ == "__main__":
    main()
