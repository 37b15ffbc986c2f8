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
_FEW, _TILE = 2048, 128  # tokens: more than so many are rounded up to tiles of a product, no further
_MOST_TEXTS, _MOST_PLACES = 256, 1 << 18  # of a shape that is small

Shape = tuple[int, int, int]  # tokens, texts, longest text


def shape_of(lengths: np.ndarray, held: int = 0) -> Shape:
    """The shape that texts of these lengths [B] are run with: a little larger, so that few shapes come up.

    Args:
        lengths: of the texts, in tokens.
        held: tokens of the largest run so far.

    Up to 2048 tokens are rounded up by at most an eighth. So are more than `held`: the arena, which keeps memory for
    every size that is larger than those before it, then grows in few steps. Others are rounded up to a multiple of 128.
    The numbers of texts and of tokens of the longest become powers of two. The longest decides which attention
    kernels are launched; blocks without tokens end at once.
    """
    tokens = int(lengths.sum())
    fine = -(-tokens // _TILE) * _TILE
    if tokens <= _FEW or fine > held:
        fine = _rounded(tokens)
    return fine, _power_of_two(len(lengths)), _power_of_two(max(int(lengths.max()), _SHORTEST))


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


class Texts:
    """Texts to be run.

    Args:
        ids: [B, T], padded at the right with `pad`.

    Attributes:
        lengths: int32 [B], tokens of each.
    """

    def __init__(self, ids: np.ndarray, pad: int) -> None:
        self._ids, self._pad = ids, pad
        self._kept = ids != pad  # [B, T]
        self.lengths = self._kept.sum(1, dtype=np.int32)

    def write(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Fill arrays of `input_shapes`.

        Args:
            inputs: IDS int64 [tokens], POSITIONS int32 [tokens], OFFSETS int32 [texts + 1].

        Tokens beyond the texts are padding that belongs to no text; texts beyond those that are there are empty.
        """
        texts, count = len(self._ids), int(self.lengths.sum())
        columns = np.broadcast_to(np.arange(self._ids.shape[1], dtype=np.int32), self._ids.shape)
        inputs[IDS][:count], inputs[IDS][count:] = self._ids[self._kept], self._pad
        inputs[POSITIONS][:count], inputs[POSITIONS][count:] = columns[self._kept], 0
        inputs[OFFSETS][0], inputs[OFFSETS][texts + 1 :] = 0, count
        np.cumsum(self.lengths, out=inputs[OFFSETS][1 : texts + 1])


def _rounded(tokens: int) -> int:
    step = max(_SHORTEST, 1 << max(tokens.bit_length() - 4, 0))
    return -(-tokens // step) * step


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
