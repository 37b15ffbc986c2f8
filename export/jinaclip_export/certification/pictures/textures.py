"""Pictures without things: surfaces, patterns and formulas. Each function returns pixels [height, width, 3]."""

from __future__ import annotations

import numpy as np

from jinaclip_export.certification.pictures.drawing import (
    Array,
    as_uint8,
    blend,
    clouds,
    coloured,
    grid,
    noise,
    palette,
    random_size,
)


def gradient(rng: np.random.Generator) -> Array:
    """Two to four colours that pass into each other, along a line or around a point."""
    width, height = random_size(rng)
    x, y = grid(width, height)
    angle = rng.uniform(0, 2 * np.pi)
    values = 0.5 + 0.6 * (x * np.cos(angle) + y * np.sin(angle))
    if rng.random() < 0.5:
        values = np.hypot(x - rng.uniform(-0.6, 0.6), y - rng.uniform(-0.6, 0.6))
    return coloured(values, palette(rng, int(rng.integers(2, 5))))


def sky(rng: np.random.Generator) -> Array:
    """Clouds in any colours."""
    width, height = random_size(rng)
    values = clouds(rng, width, height, rng.uniform(1.5, 6))
    return coloured(values ** rng.uniform(0.5, 2), palette(rng, int(rng.integers(2, 6))))


def marble(rng: np.random.Generator) -> Array:
    """Veins: waves that noise bends."""
    width, height = random_size(rng)
    x, y = grid(width, height)
    bent = clouds(rng, width, height, 3) * rng.uniform(4, 14)
    values = np.abs(np.sin(rng.uniform(3, 12) * (x + y * rng.uniform(-1, 1)) + bent))
    return coloured(values ** rng.uniform(0.3, 1.5), palette(rng, 3))


def wood(rng: np.random.Generator) -> Array:
    """Rings around a point outside, stretched, with grain."""
    width, height = random_size(rng)
    x, y = grid(width, height)
    stretch = rng.uniform(2, 8)
    rings = np.hypot(x / stretch - rng.uniform(-0.5, 0.5), y * 1.5 + rng.uniform(0.5, 1.5))
    values = (rings * rng.uniform(3, 9) + noise(rng, width, height, 6)) % 1
    return coloured(values * 0.8 + 0.2 * rng.random((height, width)), palette(rng, 2))


def mosaic(rng: np.random.Generator) -> Array:
    """The regions nearest to random points, each in its colour, with or without joints."""
    width, height = random_size(rng)
    step = 2
    x, y = grid(width // step, height // step)
    seeds = rng.uniform(-1, 1, (int(rng.integers(10, 60)), 2)) * [x.max(), y.max()]
    colours = palette(rng, len(seeds))
    first = np.full((height // step, width // step), 9, np.float32)
    second, owner = first.copy(), np.zeros(first.shape, np.int64)
    for i, (a, b) in enumerate(seeds):
        away = (x - np.float32(a)) ** 2 + (y - np.float32(b)) ** 2
        nearer = away < first
        second = np.where(nearer, first, np.minimum(second, away))
        owner[nearer] = i
        first = np.minimum(first, away)
    pixels = colours[owner]
    if rng.random() < 0.6:
        pixels[np.sqrt(second) - np.sqrt(first) < 0.015] = palette(rng, 1)[0]
    return pixels.repeat(step, axis=0).repeat(step, axis=1)


def stripes(rng: np.random.Generator) -> Array:
    """Stripes of different widths, straight or waved."""
    width, height = random_size(rng)
    x, y = grid(width, height)
    angle, count = rng.uniform(0, np.pi), rng.uniform(3, 18)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    waves = rng.uniform(0, 0.15) * np.sin(across * rng.uniform(2, 12))
    colours = palette(rng, int(rng.integers(3, 9)))
    pixels: Array = colours[np.int64(np.floor((along + waves + 3) * count)) % len(colours)]
    return pixels


def floor(rng: np.random.Generator) -> Array:
    """A checked floor seen at an angle, under a wall."""
    width, height = random_size(rng)
    x, y = grid(width, height)
    horizon = rng.uniform(-0.4, 0)
    depth = 1 / np.maximum(y - horizon, 0.004)
    turn, count = rng.uniform(-0.8, 0.8), rng.uniform(1.5, 5)
    a, b = x * depth, depth
    columns = np.floor((a * np.cos(turn) - b * np.sin(turn)) * count)
    rows = np.floor((a * np.sin(turn) + b * np.cos(turn)) * count)
    colours = palette(rng, 4)
    tiles = colours[np.int64((columns + rows) % 2)]
    fade = np.clip(depth / 12, 0, 1) * np.ones_like(x)
    wall = coloured((y - y.min()) * np.ones_like(x), colours[2:])
    return np.where((y > horizon)[..., None], blend(tiles, wall, fade), wall)


def fractal(rng: np.random.Generator) -> Array:
    """A Julia set, coloured by the number of steps that a point needs to leave."""
    width, height = random_size(rng)
    step = 2
    x, y = grid(width // step, height // step)
    z = np.complex64(1.4) * (x + 1j * y).astype(np.complex64)
    angle = rng.uniform(0, 2 * np.pi)
    c = np.complex64(0.5 * np.exp(1j * angle) - 0.25 * np.exp(2j * angle)) * np.complex64(rng.uniform(1.0, 1.12))
    count = np.zeros(z.shape, np.float32)
    for _ in range(30):
        inside = np.abs(z) < 4
        count += inside
        z = np.where(inside, z * z + c, z)
    pixels = coloured((count / 30) ** rng.uniform(0.4, 1), palette(rng, 6))
    return pixels.repeat(step, axis=0).repeat(step, axis=1)


def lights(rng: np.random.Generator) -> Array:
    """Blurred spots of light on a dark ground."""
    width, height = random_size(rng)
    x, y = grid(width, height)
    total = np.float32(palette(rng, 1)[0] / 4) * np.ones((height, width, 1), np.float32)
    for row in palette(rng, int(rng.integers(8, 25))):
        radius = rng.uniform(0.03, 0.25)
        away = np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-0.7, 0.7)) / radius
        total += (np.clip((1 - away) * 6, 0, 1) * 0.5)[..., None] * np.float32(row)
    return as_uint8(np.clip(total, 0, 255))


def bricks(rng: np.random.Generator) -> Array:
    """A wall of bricks or tiles with joints and stains."""
    width, height = random_size(rng)
    rows, columns = int(rng.integers(4, 16)), int(rng.integers(3, 9))
    v = np.arange(height)[:, None] * rows / height
    u = np.arange(width)[None] * columns / width + (np.int64(v) % 2) * rng.choice([0, 0.5])
    colours = palette(rng, 5)
    shades = rng.integers(0, 4, (rows, columns + 2))
    pixels = colours[shades[np.int64(v), np.int64(u)]]
    joint = (u % 1 < 0.06) | (v % 1 < 0.12)
    pixels[joint] = colours[4]
    return as_uint8(pixels * (0.6 + 0.4 * clouds(rng, width, height, 4, 6))[..., None])


def plaid(rng: np.random.Generator) -> Array:
    """Woven cloth: coloured threads across coloured threads."""
    width, height = random_size(rng)
    colours = palette(rng, 5)
    period = int(rng.integers(40, 160))
    order = colours[np.sort(rng.integers(0, 5, period))]
    across = order[np.arange(width) % period][None]
    along = order[np.arange(height) % period][:, None]
    over = (np.arange(width)[None] + np.arange(height)[:, None]) // 3 % 2
    return np.where(over[..., None] == 1, across, along)


def rings(rng: np.random.Generator) -> Array:
    """Circles around two points that interfere."""
    width, height = random_size(rng)
    x, y = grid(width, height)
    total = np.zeros((height, width), np.float32)
    for _ in range(2):
        away = np.hypot(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1))
        total += np.sin(away * np.float32(rng.uniform(15, 70)))
    values = total / 4 + 0.5
    return coloured(np.round(values) if rng.random() < 0.4 else values, palette(rng, 3))


def dots(rng: np.random.Generator) -> Array:
    """A halftone print: dots of different sizes in a grid."""
    width, height = random_size(rng)
    cells = rng.uniform(12, 40)
    x, y = grid(width, height)
    angle = rng.uniform(0, np.pi / 2)
    u, v = (x * np.cos(angle) + y * np.sin(angle)) * cells, (y * np.cos(angle) - x * np.sin(angle)) * cells
    size = 0.1 + 0.55 * noise(rng, width, height, 2.5)
    pixels: Array = palette(rng, 2)[np.int64(np.hypot(u % 1 - 0.5, v % 1 - 0.5) < size)]
    return pixels


def pebbles(rng: np.random.Generator) -> Array:
    """A rough surface lit from one side."""
    width, height = random_size(rng)
    relief = clouds(rng, width, height, rng.uniform(6, 30), 3)
    slope = np.roll(relief, 2, axis=0) - relief + np.roll(relief, 2, axis=1) - relief
    return coloured(0.5 + slope * rng.uniform(2, 6), palette(rng, 3))


def grain(rng: np.random.Generator) -> Array:
    """Random squares: a picture of poor resolution."""
    width, height = random_size(rng)
    step = int(rng.choice([2, 5, 12, 30, 60]))
    colours = palette(rng, int(rng.integers(2, 8)))
    rows, columns = -(-height // step), -(-width // step)
    blocks = colours[rng.integers(0, len(colours), (rows, columns))]
    return blocks.repeat(step, axis=0).repeat(step, axis=1)[:height, :width]
