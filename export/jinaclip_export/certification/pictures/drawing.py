"""What the generated pictures share: sizes, palettes, smooth noise, simple shapes and the finish.

Colours are uint8 arrays or tuples of integers, values are float32 arrays from 0 to 1. Shapes are drawn without
antialiasing, so that their pixels do not depend on the version of Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Array = np.ndarray
Colour = tuple[int, ...]
Point = tuple[float, float]


def as_uint8(values: Array) -> Array:
    """Values from 0 to 255, rounded down."""
    return np.asarray(values).astype(np.uint8)


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height: up to 900, and about 120,000 to 240,000 pixels."""
    area, aspect = rng.uniform(120_000, 240_000), np.exp(rng.uniform(-0.8, 0.8))
    return int(min(900, (area * aspect) ** 0.5)), int(min(900, (area / aspect) ** 0.5))


def palette(rng: np.random.Generator, count: int) -> Array:
    """Random colours [count, 3] that have something in common: saturation, brightness or a tint."""
    colours = rng.random((count, 3))
    grey = colours.mean(axis=1, keepdims=True)
    colours = grey + (colours - grey) * rng.uniform(0.3, 1.8)
    colours += (rng.random(3) - colours) * rng.uniform(0, 0.6)
    low = rng.uniform(0, 0.45)
    high = rng.uniform(low + 0.45, 1)
    if count > 1:  # at least some contrast
        colours = (colours - colours.min()) / (colours.max() - colours.min())
    return np.asarray(np.clip(low + colours * (high - low), 0, 1) * 255, np.uint8)


def colour(rng: np.random.Generator, low: int = 0, high: int = 255) -> Colour:
    """One random colour with components from low to high."""
    return tuple(int(n) for n in rng.integers(low, high + 1, 3))


def tuples(colours: Array) -> list[Colour]:
    return [tuple(int(n) for n in row) for row in colours]


def grid(width: int, height: int) -> tuple[Array, Array]:
    """x [1, width] and y [height, 1], from -1 to 1 along the longer side."""
    longer = max(width, height) / 2
    x = (np.arange(width, dtype=np.float32) - width / 2) / longer
    y = (np.arange(height, dtype=np.float32) - height / 2) / longer
    return x.astype(np.float32)[None], y.astype(np.float32)[:, None]


def noise(rng: np.random.Generator, width: int, height: int, cells: float) -> Array:
    """Smooth random values [height, width] with about `cells` hills along the longer side."""
    longer = max(width, height)
    shape = max(2, round(cells * height / longer)) + 1, max(2, round(cells * width / longer)) + 1
    small = Image.fromarray(rng.random(shape).astype(np.float32))
    values: Array = np.clip(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)
    return values


def clouds(rng: np.random.Generator, width: int, height: int, cells: float = 3.0, octaves: int = 5) -> Array:
    """Noise of several scales, stretched to 0 to 1."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        total += noise(rng, width, height, cells * 2**octave) * np.float32(0.5**octave)
    low, high = total.min(), total.max()
    values: Array = (total - low) / max(high - low, np.float32(1e-6))
    return values


def coloured(values: Array, colours: Array) -> Array:
    """Pixels [..., 3] for values: 0 is the first colour, 1 the last, and those between are blended."""
    at = np.linspace(0, len(colours) - 1, 256)
    table = np.stack([np.interp(at, np.arange(len(colours)), colours[:, i]) for i in range(3)], axis=1)
    pixels: Array = as_uint8(table)[as_uint8(np.clip(values, 0, 1) * 255)]
    return pixels


def blend(below: Array, above: Array, share: Array) -> Array:
    """`above` over `below` with a share [height, width] from 0 to 1."""
    share = np.asarray(share, np.float32)[..., None]
    return as_uint8(below * (1 - share) + above * share)


class Canvas:
    """A picture that shapes are drawn on. Coordinates are shares of the width and the height.

    Args:
        background: the pixels to draw on, uint8 [height, width, 3].
    """

    def __init__(self, background: Array) -> None:
        self.image = Image.fromarray(np.ascontiguousarray(background))
        self.width, self.height = self.image.size
        self.scale = min(self.image.size)
        self.draw = ImageDraw.Draw(self.image)

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        self.draw.polygon([(x * self.width, y * self.height) for x, y in points], fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        corners = (left * self.width, top * self.height), (right * self.width, bottom * self.height)
        self.draw.rectangle(corners, fill=fill)

    def ellipse(self, x: float, y: float, rx: float, fill: Colour, ry: float | None = None) -> None:
        """An ellipse with radii in shares of the shorter side."""
        a, b, cx, cy = rx * self.scale, (rx if ry is None else ry) * self.scale, x * self.width, y * self.height
        self.draw.ellipse((cx - a, cy - b, cx + a, cy + b), fill=fill)

    def line(self, points: Sequence[Point], fill: Colour, width: float = 0.01) -> None:
        pixels = [(x * self.width, y * self.height) for x, y in points]
        self.draw.line(pixels, fill=fill, width=max(1, round(width * self.scale)))

    def star(self, x: float, y: float, radius: float, fill: Colour, *, points: int = 5, inner: float = 0.4) -> None:
        """A star; with `inner` = 1 a regular polygon of twice as many corners."""
        angles = np.arange(2 * points) * np.pi / points
        radii = np.where(np.arange(2 * points) % 2, inner, 1) * radius * self.scale
        corners = zip(x + np.sin(angles) * radii / self.width, y - np.cos(angles) * radii / self.height, strict=True)
        self.polygon([(float(a), float(b)) for a, b in corners], fill)

    def text(self, x: float, y: float, text: str, fill: Colour, zoom: int = 1) -> None:
        """Text in Pillow's bitmap font, enlarged by a whole number."""
        mask = letters(text, zoom)
        self.draw.bitmap((round(x * self.width), round(y * self.height)), mask, fill=fill)

    def pixels(self) -> Array:
        return np.asarray(self.image)


def letters(text: str, zoom: int) -> Image.Image:
    """A text as a mask."""
    font = ImageFont.load_default_imagefont()
    _, _, width, height = (int(n) for n in font.getbbox(text))
    mask = Image.new("1", (max(width, 1), max(height, 1)))
    ImageDraw.Draw(mask).text((0, 0), text, fill=1, font=font)
    return mask.resize((mask.width * zoom, mask.height * zoom), Image.Resampling.NEAREST)


def finished(rng: np.random.Generator, pixels: Array) -> Array:
    """The picture as a camera might have taken it: as it is, grey, dark, pale, grainy, tinted or in uneven light."""
    height, width = pixels.shape[:2]
    way = int(rng.integers(0, 10))
    if way == 0:
        return np.repeat(
            as_uint8((pixels * np.asarray([0.3, 0.59, 0.11], np.float32)).sum(axis=2))[..., None], 3, axis=2
        )
    if way == 1:
        return as_uint8(pixels * rng.uniform(0.4, 0.9, 3))
    if way == 2:
        return as_uint8(255 - (255 - pixels) * rng.uniform(0.4, 0.8, 3))
    if way == 3:
        grain = rng.integers(-40, 41, (height, width, 1))
        return as_uint8(np.clip(pixels.astype(np.int16) + grain, 0, 255))
    return lit(rng, pixels) if way < 7 else pixels


def lit(rng: np.random.Generator, pixels: Array) -> Array:
    """The picture in coloured light that is brighter in some places than in others."""
    height, width = pixels.shape[:2]
    light = coloured(noise(rng, width, height, 2), palette(rng, 3)) + np.float32(30)
    return as_uint8(np.minimum(pixels * (light / light.mean()), 255))


def lying(rng: np.random.Generator, pixels: Array) -> Array:
    """A sheet of paper that lies on a table, turned a little; or the sheet alone."""
    if rng.random() < 0.3:
        return pixels
    height, width = (int(n * rng.uniform(1.1, 1.5)) for n in pixels.shape[:2])
    table = Image.fromarray(coloured(clouds(rng, width, height, rng.uniform(1, 6)), palette(rng, 3)))
    sheet = Image.fromarray(pixels)
    mask = Image.new("L", sheet.size, 255)
    angle, at = rng.uniform(-20, 20), (int(rng.uniform(0, width / 4)), int(rng.uniform(0, height / 4)))
    table.paste(sheet.rotate(angle, expand=True), at, mask.rotate(angle, expand=True))
    return np.asarray(table)
