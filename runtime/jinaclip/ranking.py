"""Likeness of texts and images as probabilities."""

from __future__ import annotations

import numpy as np


def probabilities(cosines: np.ndarray, logit_scale: float, *, over: str) -> np.ndarray:
    """Softmax of the model's logits: cosine × exp(logit_scale).

    Args:
        cosines: [texts, images].
        logit_scale: the checkpoint's parameter.
        over: "texts": each image's probabilities add up to 1; "images": each text's.

    Returns:
        float64 [texts, images].
    """
    logits = cosines.astype(np.float64) * np.exp(logit_scale)
    axis = 0 if over == "texts" else 1
    odds = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return np.asarray(odds / odds.sum(axis=axis, keepdims=True))
