"""The generated pictures: 39 kinds, six of each, drawn with fixed seeds in less than two seconds.

They have to be as different as photos are, because a certificate judges whether a precision finds the same nearest
items. With the small random model, the largest cosine of two of them is 0.993. Other versions of numpy and Pillow than
those they were made with may change single values by one or two: numpy 2.0 and Pillow 12.0 change 1,113 of 150 million.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from jinaclip_export.certification.pictures import pages, scenes, textures
from jinaclip_export.certification.pictures.drawing import finished, lit, lying

KINDS: tuple[Callable[[np.random.Generator], np.ndarray], ...] = (
    *(textures.gradient, textures.sky, textures.marble, textures.wood, textures.mosaic, textures.stripes),
    *(textures.floor, textures.fractal, textures.lights, textures.bricks, textures.plaid, textures.rings),
    *(textures.dots, textures.pebbles, textures.grain),
    *(scenes.shapes, scenes.hills, scenes.sea, scenes.street, scenes.face, scenes.skyline, scenes.stars),
    *(scenes.flowers, scenes.fruit, scenes.fish, scenes.cars, scenes.cat, scenes.tree),
    *(pages.page, pages.sign, pages.bars, pages.curves, pages.pie, pages.town_map, pages.table),
    *(pages.scribble, pages.board, pages.music, pages.circuit),
)
OF_EACH = 6


def generated_pictures() -> list[Image.Image]:
    """The pictures, kind by kind. Each has a seed of its own."""
    pictures = []
    for kind in KINDS:
        for number in range(OF_EACH):
            rng = np.random.default_rng([number, *kind.__name__.encode()])
            pixels = kind(rng)
            if kind.__module__ == textures.__name__:
                pixels = lit(rng, pixels)
            if kind.__module__ == pages.__name__:
                pixels = lying(rng, pixels)
            pictures.append(Image.fromarray(finished(rng, pixels)))
    return pictures
