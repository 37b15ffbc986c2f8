"""Opening and decoding of images: from a path, bytes, a data: URI, a URL, a PIL image or an array."""

from __future__ import annotations

import base64
import os
import time
import urllib.error
import urllib.request as web
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from threading import Lock
from typing import Any, BinaryIO, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt
from PIL import (  # noqa: F401 - each plugin registers its format in Image.OPEN
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from jinaclip.errors import InputError

Pixels: TypeAlias = npt.NDArray[np.uint8]
ImageInput: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | Pixels
MAX_PIXELS = 89_478_485  # Pillow warns above this number; 256 MiB of RGB
URL_MAX_BYTES = 32 << 20
URL_TIMEOUT_S = 30.0
# Accepted file formats, by their names in Pillow. Pillow supports more, but some start programs: EPS runs Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
_LOADING = [Lock() for _ in range(61)]  # by id; a lazily opened PIL image must not be loaded by two threads at once


def open_image(source: ImageInput, *, allow_urls: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open and decode one image, without converting its mode.

    Args:
        source: a path, data: URI or URL; the bytes of a file; a binary file object, which is read from its current
            position and not closed; a PIL image, which is loaded and returned; a uint8 array [height, width, 3].
        allow_urls: fetch http:// and https:// URLs, from any address that this machine can reach.
        max_pixels: the largest number of pixels. Larger images are refused after reading the header. Pillow's own
            limit is not used.

    Raises:
        InputError: the image cannot be used.
    """
    with reading(name_of(source)):
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
                raise InputError("expected uint8 [height, width, 3] with at least one pixel")
            image = Image.fromarray(np.ascontiguousarray(source))
        else:
            image = source if isinstance(source, Image.Image) else _identify(source, allow_urls)
        pixels = image.width * image.height
        if not 1 <= pixels <= max_pixels:
            raise InputError(f"{image.width} x {image.height} pixels; expected 1 to {max_pixels} in total")
        with _LOADING[id(image) // 16 % len(_LOADING)] if image is source else nullcontext():
            image.load()
        return image


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn Pillow's exceptions into an InputError that starts with `name`. Used around all calls of Pillow."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error.__cause__
    except Exception as error:  # malformed files cause OSError, SyntaxError, struct.error, zlib.error, ...
        found = str(getattr(error, "strerror", None) or error) or type(error).__name__
        raise InputError(f"{name}: cannot be read as an image: {' '.join(found.split())}") from error


def _identify(source: Any, allow_urls: bool) -> Image.Image:
    """Open a path, bytes or URL and read the image's header, but not its pixels.

    Image.open is not used because it applies Pillow's global limit and tries every format that Pillow supports.
    """
    with _encoded(source, allow_urls) as file:
        head = file.read(16)
        for factory, accepts in (Image.OPEN[name] for name in FORMATS):
            accepted = accepts is None or accepts(head)
            if isinstance(accepted, str):  # a message: this Pillow was built without the codec
                raise InputError(accepted)
            if accepted:
                return factory(BytesIO(head + file.read()), "")
    found = f"begins with {head!r}" if head else "is empty"
    raise InputError(f"{found}; expected an image file: {', '.join(FORMATS)}")


def _encoded(source: Any, allow_urls: bool) -> BinaryIO:
    if isinstance(source, bytes | bytearray | memoryview):
        return BytesIO(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        payload, is_base64 = split_data_uri(source)
        return BytesIO(decode_base64(payload) if is_base64 else unquote_to_bytes(payload))
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
        raise InputError(f"read() returned {type(content).__name__}, expected bytes; open the file with mode 'rb'")
    return BytesIO(content)


def split_data_uri(uri: str) -> tuple[str, bool]:
    """The payload of a data: URI, still percent-encoded, and whether it is base64.

    Raises:
        InputError: the URI has no comma, and so no payload.
    """
    head, comma, payload = uri.partition(",")
    if not comma:
        raise InputError("no comma; expected data:[type][;base64],content")
    return payload, head.lower().endswith(";base64")


def decode_base64(payload: str) -> bytes:
    """Decode percent-encoded base64. White space and missing padding are accepted, as in browsers.

    Raises:
        ValueError: the payload has other characters.
    """
    content = b"".join(unquote_to_bytes(payload).split())
    return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)


def _fetch(url: str) -> bytes:
    opener = web.OpenerDirector()  # without handlers for file:, ftp: and data:, so redirects cannot use them
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


def name_of(source: object) -> str:
    """The name of an image in messages: its path or URL, or the kind of object."""
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
