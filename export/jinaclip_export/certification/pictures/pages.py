"""Pictures of documents: pages, signs, plots, maps, tables. Each function returns pixels [height, width, 3]."""

from __future__ import annotations

import numpy as np

from jinaclip_export.certification.pictures.drawing import (
    Array,
    Canvas,
    Colour,
    colour,
    coloured,
    noise,
    palette,
    random_size,
    tuples,
)

SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe qui ro su ta ve wo xi yu zan der lin mor tek".split()


def words(rng: np.random.Generator, count: int) -> str:
    """Words without a meaning."""
    made = ("".join(rng.choice(SYLLABLES, int(rng.integers(1, 5)))) for _ in range(count))
    return " ".join(made)


def sheet(rng: np.random.Generator, low: int = 150) -> Canvas:
    """An empty sheet with the colour of paper, or of a dark screen."""
    width, height = random_size(rng)
    paper = colour(rng, low, 255) if rng.random() < 0.7 else colour(rng, 0, 90)
    return Canvas(np.full((height, width, 3), paper, np.uint8))


def ink(rng: np.random.Generator, canvas: Canvas) -> Colour:
    """A colour that can be read on the sheet."""
    return colour(rng, 170, 255) if canvas.pixels()[0, 0].mean() < 128 else colour(rng, 0, 110)


def page(rng: np.random.Generator) -> Array:
    """A page of text: a title, and paragraphs in one or two columns."""
    canvas = sheet(rng)
    dark, columns, zoom = ink(rng, canvas), int(rng.integers(1, 3)), int(rng.integers(1, 3))
    canvas.text(0.08, 0.05, words(rng, 2).title(), colour(rng, 0, 200), zoom + 1)
    line = 13 * zoom / canvas.height
    for column in range(columns):
        left, y = 0.08 + column * 0.45, 0.17
        fits = int(0.84 / columns * canvas.width / (6 * zoom))
        while y < 0.92:
            end = fits if rng.random() < 0.85 else int(fits * rng.uniform(0.3, 0.8))
            canvas.text(left, y, words(rng, max(1, fits // 4))[: max(end - 2, 3)], dark, zoom)
            y += line * (1 if end == fits else 2)
    return canvas.pixels()


def sign(rng: np.random.Generator) -> Array:
    """A sign with large letters on a plain or a textured ground."""
    width, height = random_size(rng)
    canvas = Canvas(coloured(noise(rng, width, height, 3), palette(rng, 2)))
    plate = colour(rng)
    if rng.random() < 0.5:
        canvas.box(0.1, 0.15, 0.9, 0.85, plate)
    else:
        canvas.star(0.5, 0.5, 0.48, plate, points=4, inner=1)
    text = words(rng, 1)[: int(rng.integers(2, 8))].upper()
    zoom = max(2, int(canvas.width * 0.6 / (6 * len(text))))
    letters = (255, 255, 255) if sum(plate) < 380 else (10, 10, 10)
    canvas.text(0.2, 0.5 - 6 * zoom / canvas.height, text, letters, min(zoom, canvas.height // 14))
    return canvas.pixels()


def bars(rng: np.random.Generator) -> Array:
    """A bar chart with axes and labels."""
    canvas = sheet(rng)
    dark, count = ink(rng, canvas), int(rng.integers(3, 14))
    colours, tops = tuples(palette(rng, count)), rng.uniform(0.15, 0.8, count)
    for i, top in enumerate(tops):
        x = 0.12 + 0.84 * i / count
        canvas.box(x, float(top), x + 0.6 / count, 0.88, colours[i if count < 6 else 0])
        canvas.text(x, 0.9, words(rng, 1)[:3], dark)
    canvas.line([(0.1, 0.1), (0.1, 0.88), (0.97, 0.88)], dark, 0.006)
    canvas.text(0.3, 0.03, words(rng, 3), dark, 2)
    return canvas.pixels()


def curves(rng: np.random.Generator) -> Array:
    """A plot of lines, or of points, with a grid."""
    canvas = sheet(rng)
    dark = ink(rng, canvas)
    for t in np.linspace(0.1, 0.9, 6):
        canvas.line([(0.1, float(t)), (0.95, float(t))], (160, 160, 160), 0.002)
        canvas.line([(0.1 + float(t - 0.1) * 1.06, 0.1), (0.1 + float(t - 0.1) * 1.06, 0.9)], (160, 160, 160), 0.002)
    points = rng.random() < 0.4
    for fill in tuples(palette(rng, int(rng.integers(1, 6)))):
        xs = np.linspace(0.1, 0.95, 120)
        ys = np.clip(0.5 + np.cumsum(rng.normal(0, rng.uniform(0.005, 0.04), 120)) + rng.uniform(-0.3, 0.3), 0.1, 0.9)
        if points:
            for x, y in zip(xs, ys + rng.normal(0, 0.05, 120), strict=True):
                canvas.ellipse(float(x), float(y), 0.01, fill)
        else:
            canvas.line([(float(x), float(y)) for x, y in zip(xs, ys, strict=True)], fill, rng.uniform(0.004, 0.015))
    canvas.line([(0.1, 0.1), (0.1, 0.9), (0.95, 0.9)], dark, 0.006)
    return canvas.pixels()


def pie(rng: np.random.Generator) -> Array:
    """A pie chart with a legend."""
    canvas = sheet(rng)
    count = int(rng.integers(3, 9))
    colours, ends = tuples(palette(rng, count)), np.cumsum(rng.dirichlet(np.ones(count))) * 2 * np.pi
    x, y, r, start = rng.uniform(0.35, 0.5), rng.uniform(0.4, 0.6), rng.uniform(0.25, 0.42), 0.0
    for i, end in enumerate(ends):
        angles = np.linspace(start, end, 40)
        rim = zip(
            x + np.cos(angles) * r * canvas.scale / canvas.width,
            y + np.sin(angles) * r * canvas.scale / canvas.height,
            strict=True,
        )
        canvas.polygon([(x, y), *((float(a), float(b)) for a, b in rim)], colours[i])
        canvas.box(0.84, 0.1 + i * 0.07, 0.87, 0.14 + i * 0.07, colours[i])
        start = float(end)
    canvas.text(0.05, 0.03, words(rng, 2), ink(rng, canvas), 2)
    return canvas.pixels()


def town_map(rng: np.random.Generator) -> Array:
    """A map: blocks, streets, a river, a park and names."""
    canvas = sheet(rng, 180)
    land, street, water, park = colour(rng, 150), colour(rng, 200), colour(rng, 60, 220), colour(rng, 80, 210)
    canvas.box(0, 0, 1, 1, land)
    x, y, r = rng.random(), rng.random(), rng.uniform(0.1, 0.4)
    canvas.star(x, y, r, park, points=3, inner=0.9)
    xs = np.linspace(-0.05, 1.05, 30)
    bends = rng.uniform(0.2, 0.8) + 0.15 * np.sin(xs * rng.uniform(3, 9) + rng.uniform(0, 6))
    across = [(float(a), float(b)) for a, b in zip(xs, bends, strict=True)]
    canvas.line(across if rng.random() < 0.5 else [(b, a) for a, b in across], water, rng.uniform(0.03, 0.12))
    for _ in range(int(rng.integers(6, 24))):
        a, b = rng.uniform(-0.1, 1.1, 2), rng.uniform(-0.1, 1.1, 2)
        far = 1.5 * (b - a) / max(np.hypot(*(b - a)), 0.05)
        canvas.line([tuple(a - far), tuple(a + far)], street, rng.choice([0.006, 0.012, 0.025]))
    for _ in range(8):
        canvas.text(rng.uniform(0, 0.8), rng.uniform(0, 0.95), words(rng, 1).title(), (70, 60, 60))
    return canvas.pixels()


def table(rng: np.random.Generator) -> Array:
    """A table of numbers with a coloured head."""
    canvas = sheet(rng)
    dark, head, rows, columns = ink(rng, canvas), colour(rng), int(rng.integers(5, 22)), int(rng.integers(2, 7))
    canvas.box(0.03, 0.03, 0.97, 0.03 + 0.94 / rows, head)
    for r in range(rows):
        top = 0.03 + 0.94 * r / rows
        canvas.line([(0.03, top), (0.97, top)], dark, 0.003)
        for c in range(columns):
            said = words(rng, 1)[:7] if r == 0 or c == 0 else f"{rng.uniform(0, 1000):.1f}"
            canvas.text(0.05 + 0.92 * c / columns, top + 0.2 / rows, said, dark)
    for c in range(columns + 1):
        canvas.line([(0.03 + 0.94 * c / columns, 0.03), (0.03 + 0.94 * c / columns, 0.97)], dark, 0.003)
    return canvas.pixels()


def scribble(rng: np.random.Generator) -> Array:
    """Lines of handwriting, or a drawing by a small child."""
    canvas = sheet(rng)
    wild = rng.random() < 0.5
    for i in range(int(rng.integers(3, 14))):
        t = np.linspace(0, 1, 200)
        if wild:
            path = np.cumsum(rng.normal(0, 1, (200, 2)), axis=0)
            path = rng.uniform(0.2, 0.8, 2) + path / np.abs(path).max() * rng.uniform(0.1, 0.5)
        else:
            loops = (
                0.012 * np.sin(t * rng.uniform(150, 250)),
                0.02 * np.cos(t * rng.uniform(150, 250)) + rng.normal(0, 0.004, 200),
            )
            path = np.stack([0.08 + 0.8 * t + loops[0], 0.1 + 0.065 * i + loops[1]], axis=1)
        canvas.line([(float(a), float(b)) for a, b in path], ink(rng, canvas), 0.02 if wild else 0.006)
    return canvas.pixels()


def board(rng: np.random.Generator) -> Array:
    """A board game, a crossword or a code of black and white squares."""
    width, _ = random_size(rng)
    count, colours = int(rng.integers(6, 30)), palette(rng, 2)
    cells = rng.random((count, count)) < rng.uniform(0.2, 0.6)
    if rng.random() < 0.4:
        count = 8
        cells = np.indices((8, 8)).sum(axis=0) % 2 == 1
    step = max(1, width // count)
    canvas = Canvas(colours[np.int64(cells)].repeat(step, axis=0).repeat(step, axis=1))
    for r, c in np.argwhere(rng.random((count, count)) < rng.uniform(0, 0.3)):
        canvas.ellipse((c + 0.5) / count, (r + 0.5) / count, 0.35 / count, colour(rng))
    return canvas.pixels()


def music(rng: np.random.Generator) -> Array:
    """Sheet music: staves with notes."""
    canvas = sheet(rng)
    dark, staves = ink(rng, canvas), int(rng.integers(2, 7))
    for s in range(staves):
        top, gap = (s + 0.25) / staves, 0.1 / staves
        for i in range(5):
            canvas.line([(0.04, top + i * gap), (0.96, top + i * gap)], dark, 0.004)
        for x in np.arange(0.1, 0.95, rng.uniform(0.03, 0.08)):
            y, up = top + gap * rng.integers(0, 9) / 2, rng.choice([-1, 1])
            canvas.ellipse(float(x), float(y), 0.05 / staves, dark, ry=0.04 / staves)
            canvas.line([(float(x) + 0.004, float(y)), (float(x) + 0.004, float(y) - up * 3 * gap)], dark, 0.005)
    return canvas.pixels()


def circuit(rng: np.random.Generator) -> Array:
    """A circuit board: lanes with corners, contacts and chips."""
    width, height = random_size(rng)
    board_, lane, metal = palette(rng, 1)[0], colour(rng, 60), colour(rng, 140)
    canvas = Canvas(np.full((height, width, 3), board_, np.uint8))
    for _ in range(int(rng.integers(15, 60))):
        x, y = rng.integers(0, 25, 2) / 25
        path = [(float(x), float(y))]
        for i in range(int(rng.integers(2, 6))):
            far = rng.integers(-6, 7) / 25
            x, y = (x + far, y) if i % 2 else (x, y + far)
            path.append((float(x), float(y)))
        canvas.line(path, lane, 0.008)
        canvas.ellipse(*path[0], 0.012, metal)
        canvas.ellipse(*path[-1], 0.012, metal)
    for _ in range(int(rng.integers(1, 7))):
        x, y, w, h = rng.uniform(0, 0.8), rng.uniform(0, 0.8), rng.uniform(0.06, 0.3), rng.uniform(0.05, 0.2)
        canvas.box(x, y, x + w, y + h, colour(rng, 0, 70))
        canvas.text(x + 0.01, y + 0.02, words(rng, 1).upper()[:5], (210, 210, 210))
    return canvas.pixels()
