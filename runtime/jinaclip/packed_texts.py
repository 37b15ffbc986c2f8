"""Texts one after the other without padding, as prepared graphs for GPUs take them.

Symbols: B texts, T tokens of the longest, N tokens of all texts together.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# Inputs of such a graph.
IDS, POSITIONS, OFFSETS, TOKEN_OFFSET = "input_ids", "positions", "offsets", "token_offset"
INPUTS = frozenset({IDS, POSITIONS, OFFSETS, TOKEN_OFFSET})
_SHORTEST = 16  # tokens: a matrix unit works on 16 rows at once
_MOST_TEXTS, _MOST_PLACES = 256, 1 << 18  # of a shape that is small

Shape = tuple[int, int, int]  # tokens, texts, longest text


def shape_of(lengths: np.ndarray) -> Shape:
    """The shape that texts of these lengths [B] are run with: a little larger, so that few shapes come up.

    Tokens are rounded up by at most an eighth, texts and the longest length to a power of two. The longest length
    decides which attention kernels are launched; blocks without tokens end at once.
    """
    return _rounded(int(lengths.sum())), _power_of_two(len(lengths)), _power_of_two(max(int(lengths.max()), _SHORTEST))


def input_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shape of every input of the graph. Of `token_offset` only the shape matters (number of texts, longest text): no
    CUDA kernel reads its contents.
    """
    tokens, texts, longest = shape
    return {IDS: (tokens,), POSITIONS: (tokens,), OFFSETS: (texts + 1,), TOKEN_OFFSET: (texts, longest)}


def is_small(shape: Shape, most_tokens: int) -> bool:
    """Whether a shape has at most so many tokens, and not many more texts than such texts usually are."""
    tokens, texts, longest = shape
    return tokens <= most_tokens and texts <= _MOST_TEXTS and texts * longest <= _MOST_PLACES


def fill(inputs: Mapping[str, np.ndarray], ids: np.ndarray, pad: int) -> None:
    """Write texts into arrays of `input_shapes`.

    Args:
        inputs: IDS int64 [tokens], POSITIONS int32 [tokens], OFFSETS int32 [texts + 1].
        ids: [B, T], padded at the right with `pad`.

    Tokens beyond the texts are padding that belongs to no text; texts beyond `ids` are empty.
    """
    kept = ids != pad  # [B, T]
    count = int(kept.sum())
    columns = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    inputs[IDS][:count], inputs[IDS][count:] = ids[kept], pad
    inputs[POSITIONS][:count], inputs[POSITIONS][count:] = columns[kept], 0
    inputs[OFFSETS][0], inputs[OFFSETS][len(ids) + 1 :] = 0, count
    np.cumsum(kept.sum(1), out=inputs[OFFSETS][1 : len(ids) + 1])


def _rounded(tokens: int) -> int:
    step = max(_SHORTEST, 1 << max(tokens.bit_length() - 4, 0))
    return -(-tokens // step) * step


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
