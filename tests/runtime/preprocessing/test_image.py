"""jinaclip.preprocessing.image against Pillow, against a resize written from its rules, and against hostile input."""

from __future__ import annotations

import base64
import http.server
import io
import json
import math
import os
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import PIL
import pytest
import skimage
from PIL import Image

from jinaclip.errors import BundleError, InputError
from jinaclip.preprocessing import image_sources as module
from jinaclip.preprocessing.image import RESIZE_MODES, ImagePreprocessing, normalise, preprocess, resize, to_rgb
from jinaclip.preprocessing.image_sources import MAX_PIXELS, open_image

Pixels = npt.NDArray[np.uint8]

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SMALL = ImagePreprocessing(size=64, mean=MEAN, std=STD)
FULL = ImagePreprocessing(size=512, mean=MEAN, std=STD)
PHOTOS = Path(skimage.__file__).parent / "data"


# References


def target(width: int, height: int, size: int, mode: str) -> tuple[int, int]:
    """The size before cutting or padding, in exact integers."""
    if mode == "squash":
        return size, size
    if mode == "shortest":
        short = min(width, height)
        return size * width // short, size * height // short
    longest = max(width, height)
    return tuple(max(1, round(Fraction(size * n, longest))) for n in (width, height))  # type: ignore[return-value]


def fit(whole: Pixels, size: int, fill: int) -> Pixels:
    """Cuts out the centre of what is too long and pads what is too short."""
    for axis in (0, 1):
        n = whole.shape[axis]
        if n >= size:
            start = round(Fraction(n - size, 2))  # half to even
            whole = whole.take(range(start, start + size), axis)
        else:
            before = (size - n) // 2
            padding = [(0, 0)] * 3
            padding[axis] = (before, size - n - before)
            whole = np.pad(whole, padding, constant_values=fill)
    return whole


def by_pillow(rgb: Image.Image, size: int, mode: str, fill: int = 0) -> Pixels:
    """What Pillow 12 gives: one call. From Pillow 13 on, the same in two calls."""
    width, height = target(*rgb.size, size, mode)
    if int(PIL.__version__.split(".")[0]) < 13:
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    else:
        rgb = rgb.resize((width, rgb.height), Image.Resampling.BICUBIC)
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    return fit(np.asarray(rgb), size, fill)


def by_rules(rgb: Pixels, size: int, mode: str, fill: int = 0) -> Pixels:
    """Pillow's resize written from its rules, without Pillow: width first."""
    width, height = target(rgb.shape[1], rgb.shape[0], size, mode)
    wide = one_axis(rgb.swapaxes(0, 1), width).swapaxes(0, 1)
    return fit(one_axis(wide, height), size, fill)


def one_axis(pixels: Pixels, n: int) -> Pixels:
    """Antialiased cubic with a = -0.5 along axis 0, in 22-bit fixed point with the rounding of Pillow."""
    if len(pixels) == n:
        return pixels
    scale = len(pixels) / n
    stretch = max(1.0, scale)
    rows = []
    for i in range(n):
        centre = (i + 0.5) * scale
        first = max(0, int(centre - 2 * stretch + 0.5))
        last = min(len(pixels), int(centre + 2 * stretch + 0.5))
        weights = [cubic((j - centre + 0.5) / stretch) for j in range(first, last)]
        total = math.fsum(weights)
        fixed = [int(w / total * (1 << 22) + math.copysign(0.5, w)) for w in weights]
        window = pixels[first:last].astype(np.int64)
        rows.append((np.tensordot(np.array(fixed), window, 1) + (1 << 21)) >> 22)
    return np.array(rows).clip(0, 255).astype(np.uint8)


def cubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def noise(rng: np.random.Generator, height: int, width: int, *channels: int) -> Pixels:
    return rng.integers(0, 256, (height, width, *channels), np.uint8)


# Files


def encoded(image: Image.Image, container: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, container, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes | None, extra: bytes = b"") -> bytes:
    """A PNG by hand: Pillow writes neither 16-bit colour nor false sizes. Without rows it ends early."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = b"" if rows is None else chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + extra + body


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def damaged_exif() -> bytes:
    """A JPEG with good pixels, whose EXIF says orientation 6, then points outside of itself. Pillow warns."""
    tags = struct.pack("<H", 3) + struct.pack("<HHI4s", 274, 3, 1, b"\x06\0\0\0")
    tags += struct.pack("<HHII", 271, 2, 4000, 60000)
    return encoded(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)


def bombs(side: int) -> dict[str, bytes]:
    """Headers of side x side pixels, with no pixels behind them."""
    bitmap = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
    return {
        "PNG": png(side, side, 8, 2, None, chunk(b"IDAT", b"")),
        "BMP": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + bitmap,
        "PPM": b"P6 %d %d 255\n" % (side, side),
    }


def refused(source: Any, *words: str, **options: Any) -> str:
    """The message of the one kind of error there is: on one line, and with these words in it."""
    with pytest.raises(InputError) as caught:
        preprocess(source, SMALL, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def rgb_of(source: Any, **options: Any) -> Pixels:
    return np.asarray(to_rgb(open_image(source), **options))


# Resize


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_resize_is_pillow_12_on_random_sizes(mode: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(150):
        height, width = (int(n) for n in rng.integers(1, 260, 2))
        size = int(rng.integers(1, 130))
        preprocessing = ImagePreprocessing(size=size, fill_color=77, mean=MEAN, std=STD)
        image = Image.fromarray(noise(rng, height, width, 3))
        ours = resize(image, preprocessing, mode)
        assert ours.dtype == np.uint8 and ours.shape == (size, size, 3)
        # exact: the same filter in the same order; the columns that are cut early never mattered
        np.testing.assert_array_equal(ours, by_pillow(image, size, mode, 77), err_msg=f"{width}x{height}")


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_resize_follows_the_written_rules(mode: str) -> None:
    """Exact, and independent of the installed Pillow: what another implementation has to reproduce."""
    rng = np.random.default_rng(2)
    for _ in range(25):
        height, width = (int(n) for n in rng.integers(1, 150, 2))
        pixels = noise(rng, height, width, 3)
        ours = resize(Image.fromarray(pixels), SMALL, mode)
        np.testing.assert_array_equal(ours, by_rules(pixels, 64, mode), err_msg=f"{width}x{height}")


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"])
def test_photos_at_full_size(name: str, mode: str) -> None:
    path = PHOTOS / name
    with Image.open(path) as image:
        expected = by_pillow(image.convert("RGB"), 512, mode)
    np.testing.assert_array_equal(preprocess(path, FULL, resize_mode=mode), expected)


def test_centre_crop_rounds_half_to_even() -> None:
    """Columns are numbered by colour; nothing is scaled, so the crop shows where it began."""
    for excess, start in ((1, 0), (2, 1), (3, 2), (5, 2), (7, 4)):
        columns = np.arange(64 + excess, dtype=np.uint8)
        wide = np.broadcast_to(columns[None, :, None], (64, 64 + excess, 3))
        assert preprocess(wide, SMALL)[0, 0, 0] == start
        assert preprocess(wide.swapaxes(0, 1), SMALL)[0, 0, 0] == start


def test_longest_pads_with_the_fill_colour() -> None:
    preprocessing = ImagePreprocessing(size=64, fill_color=9, resize_mode="longest", mean=MEAN, std=STD)
    pixels = preprocess(np.full((64, 33, 3), 200, np.uint8), preprocessing)
    assert (pixels[:, :15] == 9).all() and (pixels[:, 48:] == 9).all()  # (64 - 33) // 2 on the left, 16 right
    assert (pixels[:, 15:48] == 200).all()


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 999), (64, 64)])
def test_one_colour_stays_one_colour(shape: tuple[int, int], mode: str) -> None:
    """The weights of every output pixel sum to one, at any aspect ratio."""
    pixels = preprocess(np.full((*shape, 3), (3, 140, 255), np.uint8), SMALL, resize_mode=mode)
    inside = pixels[31, 31]  # never padding: a single line is put at (64 - 1) // 2
    np.testing.assert_array_equal(inside, (3, 140, 255))
    assert mode == "longest" or (pixels == inside).all()


@pytest.mark.parametrize("shape", [(1, 100_000, 3), (100_000, 1, 3)])
def test_extreme_aspect_ratio(shape: tuple[int, int, int]) -> None:
    """Shortest side to 64 would make 6,400,000 pixels of the other: 1.2 GB for a crop of 64 x 64."""
    line = np.full(shape, 50, np.uint8)
    refused(line, str(list(shape)), f"{shape[1]} x {shape[0]} pixels", "'longest' or 'squash'")
    assert (preprocess(line, SMALL, resize_mode="squash") == 50).all()
    assert (preprocess(line, SMALL, resize_mode="longest").max(2) == 50).sum() == 64  # one line of 64
    with pytest.raises(InputError, match="use 'longest'"):  # squash too, once it would make more than it takes
        resize(Image.new("RGB", (1, 12_000_000)), SMALL, "squash")


def test_unknown_resize_mode_lists_the_known() -> None:
    for wrong in ("", "crop", "Shortest"):
        refused(np.zeros((2, 2, 3), np.uint8), repr(wrong), "shortest, longest, squash", resize_mode=wrong)
        with pytest.raises(InputError, match="shortest, longest, squash"):
            resize(Image.new("RGB", (2, 2)), SMALL, wrong)


def test_two_pillows_give_the_same_bits() -> None:
    """Pillow 13 changed its order for tall pictures; jinaclip's pixels must not follow."""
    other = os.environ.get("JINACLIP_OTHER_PILLOW")
    if not other:
        pytest.skip(
            "PREPROCESSING IS NOT CHECKED ACROSS PILLOW VERSIONS: set JINACLIP_OTHER_PILLOW to a folder made "
            "by pip install --target DIR --no-deps 'pillow==12.*' (or 13.*, if 12 is installed)"
        )
    script = Path(__file__).with_name("pillow_orders.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    reports = []
    for extra in ({}, {"PYTHONPATH": other}):
        done = subprocess.run(
            [sys.executable, "-W", "error", str(script)],
            capture_output=True, text=True, env=environment | extra, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
    old, new = sorted(reports, key=lambda report: int(report["pillow"].split(".")[0]))
    assert int(old["pillow"].split(".")[0]) < 13 <= int(new["pillow"].split(".")[0])
    assert old["digests"] == new["digests"]
    assert old["one_call_differs"] == 0  # ours is Pillow 12's own order
    assert new["one_call_differs"] > 0  # the sample does hold pictures that Pillow 13 treats in another order


# Conversion to RGB


@pytest.mark.parametrize(
    ("mode", "container"),
    [
        *((mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *((mode, "TIFF") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB")),
        *((mode, "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")),
        *((mode, "JPEG") for mode in ("L", "RGB", "CMYK")),
        *((mode, "WEBP") for mode in ("RGB", "RGBA")),
        *((mode, "GIF") for mode in ("1", "L", "P")),
        *((mode, "PPM") for mode in ("1", "L", "RGB")),
        *((mode, "AVIF") for mode in ("RGB", "RGBA")),
        *((mode, "JPEG2000") for mode in ("L", "RGB", "RGBA")),
    ],
)
def test_files_become_what_pillow_converts(mode: str, container: str) -> None:
    rng = np.random.default_rng(3)
    with Image.open(PHOTOS / "chelsea.png") as photo:
        small = photo.resize((90, 60))
    small.putalpha(Image.fromarray(noise(rng, 60, 90)))
    image = small.convert("RGB").convert(mode) if mode in ("LAB", "CMYK", "YCbCr", "P") else small.convert(mode)
    content = encoded(image, container)
    with Image.open(io.BytesIO(content)) as reference:
        expected = by_pillow(reference.convert("RGB"), 64, "shortest")
    np.testing.assert_array_equal(preprocess(content, SMALL), expected)


@pytest.mark.parametrize("mode", ["PA", "RGBX", "RGBa", "HSV", "YCbCr", "LAB", "CMYK", "LA"])
def test_modes_become_what_pillow_converts(mode: str) -> None:
    """Among them those that no file opens in."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    image = Image.frombytes(mode, (21, 30), noise(np.random.default_rng(4), 30, 21, channels).tobytes())
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_alpha_is_dropped_and_not_blended() -> None:
    pixels = noise(np.random.default_rng(5), 20, 30, 4)
    pixels[..., 3] = 0  # all of it invisible
    for container, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        content = encoded(Image.fromarray(pixels), container, **options)
        np.testing.assert_array_equal(rgb_of(content), pixels[..., :3])
    grey = encoded(Image.fromarray(pixels[..., 0]), "PNG", transparency=int(pixels[0, 0, 0]))
    np.testing.assert_array_equal(rgb_of(grey), pixels[..., [0, 0, 0]])


@pytest.mark.parametrize("transparency", [b"\0\x80\xff\x10", 2])
def test_palette_with_transparency_keeps_its_colours(transparency: bytes | int) -> None:
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7)], np.uint8)
    index = noise(np.random.default_rng(6), 9, 7) % 4
    image = Image.frombytes("P", (7, 9), index.tobytes())
    image.putpalette(colours.tobytes())
    np.testing.assert_array_equal(rgb_of(encoded(image, "PNG", transparency=transparency)), colours[index])


@pytest.mark.parametrize("order", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bit_grey_takes_the_high_byte(order: str) -> None:
    """Pillow's own convert() clips: every level above 255 becomes white."""
    levels = np.array([[0, 1, 255, 256, 511, 512, 32767, 32768, 65279, 65280, 65535]], np.uint16)
    expected = np.repeat((levels // 256).astype(np.uint8)[..., None], 3, axis=2)
    stored = levels.astype({"B": ">u2", "N": "=u2"}.get(order[-1], "<u2"))
    image = Image.frombytes(order, (levels.size, 1), stored.tobytes())
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), expected)
    if order in ("I;16", "I;16B"):
        np.testing.assert_array_equal(rgb_of(encoded(image, "TIFF")), expected)
    if order == "I;16":
        np.testing.assert_array_equal(rgb_of(encoded(image, "PNG")), expected)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_every_16_bit_png_takes_the_high_byte(colour: int, channels: int) -> None:
    """Grey, RGB and both with alpha by one rule; Pillow applies it to colour while it decodes."""
    samples = np.random.default_rng(7).integers(0, 65536, (5, 6, channels), np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    high = (samples >> 8).astype(np.uint8)
    np.testing.assert_array_equal(
        rgb_of(png(6, 5, 16, colour, rows)), high[..., :3] if channels > 2 else high[..., [0, 0, 0]]
    )


@pytest.mark.parametrize("mode", ["I", "F", "La"])
def test_modes_without_a_defined_range_are_refused(mode: str) -> None:
    refused(Image.new(mode, (3, 4)), f"PIL image ({mode}, 3 x 4)", f"mode {mode} ", "8-bit")
    if mode != "La":
        refused(encoded(Image.new(mode, (3, 4)), "TIFF"), f"mode {mode} ", "8-bit")


@pytest.mark.parametrize("container", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation(container: str) -> None:
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    content = encoded(frames[0], container, save_all=True, append_images=frames[1:], duration=50)
    with Image.open(io.BytesIO(content)) as animation:
        assert getattr(animation, "n_frames", 1) == 3
        animation.seek(2)
        third = rgb_of(animation)
    assert rgb_of(content)[8, 12].argmax() == 0  # red, whatever the codec makes of 255
    assert third[8, 12].argmax() == 2  # the caller's own image stays where it stands


def turned(shown: Pixels, orientation: int) -> Pixels:
    """The stored pixels that an EXIF orientation turns into the shown ones."""
    return {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.swapaxes(0, 1),
        6: np.rot90(shown),
        7: shown[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(shown, -1),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("container", ["PNG", "WEBP", "TIFF"])
def test_exif_orientation(container: str, orientation: int) -> None:
    shown = noise(np.random.default_rng(8), 4, 6, 3)
    stored = np.ascontiguousarray(turned(shown, orientation))
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if container == "WEBP" else {}
    content = encoded(Image.fromarray(stored), container, exif=exif, **options)
    np.testing.assert_array_equal(rgb_of(content, exif_transpose=True), shown)
    # ignored by default; a TIFF's is a part of its format, and Pillow has applied it by then, once
    np.testing.assert_array_equal(rgb_of(content), shown if container == "TIFF" else stored)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_do_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    pixels = noise(np.random.default_rng(9), 4, 6, 3)
    content = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    np.testing.assert_array_equal(rgb_of(content, exif_transpose=True), pixels)


def test_16_bit_grey_can_be_turned() -> None:
    levels = np.arange(6, dtype=np.uint16).reshape(2, 3) * 4096
    exif = Image.Exif()
    exif[274] = 6
    content = encoded(Image.fromarray(levels), "PNG", exif=exif)
    np.testing.assert_array_equal(rgb_of(content, exif_transpose=True)[..., 0], np.rot90(levels >> 8, -1))


# Sources


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    pixels = noise(np.random.default_rng(10), 40, 90, 3)
    content = encoded(Image.fromarray(pixels), "PNG")
    path = tmp_path / "a picture.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76)).rstrip("=")
    expected = preprocess(pixels, SMALL)
    sources: list[Any] = [
        path,
        str(path),
        content,
        bytearray(content),
        memoryview(content),
        io.BytesIO(content),
        Image.fromarray(pixels),
        Image.open(path),  # not loaded yet
        f"data:image/png;base64,{text}",
        f"DATA:;charset=x;BASE64,{wrapped}",  # as browsers: any case, white space, missing padding
        f"data:image/png;base64,{urllib.parse.quote(text, safe='')}",
        f"data:image/jpeg,{urllib.parse.quote(content)}",  # the type is not believed, the content is
    ]
    for source in sources:
        ours = preprocess(source, SMALL)
        np.testing.assert_array_equal(ours, expected, err_msg=str(source)[:60])
        assert ours.flags.writeable and ours.flags.c_contiguous


def test_file_objects_are_read_from_where_they_stand_and_left_open(tmp_path: Path) -> None:
    pixels = noise(np.random.default_rng(11), 8, 8, 3)
    content = encoded(Image.fromarray(pixels), "PNG")
    path = tmp_path / "offset.bin"
    path.write_bytes(b"a header of my own" + content)
    for buffering in (-1, 0):
        with open(path, "rb", buffering=buffering) as file:
            file.seek(18)
            np.testing.assert_array_equal(rgb_of(file), pixels)
            assert not file.closed and file.tell() == 18 + len(content)
    reader, writer = os.pipe()  # cannot seek
    with open(reader, "rb") as pipe:
        with open(writer, "wb") as end:
            end.write(content)
        np.testing.assert_array_equal(rgb_of(pipe), pixels)


def test_a_path_that_cannot_seek() -> None:
    """A named pipe, as in `jinaclip encode <(curl ...)`."""
    content = encoded(Image.new("RGB", (5, 5), "#010203"), "PNG")
    reader, writer = os.pipe()
    with open(writer, "wb") as end:
        end.write(content)
    assert rgb_of(f"/dev/fd/{reader}")[0, 0].tolist() == [1, 2, 3]
    os.close(reader)


def test_bad_file_objects(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("hello")
    with open(path) as text:
        refused(text, "text.txt", "str", "expected bytes", "'rb'")
    refused(text, "text.txt", "closed")
    refused(io.StringIO("x"), "file object", "str")
    refused(io.BytesIO(b""), "file object", "is empty")


def test_a_pil_image_is_not_changed() -> None:
    rng = np.random.default_rng(12)
    exif = Image.Exif()
    exif[274] = 6
    palette = Image.frombytes("P", (9, 7), noise(rng, 7, 9).tobytes())
    palette.putpalette(noise(rng, 256, 3).tobytes())
    for content in (
        encoded(palette, "PNG", transparency=b"\0\1\2", exif=exif),
        encoded(Image.fromarray(noise(rng, 7, 9, 4)), "PNG", exif=exif),
        encoded(Image.fromarray(noise(rng, 7, 9).astype(np.uint16)), "PNG"),
    ):
        image, untouched = Image.open(io.BytesIO(content)), Image.open(io.BytesIO(content))
        for exif_transpose in (False, True):
            preprocess(image, SMALL, exif_transpose=exif_transpose)
        assert open_image(image) is image
        assert (image.mode, image.size, image.info) == (untouched.mode, untouched.size, untouched.info)
        assert image.tobytes() == untouched.tobytes() and image.getpalette() == untouched.getpalette()
        assert dict(image.getexif()) == dict(untouched.getexif())


def test_an_rgb_image_is_resized_and_not_changed() -> None:
    """to_rgb hands it through without a copy, so the resize must not write into it."""
    image = Image.fromarray(noise(np.random.default_rng(13), 64, 64, 3))
    before = image.tobytes()
    ours = preprocess(image, SMALL)  # the size fits already: nothing but copies
    ours[:] = 0
    assert image.tobytes() == before


def test_arrays_in_any_memory_layout() -> None:
    base = noise(np.random.default_rng(14), 60, 80, 3)
    views: list[Pixels] = [base[::-1, ::2], np.asfortranarray(base), base.swapaxes(0, 1), base[..., ::-1]]
    for view in views:
        view.flags.writeable = False
        np.testing.assert_array_equal(preprocess(view, SMALL), preprocess(view.copy("C"), SMALL))


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint16", "int8", "bool", "object"])
def test_arrays_of_another_type_are_refused(dtype: str) -> None:
    refused(np.zeros((4, 5, 3), dtype), f"array ({dtype} [4, 5, 3])", "uint8 [height, width, 3]")


@pytest.mark.parametrize(
    "shape", [(4, 5), (4, 5, 1), (4, 5, 4), (3, 4, 5), (1, 4, 5, 3), (0, 5, 3), (5, 0, 3), (0,), ()]
)
def test_arrays_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    refused(np.zeros(shape, np.uint8), f"array (uint8 {list(shape)})", "uint8 [height, width, 3]")


def test_what_is_no_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("these are notes, not pixels")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "missing.png", "missing.png'", "No such file")
    refused(str(tmp_path), repr(str(tmp_path)), "directory")
    refused(tmp_path / "notes.txt", "notes.txt'", "b'these are notes,", "PNG, JPEG")
    refused(tmp_path / "empty.png", "empty.png'", "is empty")
    refused(b"", "bytes (0 bytes)", "is empty")
    refused(b"x" * 1234, "bytes (1234 bytes)", "b'xxxx")
    refused("line\nbreak.png", r"'line\nbreak.png'", "No such file")
    refused("nul\0byte.png", r"'nul\x00byte.png'")
    assert len(refused("A" * 100_000, "AAA")) < 400  # base64 without data: is taken for a path; do not echo it
    refused(None, "NoneType", "expected a path")
    refused([np.zeros((2, 2, 3), np.uint8)], "list", "expected a path")
    refused(Image.new("RGB", (0, 5)), "0 x 5")
    refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PNG, JPEG")  # would run Ghostscript


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("data:image/png;base64", "comma"),
        ("data:", "comma"),
        ("data:,", "is empty"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png;base64,AAAAA", "base64"),
        ("data:image/png;base64,é", "base64"),
        ("data:image/png;base64,aGVsbG8=", "b'hello'"),
        ("data:text/plain,hello", "b'hello'"),
    ],
)
def test_bad_data_uris(uri: str, found: str) -> None:
    assert refused(uri, found).startswith("data: URI: ")


# Hostile files


@cache
def small_files() -> dict[str, bytes]:
    rng = np.random.default_rng(15)
    with Image.open(PHOTOS / "coffee.png") as photo:
        rgb = photo.convert("RGB").resize((24, 16))
    palette, second = rgb.quantize(16), rgb.rotate(180)
    exif = Image.Exif()
    exif[274], exif[271] = 6, "maker"
    return {
        "PNG": encoded(rgb, "PNG"),
        "PNG 16-bit": encoded(Image.fromarray(rng.integers(0, 65536, (16, 24), np.uint16)), "PNG"),
        "PNG palette": encoded(palette, "PNG", transparency=b"\0\x80", exif=exif),
        "PNG animated": encoded(rgb, "PNG", save_all=True, append_images=[second]),
        "JPEG": encoded(rgb, "JPEG", exif=exif),
        "JPEG progressive": encoded(rgb, "JPEG", progressive=True),
        "JPEG CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
        "MPO": encoded(rgb, "MPO", save_all=True, append_images=[second]),
        "JPEG EXIF": damaged_exif(),
        "WEBP": encoded(rgb, "WEBP", exif=exif),
        "WEBP animated": encoded(rgb, "WEBP", save_all=True, append_images=[second], lossless=True),
        "GIF": encoded(palette, "GIF", save_all=True, append_images=[second.quantize(16)]),
        "BMP": encoded(rgb, "BMP"),
        "BMP palette": encoded(palette, "BMP"),
        "TIFF": encoded(rgb, "TIFF", exif=exif),
        "TIFF LZW": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "TIFF JPEG": encoded(rgb, "TIFF", compression="jpeg"),
        "AVIF": encoded(rgb, "AVIF", exif=exif),
        "JPEG2000": encoded(rgb, "JPEG2000"),
        "PPM": encoded(rgb, "PPM"),
    }


def attempt(content: bytes) -> Literal["array", "refused"]:
    """Everything that may happen to a hostile file; whatever else is raised fails the test."""
    try:
        pixels = preprocess(content, SMALL, exif_transpose=True)
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith(f"bytes ({len(content)} bytes): ")
        return "refused"
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    return "array"


@pytest.fixture
def silence(request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Not a word on stdout or stderr from any codec but one; Pillow may warn of damaged metadata."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # under "error" a warning would become an InputError
        yield
    assert not any(issubclass(warning.category, Image.DecompressionBombWarning) for warning in caught)
    out, err = capfd.readouterr()
    # libtiff's error handler writes to stderr; it belongs to the process, and Pillow has no way to set it
    assert out == "" and (err == "" or "[TIFF " in request.node.name)


@pytest.mark.parametrize("name", small_files())
def test_truncated_files(name: str, silence: None) -> None:
    content = small_files()[name]
    assert attempt(content) == "array"
    outcomes = [attempt(content[:end]) for end in sorted({*range(0, 40), *range(40, len(content), 23)})]
    assert outcomes[:8] == ["refused"] * 8  # no container fits in 8 bytes
    assert outcomes.count("refused") > len(outcomes) / 2


@pytest.mark.parametrize("name", small_files())
def test_mutated_files(name: str, silence: None) -> None:
    content = small_files()[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for _ in range(60):
        mutated = bytearray(content)
        for _ in range(int(rng.integers(1, 6))):
            at = int(rng.integers(0, min(len(mutated), 400) if rng.random() < 0.7 else len(mutated)))
            kind = rng.integers(0, 4)
            if kind == 0:
                mutated[at] = int(rng.integers(0, 256))
            elif kind == 1:
                mutated[at] ^= 1 << int(rng.integers(0, 8))
            elif kind == 2:
                del mutated[at : at + int(rng.integers(1, 9))]
            else:
                mutated[at:at] = rng.bytes(int(rng.integers(1, 9)))
        attempt(bytes(mutated))


@pytest.mark.parametrize("side", [10_000, 50_000])  # where Pillow itself only warns, and where it raises
@pytest.mark.parametrize("name", bombs(1))
def test_bombs_are_refused_by_their_headers(name: str, side: int, silence: None) -> None:
    """Nothing follows the header: a decoder that had been started would complain of that instead."""
    refused(bombs(side)[name], f"{side} x {side} pixels", str(MAX_PIXELS))


def test_limit_of_pixels_is_ours_and_exact(monkeypatch: pytest.MonkeyPatch, silence: None) -> None:
    image = Image.new("RGB", (20, 30))
    content = encoded(image, "PNG")
    for source in (content, image, np.asarray(image)):
        assert open_image(source, max_pixels=600).size == (20, 30)
        with pytest.raises(InputError, match="20 x 30 pixels; expected 1 to 599"):
            open_image(source, max_pixels=599)
    for limit in (10, 450, None):  # the host program's own setting: raises below 300, warns below 600, off
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert open_image(content).size == (20, 30)
        assert limit == Image.MAX_IMAGE_PIXELS


def test_damaged_metadata_is_no_reason_to_refuse() -> None:
    """Pillow's warning about it is Pillow's, and goes where the host program sends it."""
    with pytest.warns(UserWarning):
        assert rgb_of(damaged_exif()).shape == (4, 8, 3)
    with pytest.warns(UserWarning):
        assert rgb_of(damaged_exif(), exif_transpose=True).shape == (8, 4, 3)  # its orientation could be read


@pytest.mark.parametrize("action", ["default", "error"])
def test_filters_of_the_host_program_change_nothing(action: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 4)).save(tmp_path / "fine.jpg")
    (tmp_path / "bomb.png").write_bytes(bombs(10_000)["PNG"])
    script = (
        "import numpy, PIL.Image, warnings; before = (PIL.Image.MAX_IMAGE_PIXELS, warnings.filters[:])\n"
        "from jinaclip.preprocessing.image import open_image\n"
        "print(open_image('fine.jpg').size)\n"
        "try: open_image('bomb.png')\n"
        "except ValueError as error: print(error)\n"
        "assert before == (PIL.Image.MAX_IMAGE_PIXELS, warnings.filters)\n"
    )
    command = [sys.executable, "-W", action, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stderr == ""
    limit = f"expected 1 to {MAX_PIXELS} in total"
    assert done.stdout == f"(8, 4)\n'bomb.png': 10000 x 10000 pixels; {limit}\n"


def test_threads_may_share_one_lazily_opened_image() -> None:
    path = PHOTOS / "chelsea.png"
    expected = preprocess(path, SMALL)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            with Image.open(path) as image:
                results = list(pool.map(lambda source: preprocess(source, SMALL), [image, path] * 4))
            assert all(np.array_equal(result, expected) for result in results)


# Addresses


class Site(http.server.BaseHTTPRequestHandler):
    picture = encoded(Image.new("RGB", (6, 4), "#0a141e"), "PNG")
    redirects = {  # noqa: RUF012
        "/moved": "/picture",
        "/file": f"file://{PHOTOS / 'coffee.png'}",
        "/ftp": "ftp://127.0.0.1/picture",
        "/data": "data:image/png;base64," + base64.b64encode(picture).decode(),
        "/loop": "/loop",
    }

    def do_GET(self) -> None:
        if self.path in self.redirects:
            self.send_response(302)
            self.send_header("Location", self.redirects[self.path])
            self.end_headers()
            return
        if self.path not in ("/picture", "/text", "/endless", "/drip", "/cut"):
            self.send_error(404)
            return
        self.send_response(200)
        if self.path == "/cut":
            self.send_header("Content-Length", "100000")
        self.end_headers()
        try:
            if self.path == "/text":
                self.wfile.write(b"<html>no picture")
            while self.path == "/endless":
                self.wfile.write(self.picture * 1000)
            for _ in range(250 if self.path == "/drip" else 0):  # 5 s in all
                self.wfile.write(b"\x89")
                time.sleep(0.02)
            if self.path in ("/picture", "/cut"):
                self.wfile.write(self.picture if self.path == "/picture" else self.picture[:40])
        except OSError:
            pass  # the client has hung up

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_urls_are_refused_unless_allowed(site: str) -> None:
    refused(f"{site}/picture", f"'{site}/picture'", "allow_urls=True")
    refused("HTTPS://example.org/x.png", "allow_urls=True")
    for path in ("/picture", "/moved"):
        pixels = preprocess(site + path, SMALL, allow_urls=True)
        assert (pixels == (10, 20, 30)).all()


def test_urls_that_give_no_picture(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(f"{site}/missing", f"'{site}/missing'", "404", allow_urls=True)
    refused(f"{site}/text", "b'<html>no picture'", "PNG, JPEG", allow_urls=True)
    refused(f"{site}/cut", "cannot be read", allow_urls=True)
    refused(f"{site}/loop", "redirect", allow_urls=True)
    refused("http://127.0.0.1:1/picture", "refused", allow_urls=True)
    refused("http://[half/picture", "'http://[half/picture'", allow_urls=True)
    monkeypatch.setattr(module, "URL_MAX_BYTES", 100_000)
    refused(f"{site}/endless", "100000 bytes", allow_urls=True)
    monkeypatch.setattr(module, "URL_TIMEOUT_S", 0.3)  # every single read is quicker than that
    refused(f"{site}/drip", "0.3 s", allow_urls=True)


@pytest.mark.parametrize("path", ["/file", "/ftp", "/data"])
def test_redirects_stay_with_http(site: str, path: str) -> None:
    refused(site + path, path, allow_urls=True)


# Floats and the manifest


def test_normalise_is_the_publishers_float_input() -> None:
    pixels = noise(np.random.default_rng(16), 3, 64, 64, 3).reshape(3, 64, 64, 3)
    ours = normalise(pixels, SMALL)
    assert ours.dtype == np.float32 and ours.shape == (3, 3, 64, 64) and ours.flags.c_contiguous
    expected = (pixels.astype(np.float64) / 255 - np.array(MEAN)) / np.array(STD)
    # three float32 roundings of values up to 2.7, where one ulp is 2.4e-7; the subtraction can cancel
    np.testing.assert_allclose(ours, expected.transpose(0, 3, 1, 2), rtol=0, atol=1e-6)
    assert normalise(pixels[:0], SMALL).shape == (0, 3, 64, 64)


def test_manifest_survives_json() -> None:
    preprocessing = ImagePreprocessing(size=512, resize_mode="longest", fill_color=3, mean=MEAN, std=STD)
    manifest = preprocessing.to_manifest()
    assert ImagePreprocessing.from_manifest(json.loads(json.dumps(manifest))) == preprocessing
    assert json.loads(json.dumps(manifest)) == manifest and manifest["interpolation"] == "bicubic"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("size", value) for value in (0, -1, 512.0, "512", True, None, [512], 9_460)),
        *(("resize_mode", value) for value in ("crop", None, ["shortest"], 1)),
        *(("interpolation", value) for value in ("bilinear", None, 3)),
        *(("fill_color", value) for value in (-1, 256, 0.5, None, [0, 0, 0])),
        *(("mean", value) for value in ([0.5, 0.5], [0.5] * 4, None, 0.5)),
        *(("mean", value) for value in (["x"] * 3, [math.nan] * 3, [10**400] * 3)),
        *(("std", value) for value in ([0.5, 0.5], None, [0.5, 0.5, 0])),
        *(("std", value) for value in ([-0.5] * 3, [math.inf] * 3, [math.nan] * 3)),
    ],
)
def test_bad_manifests(key: str, value: Any) -> None:
    good = SMALL.to_manifest()
    with pytest.raises(BundleError, match=r"preprocessing: .*expected"):
        ImagePreprocessing.from_manifest(good | {key: value})
    with pytest.raises(BundleError, match=r"preprocessing: .*expected"):
        ImagePreprocessing.from_manifest({name: good[name] for name in good if name != key})
