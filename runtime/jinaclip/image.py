"""Images: from a path, bytes, address, PIL image or array to uint8 pixels [size, size, 3].

Converted to RGB first, then resized, as the publisher's encode_image. What a picture becomes:

    RGB                              itself
    1, L                             the grey three times
    P                                the colours of its palette
    LA, PA, RGBA, RGBX, tRNS         alpha is dropped; the colours under it stay as they are stored
    CMYK, YCbCr, HSV, LAB, RGBa      Pillow's convert("RGB"); embedded colour profiles are ignored
    I;16 (16-bit grey, any order)    the high byte, as Pillow reads 16-bit colour; its convert() clips at 255
    I, F, La                         refused: no 8-bit range is defined
    animation, several pages         the first frame; of a PIL image, the frame where it stands
    orientation in EXIF              ignored, unless exif_transpose=True
    orientation of a TIFF            applied always: Pillow does so while it loads one

The resize is Pillow's antialiased bicubic, width first, then height. Pillow 13 begins with the height of some
tall pictures, up to 23 levels off; two calls of one axis each give the same bits in every version.
"""

from __future__ import annotations

import base64
import os
import time
import urllib.error
import urllib.request as web
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from importlib import import_module
from io import BytesIO
from math import isfinite
from threading import Lock
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from jinaclip.errors import BundleError, InputError

Pixels: TypeAlias = npt.NDArray[np.uint8]
ImageInput: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | Pixels

RESIZE_MODES = ("shortest", "longest", "squash")
MAX_PIXELS = 89_478_485  # where Pillow begins to warn; 256 MiB of RGB
URL_MAX_BYTES = 32 << 20
URL_TIMEOUT_S = 30.0

# Containers by their names in Pillow. It has more, and some of those start programs: EPS runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_PLUGINS = ("Png", "Jpeg", "WebP", "Gif", "Bmp", "Tiff", "Avif", "Jpeg2K", "Ppm")

for _plugin in _PLUGINS:  # each enters its container in Image.OPEN
    import_module(f"PIL.{_plugin}ImagePlugin")

_LOADING = [Lock() for _ in range(61)]  # by id: two threads must not load one lazily opened PIL image at once
_TURNS: dict[Any, Image.Transpose] = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """What the image tower expects, as bundle.json states it.

    Attributes:
        size: side of the square picture, in pixels.
        resize_mode: one of RESIZE_MODES, for a caller that names none.
        fill_color: the level that "longest" pads with, 0 ... 255.
        mean, std: of the channels red, green, blue scaled to 0 ... 1.
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
        """Reads the object that `to_manifest` wrote.

        Raises:
            BundleError: something is missing or is nothing that this version can do.
        """
        fields: dict[str, Any] = {name: manifest.get(name) for name in cls.__dataclass_fields__}
        if (interpolation := manifest.get("interpolation")) != "bicubic":
            raise BundleError(f"preprocessing: interpolation is {interpolation!r}; expected 'bicubic'")
        try:
            fields |= {name: tuple(map(float, fields[name])) for name in ("mean", "std")}
        except (TypeError, ValueError, OverflowError) as error:
            raise BundleError(f"preprocessing: {error}; expected mean and std of three numbers") from None
        return cls(**fields)

    def to_manifest(self) -> dict[str, Any]:
        """Plain JSON: the attributes, and the interpolation."""
        return asdict(self) | {"mean": [*self.mean], "std": [*self.std], "interpolation": "bicubic"}


def preprocess(
    source: ImageInput,
    preprocessing: ImagePreprocessing,
    *,
    resize_mode: str | None = None,
    exif_transpose: bool = False,
    allow_urls: bool = False,
) -> Pixels:
    """Opens, converts and resizes one image: uint8 [size, size, 3].

    Raises:
        InputError: the image cannot be used, or resize_mode is unknown.
    """
    mode = _known(resize_mode, preprocessing)
    with _reading(_name(source)):
        image = open_image(source, allow_urls=allow_urls)
        return resize(to_rgb(image, exif_transpose=exif_transpose), preprocessing, mode)


def open_image(source: ImageInput, *, allow_urls: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens and decodes one image, in its own mode.

    Args:
        source: a path, data: URI or URL; the bytes of a file; a binary file object, read from where it stands
            and left open; a PIL image, which is loaded and returned; a uint8 array [height, width, 3].
        allow_urls: fetch http:// and https://, from wherever this machine can reach.
        max_pixels: more are refused as soon as the header is read. Pillow's own global limit is not asked.

    Raises:
        InputError: the image cannot be used.
    """
    with _reading(_name(source)):
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
                raise InputError("expected uint8 [height, width, 3] with at least one pixel")
            image = Image.fromarray(np.ascontiguousarray(source))
        else:
            image = source if isinstance(source, Image.Image) else _identify(source, allow_urls)
        pixels = image.width * image.height
        if not 1 <= pixels <= max_pixels:
            raise InputError(f"{image.width} x {image.height} pixels; expected 1 to {max_pixels} in all")
        with _LOADING[id(image) // 16 % len(_LOADING)] if image is source else nullcontext():
            image.load()
        return image


def to_rgb(image: Image.Image, *, exif_transpose: bool = False) -> Image.Image:
    """The picture in mode RGB, by the table above; one that is RGB already is returned as it is.

    Raises:
        InputError: its mode has no defined RGB values.
    """
    with _reading(_name(image)):
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation)) if exif_transpose else None
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F", "La"):
            raise InputError(f"mode {image.mode} has no defined 8-bit range; expected 8-bit: scale it to L")
        if "transparency" in image.info:  # dropped anyway, and Pillow would warn that it is
            image = image.copy()
            del image.info["transparency"]
        return image if image.mode == "RGB" else image.convert("RGB")


def resize(image_rgb: Image.Image, preprocessing: ImagePreprocessing, resize_mode: str | None = None) -> Pixels:
    """Resizes a picture of mode RGB: uint8 [size, size, 3].

    "shortest" scales the shortest side to `size` and cuts out the centre, "longest" scales the longest side
    and pads the other with `fill_color`, "squash" scales each side by itself.

    Raises:
        InputError: resize_mode is unknown, or the picture is too narrow for it.
    """
    mode = _known(resize_mode, preprocessing)
    size, (width, height) = preprocessing.size, image_rgb.size
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
    if left > 0:  # columns do not mix in the second pass: only those that stay take part
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
    """uint8 [B, size, size, 3] to the publisher's float input, (x / 255 - mean) / std [B, 3, size, size]."""
    mean, std = np.array((preprocessing.mean, preprocessing.std), np.float32)[:, :, None, None]
    scaled = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
    scaled /= 255
    scaled -= mean
    scaled /= std
    return scaled  # [B, 3, size, size]


_reading_now = ContextVar("_reading_now", default=False)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Around all use of Pillow: what it raises becomes an InputError that starts with name.

    Nested, the outermost speaks: it knows the image as the caller does.
    """
    if _reading_now.get():
        yield
        return
    token = _reading_now.set(True)
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error.__cause__
    except Exception as error:  # hostile files: OSError, SyntaxError, struct.error, zlib.error, ...
        found = str(getattr(error, "strerror", None) or error) or type(error).__name__
        raise InputError(f"{name}: cannot be read as an image: {' '.join(found.split())}") from error
    finally:
        _reading_now.reset(token)


def _identify(source: Any, allow_urls: bool) -> Image.Image:
    """The image of a file, bytes or address; its header is read, its pixels are not.

    Image.open would hold it to a global limit and try every container that Pillow has.
    """
    with _encoded(source, allow_urls) as file:
        head = file.read(16)
        for factory, accepts in (Image.OPEN[name] for name in FORMATS):
            accepted = accepts is None or accepts(head)
            if isinstance(accepted, str):  # this Pillow was built without the codec
                raise InputError(accepted)
            if accepted:
                return factory(BytesIO(head + file.read()), "")
    found = f"begins with {head!r}" if head else "is empty"
    raise InputError(f"{found}; expected an image file: {', '.join(FORMATS)}")


def _encoded(source: Any, allow_urls: bool) -> BinaryIO:
    if isinstance(source, bytes | bytearray | memoryview):
        return BytesIO(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return BytesIO(_decode_uri(source))
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise InputError("URLs are not fetched; download it first, or pass allow_urls=True")
        return BytesIO(_fetch(source))
    if isinstance(source, str | os.PathLike):
        return open(source, "rb")
    if not hasattr(source, "read"):
        raise InputError("expected a path, data: URI, bytes, binary file, PIL image or uint8 array")
    content = source.read()
    if not isinstance(content, bytes):
        raise InputError(f"read() gave {type(content).__name__}; expected bytes: open it with mode 'rb'")
    return BytesIO(content)


def _decode_uri(uri: str) -> bytes:
    head, comma, payload = uri.partition(",")
    if not comma:
        raise InputError("no comma; expected data:[type][;base64],content")
    content = unquote_to_bytes(payload)
    if not head.lower().endswith(";base64"):
        return content
    content = b"".join(content.split())  # white space and missing padding are forgiven, as in browsers
    return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)


def _fetch(url: str) -> bytes:
    opener = web.OpenerDirector()  # no handler for file:, ftp: or data:, wherever a redirect points
    http = (web.ProxyHandler, web.HTTPHandler, web.HTTPSHandler, web.HTTPRedirectHandler)
    errors = (web.HTTPErrorProcessor, web.HTTPDefaultErrorHandler, web.UnknownHandler)
    for handler in http + errors:
        opener.add_handler(handler())
    content, deadline = bytearray(), time.monotonic() + URL_TIMEOUT_S
    try:
        with opener.open(url, timeout=URL_TIMEOUT_S) as response:
            while chunk := response.read1(1 << 16):
                content += chunk
                if len(content) > URL_MAX_BYTES or time.monotonic() > deadline:
                    limits = f"{URL_MAX_BYTES} bytes in {URL_TIMEOUT_S:g} s"
                    raise InputError(f"expected at most {limits}; download it first")
    except urllib.error.HTTPError as error:
        error.close()
        raise
    return bytes(content)


def _known(resize_mode: str | None, preprocessing: ImagePreprocessing) -> str:
    mode = preprocessing.resize_mode if resize_mode is None else resize_mode
    if mode not in RESIZE_MODES:
        raise InputError(f"resize_mode is {mode!r}; expected one of {', '.join(RESIZE_MODES)}")
    return mode


def _name(source: object) -> str:
    """What messages call an image: its path or address, or what kind of object it is."""
    if isinstance(source, Image.Image):
        return f"PIL image ({source.mode}, {source.width} x {source.height})"
    if isinstance(source, np.ndarray):
        return f"array ({source.dtype} {[*source.shape]})"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"bytes ({len(source)} bytes)"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return "data: URI"
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        return repr(path) if len(path) <= 200 else f"{path[:200]!r}..."
    if not hasattr(source, "read"):
        return f"object of type {type(source).__name__}"
    return f"file object {name!r}" if (name := getattr(source, "name", "")) else "file object"
