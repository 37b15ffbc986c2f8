"""Post-processing of raw vectors: truncation followed by normalisation, in the publisher's order (Matryoshka
embeddings, arXiv 2205.13147), and ranking by probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from jinaclip.errors import BackendError, InputError


def check_dim(dim: int | None, dims: Sequence[int]) -> int:
    """Check the length that vectors are to be truncated to.

    Args:
        dim: the requested length. None requests the full length.
        dims: the lengths that the model was trained for.

    Returns:
        The length.

    Raises:
        InputError: the length is not in `dims`; the message lists them.
    """
    if dim is None:
        return max(dims)
    if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)) or int(dim) not in dims:
        allowed = ", ".join(map(str, dims))
        raise InputError(f"truncate_dim {dim!r} is not one of this model's dims; expected one of {allowed}")
    return int(dim)


def truncate(raw: np.ndarray, dim: int, *, normalize: bool = True) -> np.ndarray:
    """Truncate vectors to their first `dim` components, then normalise them.

    Args:
        raw: raw vectors [N, D], as the graph returns them.
        dim: number of components to keep.
        normalize: divide each truncated vector by its norm.

    Returns:
        float32 [N, dim].

    Raises:
        BackendError: a vector has NaN or infinite components.
    """
    cut = np.ascontiguousarray(raw[:, :dim], dtype=np.float32)
    if not np.isfinite(cut).all():
        bad = np.flatnonzero(~np.isfinite(cut).all(axis=1))
        raise BackendError(
            f"the model returned NaN or infinity for {len(bad)} of {len(cut)} inputs; the vectors were discarded"
        )
    if not normalize:
        return cut
    norms = np.linalg.norm(cut.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(cut / np.maximum(norms, 1e-12), np.float32)


Ranking = list[tuple[int, float, float]]  # index of a candidate, probability, cosine


def rankings(cosines: np.ndarray, logit_scale: float, *, over: str, top: int | None = None) -> Iterator[Ranking]:
    """Rank texts for images, or images for texts, by probability.

    A probability is the softmax of the model's logits, which are cosine × exp(logit_scale).

    Args:
        cosines: cosine similarities [texts, images].
        logit_scale: the checkpoint's logit scale.
        over: "texts" ranks the texts for each image, "images" ranks the images for each text. The probabilities of
            what is ranked sum to 1.
        top: the number of candidates to keep. None keeps all.

    Yields:
        For each query, the index, probability and cosine of its candidates, best first.
    """
    for query in cosines.T if over == "texts" else cosines:
        logits = query.astype(np.float64) * np.exp(logit_scale)
        odds = np.exp(logits - logits.max())
        odds /= odds.sum()
        best = np.argsort(-odds, kind="stable")[:top]
        yield [(int(i), float(odds[i]), float(query[i])) for i in best]
