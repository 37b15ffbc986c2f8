"""Pictures of things, put together from simple shapes. Each function returns pixels [height, width, 3]."""

from __future__ import annotations

import numpy as np

from jinaclip_export.certification.pictures.drawing import (
    Array,
    Canvas,
    Colour,
    as_uint8,
    clouds,
    colour,
    coloured,
    noise,
    palette,
    random_size,
    tuples,
)


def shaded(rng: np.random.Generator, *, texture: float = 0.0) -> Canvas:
    """A canvas with a vertical gradient, mixed with clouds."""
    width, height = random_size(rng)
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None] * np.ones((1, width), np.float32)
    values = down * (1 - texture) + clouds(rng, width, height, 2) * texture
    return Canvas(coloured(values, palette(rng, 3)))


def ridge(rng: np.random.Generator, canvas: Canvas, level: float, rough: float, fill: Colour) -> Array:
    """A range of hills; returns its height [width] as shares of the picture."""
    line: Array = level + (noise(rng, canvas.width, 2, rng.uniform(2, 9))[0] - 0.5) * rough
    xs = np.linspace(0, 1, 60)
    tops = line[np.int64(xs * (canvas.width - 1))]
    canvas.polygon([(0, 1), *((float(x), float(y)) for x, y in zip(xs, tops, strict=True)), (1, 1)], fill)
    return line


def shapes(rng: np.random.Generator) -> Array:
    """Circles, polygons and stars that cover each other."""
    canvas = shaded(rng, texture=0.3)
    for fill in tuples(palette(rng, int(rng.integers(5, 30)))):
        x, y, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.06, 0.4)
        kind = rng.integers(0, 4)
        if kind == 0:
            canvas.ellipse(x, y, radius, fill, ry=radius * rng.uniform(0.3, 1))
        elif kind == 1:
            canvas.box(x, y, x + radius * 1.5, y + radius * rng.uniform(0.4, 1.5), fill)
        else:
            canvas.star(x, y, radius, fill, points=int(rng.integers(2, 9)), inner=rng.uniform(0.2, 1))
    return canvas.pixels()


def hills(rng: np.random.Generator) -> Array:
    """A landscape: sky, a sun, hills and trees."""
    canvas = shaded(rng, texture=rng.uniform(0, 0.7))
    canvas.ellipse(rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.4), rng.uniform(0.04, 0.15), colour(rng, 150))
    levels, colours = np.sort(rng.uniform(0.35, 0.9, 3)), tuples(palette(rng, 5))
    line = np.zeros(canvas.width)
    for level, fill in zip(levels, colours, strict=False):
        line = ridge(rng, canvas, float(level), rng.uniform(0.05, 0.5), fill)
    for _ in range(int(rng.integers(0, 12))):
        x, size = rng.uniform(0.05, 0.95), rng.uniform(0.05, 0.16)
        foot = float(line[int(x * canvas.width)]) + rng.uniform(0.01, 0.1)
        canvas.box(x - size / 12, foot - size, x + size / 12, foot, colours[3])
        if rng.random() < 0.5:
            canvas.ellipse(x, foot - size * 1.2, size * 0.5, colours[4])
        else:
            canvas.polygon(
                [(x - size / 2, foot - size / 2), (x, foot - size * 2), (x + size / 2, foot - size / 2)], colours[4]
            )
    return canvas.pixels()


def sea(rng: np.random.Generator) -> Array:
    """Sailing boats on waves."""
    canvas = shaded(rng, texture=0.5)
    horizon, waves = rng.uniform(0.3, 0.6), tuples(palette(rng, 6))
    for i, fill in enumerate(waves):
        xs = np.linspace(0, 1, 80)
        top = horizon + i * (1 - horizon) / 6
        ys = top + 0.015 * (i + 0.3) * np.sin(xs * rng.uniform(15, 50) + i)
        canvas.polygon([(0, 1), *((float(x), float(y)) for x, y in zip(xs, ys, strict=True)), (1, 1)], fill)
    for _ in range(int(rng.integers(1, 6))):
        x, y, s = rng.uniform(0.1, 0.9), rng.uniform(horizon, 0.9), rng.uniform(0.05, 0.2)
        canvas.polygon([(x - s, y), (x + s, y), (x + s * 0.7, y + s / 2), (x - s * 0.7, y + s / 2)], colour(rng))
        canvas.polygon([(x, y - s * 2), (x, y - s / 10), (x + s, y - s / 10)], colour(rng, 120))
        canvas.polygon(
            [(x - s / 10, y - s * 1.6), (x - s / 10, y - s / 10), (x - s * 0.7, y - s / 10)], colour(rng, 120)
        )
    return canvas.pixels()


def street(rng: np.random.Generator) -> Array:
    """A row of houses with roofs, doors and windows."""
    canvas = shaded(rng, texture=0.4)
    left, colours = -0.05, tuples(palette(rng, 8))
    while left < 1:
        wide, top = rng.uniform(0.12, 0.45), rng.uniform(0.3, 0.6)
        wall, roof, glass, door = (colours[int(i)] for i in rng.integers(0, 8, 4))
        canvas.box(left, top, left + wide, 0.9, wall)
        canvas.polygon(
            [(left - 0.01, top), (left + wide / 2, top - rng.uniform(0.05, 0.25)), (left + wide + 0.01, top)], roof
        )
        rows, columns = int(rng.integers(1, 5)), int(rng.integers(2, 5))
        for r in range(rows):
            for c in range(columns):
                x, y = left + wide * (c + 0.25) / columns, top + (0.62 - top * 0.6) * (r + 0.2) / rows
                canvas.box(x, y, x + wide * 0.5 / columns, y + 0.25 * (0.9 - top) / rows, glass)
        canvas.box(left + wide * 0.4, 0.78, left + wide * 0.6, 0.9, door)
        left += wide + rng.uniform(0, 0.06)
    canvas.box(0, 0.9, 1, 1, colour(rng))
    return canvas.pixels()


def face(rng: np.random.Generator) -> Array:
    """One to four faces with hair, eyes, nose and mouth."""
    canvas = shaded(rng, texture=0.5)
    count = int(rng.integers(1, 5))
    for i in range(count):
        x, y, r = (i + 0.5) / count, rng.uniform(0.4, 0.6), min(0.36, 0.45 * canvas.width / canvas.scale / count)
        skin, hair, shirt = colour(rng, 60, 250), colour(rng, 0, 200), colour(rng)
        canvas.ellipse(x, y + r * 1.9 * canvas.scale / canvas.height, r * 1.1, shirt)
        canvas.ellipse(x, y - r * 0.15, r * 1.05, hair, ry=r * rng.uniform(1.0, 1.4))
        canvas.ellipse(x, y, r * 0.85, skin, ry=r)
        dx, dy = r * canvas.scale / canvas.width, r * canvas.scale / canvas.height
        for side in (-1, 1):
            canvas.ellipse(x + side * dx * 0.35, y - dy * 0.2, r * 0.17, (250, 250, 245), ry=r * 0.1)
            canvas.ellipse(x + side * dx * 0.35, y - dy * 0.2, r * 0.08, colour(rng, 0, 120))
        canvas.polygon([(x, y - dy * 0.1), (x + dx * 0.12, y + dy * 0.25), (x - dx * 0.12, y + dy * 0.25)], hair)
        canvas.ellipse(x, y + dy * 0.55, r * rng.uniform(0.2, 0.4), colour(rng, 80, 220), ry=r * rng.uniform(0.04, 0.2))
    return canvas.pixels()


def skyline(rng: np.random.Generator) -> Array:
    """Towers at night with lit windows."""
    canvas = shaded(rng, texture=0.5)
    canvas = Canvas(as_uint8(canvas.pixels() * rng.uniform(0.3, 0.7)))
    light = tuples(palette(rng, 3) // 2 + 127)
    for x in np.sort(rng.uniform(-0.1, 1, int(rng.integers(8, 20)))):
        wide, top, wall = rng.uniform(0.05, 0.18), rng.uniform(0.1, 0.8), colour(rng, 0, 60)
        canvas.box(x, top, x + wide, 1, wall)
        columns, rows = int(rng.integers(2, 6)), int(rng.integers(4, 20))
        for r, c in np.argwhere(rng.random((rows, columns)) < rng.uniform(0.2, 0.7)):
            a, b = x + wide * (c + 0.3) / columns, top + (1 - top) * (r + 0.3) / rows
            canvas.box(a, b, a + wide * 0.4 / columns, b + 0.4 * (1 - top) / rows, light[int(c) % 3])
    return canvas.pixels()


def stars(rng: np.random.Generator) -> Array:
    """Stars, a planet and a nebula."""
    width, height = random_size(rng)
    mist = clouds(rng, width, height, 2) ** 2
    canvas = Canvas(as_uint8(coloured(mist, palette(rng, 4)) * rng.uniform(0.2, 0.8)))
    for _ in range(int(rng.integers(40, 400))):
        canvas.ellipse(rng.random(), rng.random(), rng.uniform(0.001, 0.006), colour(rng, 150))
    x, y, r = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.05, 0.35)
    canvas.ellipse(x, y, r, colour(rng))
    canvas.ellipse(x, y, r * 1.7, colour(rng, 80), ry=r * 0.12)
    return canvas.pixels()


def flowers(rng: np.random.Generator) -> Array:
    """Flowers with petals on stems."""
    canvas = shaded(rng, texture=0.8)
    leaf = colour(rng, 20, 140)
    for _ in range(int(rng.integers(3, 16))):
        x, y, r, petal = rng.uniform(0.05, 0.95), rng.uniform(0.15, 0.8), rng.uniform(0.05, 0.18), colour(rng)
        canvas.line([(x, y), (x + rng.uniform(-0.1, 0.1), 1)], leaf, 0.012)
        count = int(rng.integers(4, 11))
        for angle in np.arange(count) * 2 * np.pi / count:
            dx, dy = np.cos(angle) * r * canvas.scale / canvas.width, np.sin(angle) * r * canvas.scale / canvas.height
            canvas.ellipse(x + dx * 0.7, y + dy * 0.7, r * 2 / count**0.9, petal)
        canvas.ellipse(x, y, r * 0.35, colour(rng, 100))
    return canvas.pixels()


def fruit(rng: np.random.Generator) -> Array:
    """Round fruit with highlights in a bowl on a table."""
    canvas = shaded(rng)
    canvas.box(0, 0.65, 1, 1, colour(rng))
    for _ in range(int(rng.integers(3, 12))):
        x, y, r, skin = rng.uniform(0.25, 0.75), rng.uniform(0.4, 0.6), rng.uniform(0.06, 0.16), colour(rng, 40)
        canvas.ellipse(x, y, r, skin, ry=r * rng.uniform(0.8, 1.2))
        canvas.ellipse(x - r * 0.3, y - r * 0.4, r * 0.25, tuple(min(255, n + 90) for n in skin))
    xs = np.linspace(0, np.pi, 30)
    bowl = [(float(0.5 + 0.36 * np.cos(a)), float(0.6 + 0.28 * np.sin(a))) for a in xs]
    canvas.polygon(bowl, colour(rng))
    return canvas.pixels()


def fish(rng: np.random.Generator) -> Array:
    """Fish and bubbles in water."""
    canvas = shaded(rng, texture=0.6)
    for _ in range(int(rng.integers(2, 14))):
        x, y, r, skin = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.04, 0.2), colour(rng)
        side = rng.choice([-1, 1]) * canvas.scale / canvas.width
        canvas.polygon([(x, y), (x - side * r * 1.9, y - r * 0.6), (x - side * r * 1.9, y + r * 0.6)], skin)
        canvas.ellipse(x, y, r * 1.3, skin, ry=r * 0.7)
        canvas.ellipse(x + side * r * 0.8, y - r * 0.1, r * 0.12, (240, 240, 240))
        for _ in range(3):
            canvas.ellipse(x + rng.uniform(-0.1, 0.1), y - rng.uniform(0.05, 0.3), 0.01, colour(rng, 170))
    return canvas.pixels()


def cars(rng: np.random.Generator) -> Array:
    """Cars on a road with a dashed line."""
    canvas = shaded(rng, texture=0.5)
    road = rng.uniform(0.5, 0.7)
    canvas.box(0, road, 1, 1, colour(rng, 20, 130))
    for x in np.arange(0, 1, 0.12):
        canvas.box(x, (road + 1) / 2, x + 0.06, (road + 1) / 2 + 0.015, colour(rng, 190))
    for _ in range(int(rng.integers(1, 5))):
        x, y, s, paint = rng.uniform(0.1, 0.8), rng.uniform(road, 0.85), rng.uniform(0.07, 0.2), colour(rng)
        canvas.polygon(
            [(x - s * 0.6, y - s * 0.5), (x - s * 0.3, y - s), (x + s * 0.4, y - s), (x + s * 0.8, y - s * 0.5)], paint
        )
        canvas.polygon(
            [
                (x - s * 0.35, y - s * 0.5),
                (x - s * 0.2, y - s * 0.9),
                (x + s * 0.3, y - s * 0.9),
                (x + s * 0.5, y - s * 0.5),
            ],
            colour(rng, 120),
        )
        canvas.box(x - s, y - s * 0.5, x + s * 1.1, y, paint)
        for wheel in (-0.55, 0.65):
            canvas.ellipse(x + s * wheel, y, s * 0.28, (20, 20, 22))
            canvas.ellipse(x + s * wheel, y, s * 0.12, (170, 170, 175))
    return canvas.pixels()


def cat(rng: np.random.Generator) -> Array:
    """An animal from the front: ears, eyes, whiskers, stripes."""
    canvas = shaded(rng, texture=0.7)
    fur, dark, eye = colour(rng, 40), colour(rng, 0, 120), colour(rng, 80)
    x, y, r = rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.5), rng.uniform(0.16, 0.3)
    dx, dy = r * canvas.scale / canvas.width, r * canvas.scale / canvas.height
    canvas.ellipse(x, y + dy * 2, r * 1.2, fur, ry=r * 1.5)
    for side in (-1, 1):
        tip = rng.uniform(1.0, 2.2)
        canvas.polygon(
            [(x + side * dx * 0.2, y - dy * 0.7), (x + side * dx * 0.9, y - dy * tip), (x + side * dx, y)], fur
        )
    canvas.ellipse(x, y, r * 1.05, fur, ry=r * 0.9)
    for i in range(int(rng.integers(0, 6))):
        canvas.line([(x - dx * 0.4, y - dy * (0.8 - i * 0.08)), (x + dx * 0.4, y - dy * (0.8 - i * 0.08))], dark, 0.01)
    for side in (-1, 1):
        canvas.ellipse(x + side * dx * 0.4, y - dy * 0.1, r * 0.2, eye)
        canvas.ellipse(x + side * dx * 0.4, y - dy * 0.1, r * 0.07, (10, 10, 10), ry=r * 0.18)
        for i in (-1, 0, 1):
            canvas.line(
                [(x + side * dx * 0.2, y + dy * 0.4), (x + side * dx * 1.6, y + dy * (0.4 + i * 0.2))], dark, 0.004
            )
    canvas.polygon(
        [(x - dx * 0.12, y + dy * 0.25), (x + dx * 0.12, y + dy * 0.25), (x, y + dy * 0.42)], (200, 110, 120)
    )
    return canvas.pixels()


def tree(rng: np.random.Generator) -> Array:
    """A bare or a leafy tree whose branches fork again and again."""
    canvas = shaded(rng, texture=0.5)
    bark, leaves, spread, leafy = (
        colour(rng, 0, 110),
        tuples(palette(rng, 4)),
        rng.uniform(0.25, 0.7),
        rng.random() < 0.5,
    )

    def branch(x: float, y: float, angle: float, length: float, depth: int) -> None:
        to = (
            x + np.sin(angle) * length * canvas.scale / canvas.width,
            y - np.cos(angle) * length * canvas.scale / canvas.height,
        )
        canvas.line([(x, y), to], bark, 0.004 * depth)
        if depth > 1:
            for turn in (-spread, spread * rng.uniform(0.4, 1.2)):
                branch(*to, angle + turn, length * rng.uniform(0.65, 0.85), depth - 1)
        elif leafy:
            canvas.ellipse(*to, 0.02, leaves[int(rng.integers(0, 4))])

    branch(rng.uniform(0.35, 0.65), 1.0, rng.uniform(-0.1, 0.1), rng.uniform(0.2, 0.3), 8)
    return canvas.pixels()
