"""What the range probe runs an fp32 graph with: texts of many scripts and kinds, pictures with detail of all sizes.

Fixed, so that the same checkpoint gives the same bundle everywhere. Which channels are far larger than the others is
decided by the weights; `jinaclip certify` measures on photos and sentences whether the outcome holds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

PROBE_TEXTS = (
    "cat",
    "A beautiful sunset over the beach, seen from a wooden pier while children play in the shallow water.",
    "海滩上美丽的日落，渔船正在慢慢驶回港口。",
    "浜辺に沈む美しい夕日を、二人で静かに眺めていた。",
    "해변 위로 아름다운 일몰이 펼쳐진다.",
    "غروب جميل على الشاطئ بعد يوم طويل وحار.",
    "समुद्र तट पर एक खूबसूरत सूर्यास्त",
    "Закат над морем, вид с балкона старой гостиницы.",
    "Ένα ηλιοβασίλεμα πάνω από την παραλία",
    "Ein Fahrrad lehnt an einer roten Ziegelwand; daneben steht ein Korb voller Äpfel.",
    "Tổng cộng 12 chiếc thuyền, giá 3.450.000 đồng mỗi chiếc (chưa gồm thuế).",
    "def area(r): return 3.14159 * r ** 2  # https://example.org/?q=a&b=%20",
    "!!! ??? ... --- +++ *** ### 0000 1234567890 \U0001f600\U0001f680\U0001f9ff",
    "the the the the the the the the the the the the the the the the the the the the the the the the",
)


def probe_pictures(size: int) -> Iterator[Image.Image]:
    """Pictures [size, size] RGB: black, white, noise, and soft shapes with ever finer detail, as photos have."""
    rng = np.random.default_rng(3)
    yield Image.new("RGB", (size, size), (0, 0, 0))
    yield Image.new("RGB", (size, size), (255, 255, 255))
    yield Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8))
    for _ in range(3):
        picture = np.full((size, size, 3), rng.uniform(60, 190, 3), np.float32)
        for cells in (3, 6, 12, 25, 50, 100):
            for channel in range(3):
                noise = rng.normal(0, 70 * cells**-0.4, (cells, cells)).astype(np.float32)
                fine = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
                picture[..., channel] += np.asarray(fine)
        yield Image.fromarray(picture.clip(0, 255).astype(np.uint8))
