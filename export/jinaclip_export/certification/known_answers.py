"""Known cosines of the published weights, in fp32 and without an instruction.

If the text tower of a bundle of those weights gives other cosines, the bundle is wrong, even if its graphs agree with
each other.
"""

from __future__ import annotations

import numpy as np

ENGLISH = "beautiful sunset over the beach"
SENTENCES = (
    "غروب جميل على الشاطئ",
    "海滩上美丽的日落",
    "Un beau coucher de soleil sur la plage",
    "Ein wunderschöner Sonnenuntergang am Strand",
    "Ένα όμορφο ηλιοβασίλεμα πάνω από την παραλία",
    "समुद्र तट पर एक खूबसूरत सूर्यास्त",
    "Un bellissimo tramonto sulla spiaggia",
    "浜辺に沈む美しい夕日",
    "해변 위로 아름다운 일몰",
)
TEXTS = (ENGLISH, *SENTENCES)
# Cosines of the English sentence with each of the others, then of the Arabic sentence with each one after it.
WITH_ENGLISH = (0.8217206, 0.8121675, 0.8934908, 0.9126601, 0.8692525, 0.864749, 0.8640394, 0.707512, 0.89350307)
WITH_ARABIC = (0.8099989, 0.8881056, 0.86057425, 0.9021691, 0.89576596, 0.90994185, 0.7425193, 0.92439586)


def compare_known_answers(units: np.ndarray) -> dict[str, float | int]:
    """Compare unit vectors [10, D] of TEXTS with the known cosines: the number of cosines and the largest error."""
    found = np.concatenate([units[0] @ units[1:].T, units[1] @ units[2:].T])
    expected = np.array(WITH_ENGLISH + WITH_ARABIC)
    return {"count": len(expected), "max_error": float(np.abs(found - expected).max())}
