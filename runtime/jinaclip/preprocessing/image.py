"""Image preprocessing: from a path, bytes, URL, PIL image or array to uint8 pixels [size, size, 3].

Images are converted to RGB and then resized, like the publisher's encode_image. The conversion by mode or format:

    RGB                              unchanged
    1, L                             the grey value in all three channels
    P                                the colours of the palette
    LA, PA, RGBA, RGBX, tRNS         the alpha channel is dropped; the stored colours are used as they are
    CMYK, YCbCr, HSV, LAB, RGBa      Pillow's convert("RGB"); embedded colour profiles are ignored
    I;16 (16-bit grey, any order)    the high byte, as Pillow reads 16-bit colour; Pillow's convert() clips at 255
    I, F, La                         refused, because no 8-bit range is defined
    animation, several pages         the first frame; of a PIL image, its current frame
    orientation in EXIF              ignored, unless exif_transpose=True
    orientation of a TIFF            always applied, because Pillow applies it on loading

Images are resized with Pillow's antialiased bicubic filter, first the width and then the height. Pillow 13 resizes the
height of some tall images first, which changes pixels by up to 23 levels. Two calls that resize one axis each give
identical results in all versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from jinaclip.errors import BundleError, InputError
from jinaclip.preprocessing.image_sources import MAX_PIXELS, ImageInput, Pixels, name_of, open_image, reading

RESIZE_MODES = ("shortest", "longest", "squash")
# By EXIF orientation, from 2. ImageOps.exif_transpose fails if any other EXIF field of the image has the wrong type.
_TRANSPOSES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
_TURNS: dict[Any, Image.Transpose] = {number: Image.Transpose[name] for number, name in enumerate(_TRANSPOSES, 2)}


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """The preprocessing that the image tower expects, as recorded in bundle.json.

    Attributes:
        size: width and height of the tower's input, in pixels.
        resize_mode: the default mode, one of RESIZE_MODES.
        fill_color: grey level of the padding in mode "longest", 0 ... 255.
        mean, std: mean and standard deviation of the red, green and blue channels, on a scale of 0 ... 1.
    """

    size: int
    resize_mode: str = "shortest"
    fill_color: int = 0
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        largest = int(MAX_PIXELS**0.5)
        for name, expected, met in (
            ("size", f"1 ... {largest}", type(self.size) is int and 1 <= self.size <= largest),
            ("resize_mode", f"one of {RESIZE_MODES}", self.resize_mode in RESIZE_MODES),
            ("fill_color", "0 ... 255", type(self.fill_color) is int and 0 <= self.fill_color <= 255),
            ("mean", "three numbers", len(self.mean) == 3 and all(map(isfinite, self.mean))),
            ("std", "three numbers above 0", len(self.std) == 3 and all(0 < s < 1e9 for s in self.std)),
        ):
            if not met:
                raise BundleError(f"preprocessing: {name} is {getattr(self, name)!r}; expected {expected}")

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> ImagePreprocessing:
        """Read the object that `to_manifest` wrote.

        Raises:
            BundleError: a field is missing or has a value that this version does not support.
        """
        fields: dict[str, Any] = {name: manifest.get(name) for name in cls.__dataclass_fields__}
        if (interpolation := manifest.get("interpolation")) != "bicubic":
            raise BundleError(f"preprocessing: interpolation is {interpolation!r}; expected 'bicubic'")
        try:
            fields |= {name: tuple(map(float, fields[name])) for name in ("mean", "std")}
        except (TypeError, ValueError, OverflowError) as error:
            raise BundleError(f"preprocessing: {error}; expected mean and std of three numbers") from None
        return cls(**fields)

    def mode_of(self, resize_mode: str | None) -> str:
        """The given mode, or the default mode for None.

        Raises:
            InputError: the mode is unknown; the message lists the modes.
        """
        mode = self.resize_mode if resize_mode is None else resize_mode
        if mode not in RESIZE_MODES:
            raise InputError(f"resize_mode is {mode!r}, expected one of {', '.join(RESIZE_MODES)}")
        return mode

    def to_manifest(self) -> dict[str, Any]:
        """The attributes and the interpolation, as JSON-compatible values."""
        return asdict(self) | {"mean": [*self.mean], "std": [*self.std], "interpolation": "bicubic"}


def preprocess(
    source: ImageInput,
    preprocessing: ImagePreprocessing,
    *,
    resize_mode: str | None = None,
    exif_transpose: bool = False,
    allow_urls: bool = False,
) -> Pixels:
    """Open, convert and resize one image.

    Args:
        source: as for `open_image`.
        preprocessing: the bundle's.
        resize_mode: one of RESIZE_MODES. None uses the bundle's mode.
        exif_transpose: rotate the image according to its EXIF orientation.
        allow_urls: fetch http:// and https:// URLs.

    Returns:
        Pixels, uint8 [size, size, 3].

    Raises:
        InputError: the image cannot be used, or resize_mode is unknown.
    """
    image = open_image(source, allow_urls=allow_urls)
    with reading(name_of(source)):
        return resize(to_rgb(image, exif_transpose=exif_transpose), preprocessing, resize_mode)


def to_rgb(image: Image.Image, *, exif_transpose: bool = False) -> Image.Image:
    """Convert an image to mode RGB, according to the table above. An RGB image is returned unchanged.

    Call it inside of `reading`, because Pillow raises errors of several classes.

    Raises:
        InputError: the mode has no defined RGB values.
    """
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation)) if exif_transpose else None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F", "La"):
        raise InputError(f"mode {image.mode} has no defined 8-bit range; scale the image to mode L")
    if "transparency" in image.info:  # avoids Pillow's warning that transparency is dropped
        image = image.copy()
        del image.info["transparency"]
    return image if image.mode == "RGB" else image.convert("RGB")


def resize(image_rgb: Image.Image, preprocessing: ImagePreprocessing, resize_mode: str | None = None) -> Pixels:
    """Resize an image of mode RGB.

    Mode "shortest" scales the shorter side to `size` and crops the centre. "longest" scales the longer side to `size`
    and pads the other with `fill_color`. "squash" scales each side to `size` separately.

    Returns:
        Pixels, uint8 [size, size, 3].

    Raises:
        InputError: resize_mode is unknown, or the image is too narrow for it.
    """
    mode, size, (width, height) = preprocessing.mode_of(resize_mode), preprocessing.size, image_rgb.size
    if mode == "shortest":
        to_width, to_height = (int(size * n / min(width, height)) for n in (width, height))
    elif mode == "longest":
        to_width, to_height = (max(1, round(size * n / max(width, height))) for n in (width, height))
    else:
        to_width = to_height = size
    if to_width * max(height, to_height) > max(MAX_PIXELS, width * height):
        wider = " or ".join(repr(m) for m in ("longest", "squash") if m != mode)
        raise InputError(f"{width} x {height} pixels is too narrow for resize_mode={mode!r}; use {wider}")

    left, top = round((to_width - size) / 2), round((to_height - size) / 2)  # half to even
    if to_width != width:
        image_rgb = image_rgb.resize((to_width, height), Image.Resampling.BICUBIC)
    if left > 0:  # the second pass does not mix columns, so those outside the crop are dropped before it
        image_rgb = image_rgb.crop((left, 0, left + size, height))
    if to_height != height:
        image_rgb = image_rgb.resize((image_rgb.width, to_height), Image.Resampling.BICUBIC)
    if mode != "longest":
        return np.array(image_rgb.crop((0, top, size, top + size)))
    left, top = (size - to_width) // 2, (size - to_height) // 2
    canvas = np.full((size, size, 3), preprocessing.fill_color, np.uint8)
    canvas[top : top + to_height, left : left + to_width] = np.asarray(image_rgb)
    return canvas


def normalise(pixels: Pixels, preprocessing: ImagePreprocessing) -> npt.NDArray[np.float32]:
    """Convert pixels, uint8 [B, size, size, 3], to the publisher's input (x / 255 - mean) / std, [B, 3, size, size]."""
    mean, std = np.array((preprocessing.mean, preprocessing.std), np.float32)[:, :, None, None]
    scaled = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
    return np.asarray((scaled / 255 - mean) / std, np.float32)  # [B, 3, size, size]
