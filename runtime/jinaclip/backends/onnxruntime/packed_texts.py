"""Packed texts: a batch whose texts are concatenated without padding, the input of prepared text graphs for GPUs.

Symbols in shapes: B texts, T tokens in the longest text.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# Inputs of a graph for packed texts.
IDS, POSITIONS, OFFSETS, TOKEN_OFFSET = "input_ids", "positions", "offsets", "token_offset"
INPUTS = frozenset({IDS, POSITIONS, OFFSETS, TOKEN_OFFSET})
_SHORTEST = 16  # tokens; matrix units process 16 rows at once
_FEW, _TILE = 2048, 128  # batches of more than _FEW tokens are rounded up to a multiple of _TILE only
_MOST_TEXTS, _MOST_PLACES = 256, 1 << 18  # limits of a small shape

Shape = tuple[int, int, int]  # tokens, texts, longest text


def shape_of(lengths: np.ndarray, held: int = 0) -> Shape:
    """The padded shape of a batch. Rounding the sizes up keeps the number of different shapes small.

    Up to 2048 tokens are rounded up by at most one eighth. Sizes above `held` are rounded in the same way, so that the
    memory arena, which allocates for every new largest size, grows in few steps. All other sizes are rounded up to a
    multiple of 128. The number of texts and the length of the longest text are rounded up to powers of two. The longest
    text determines which attention kernels are launched; their blocks without tokens end immediately.

    Args:
        lengths: number of tokens of each text, [B].
        held: number of tokens in the largest run so far.
    """
    tokens = int(lengths.sum())
    fine = -(-tokens // _TILE) * _TILE
    if tokens <= _FEW or fine > held:
        fine = _rounded(tokens)
    return fine, _power_of_two(len(lengths)), _power_of_two(max(int(lengths.max()), _SHORTEST))


def input_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shape of every input of the graph. Only the shape of `token_offset` matters (number of texts, longest text),
    because no CUDA kernel reads its contents.
    """
    tokens, texts, longest = shape
    return {IDS: (tokens,), POSITIONS: (tokens,), OFFSETS: (texts + 1,), TOKEN_OFFSET: (texts, longest)}


def is_small(shape: Shape, most_tokens: int) -> bool:
    """Whether a shape has at most `most_tokens` tokens, and its number of texts and its positions are limited, too."""
    tokens, texts, longest = shape
    return tokens <= most_tokens and texts <= _MOST_TEXTS and texts * longest <= _MOST_PLACES


class Texts:
    """A batch of texts.

    Args:
        ids: token ids [B, T], padded on the right with `pad`.
        pad: the token id of padding.

    Attributes:
        lengths: number of tokens of each text, int32 [B].
    """

    def __init__(self, ids: np.ndarray, pad: int) -> None:
        self._ids, self._pad = ids, pad
        self._kept = ids != pad  # [B, T]
        self.lengths = self._kept.sum(1, dtype=np.int32)

    def write(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Fill input arrays with the shapes of `input_shapes`.

        Tokens after the last text are padding that belongs to no text. Additional texts are empty.

        Args:
            inputs: IDS int64 [tokens], POSITIONS int32 [tokens], OFFSETS int32 [texts + 1].
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
