"""Select the blocks of a tower that stay in float32 to keep a lower precision accurate: `select_blocks`.

Some blocks tolerate rounding less than others, so each block's error is measured. First all blocks are lowered. If this
is not accurate enough on the calibration inputs, each block is lowered alone to measure its error, and the blocks with
the largest errors stay in float32, as few as possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

# If blocks must stay in float32, some inputs have much larger errors than others, and the calibration inputs may not
# include the worst ones. The allowed error is then divided by this factor.
SAFETY_FACTOR = 3.0
# Largest share of blocks in float32. A graph that is still inaccurate with this many does not pass certification.
MAX_SHARE = 1 / 2


@dataclass(frozen=True)
class Selection:
    """The selected blocks.

    Attributes:
        blocks: blocks that stay in float32, in the tower's order.
        cosine: smallest cosine with float32 that was measured with this selection.
    """

    blocks: tuple[str, ...]
    cosine: float


def select_blocks(blocks: Sequence[str], measure: Callable[[Collection[str]], float], required: float) -> Selection:
    """Select the fewest blocks that must stay in float32, at most the share MAX_SHARE, rounded up.

    Args:
        blocks: all blocks of the tower, in order.
        measure: function that returns the smallest cosine with float32 over the calibration inputs, when the given
            blocks stay in float32.
        required: required cosine when no block stays in float32. With some blocks in float32, 1 - cosine must be
            SAFETY_FACTOR times smaller.

    Returns:
        The first selection that reaches the required cosine; if none does, the best one measured.
    """
    best = Selection((), measure(()))
    if best.cosine >= required:
        return best
    allowed = (1 - required) / SAFETY_FACTOR
    error = {block: 1 - measure([other for other in blocks if other != block]) for block in blocks}
    by_error = sorted(blocks, key=lambda block: -error[block])
    most = len(blocks) * MAX_SHARE
    for count in range(1, math.ceil(most) + 1):
        # Errors of blocks approximately add up. If their sum is over twice the allowed error, skip the measurement.
        if sum(error[block] for block in by_error[count:]) > 2 * allowed and 2 * count < most:
            continue
        selected = tuple(block for block in blocks if block in by_error[:count])
        selection = Selection(selected, measure(selected))
        if not best.cosine >= selection.cosine:  # true also if the first one was NaN
            best = selection
        if best.cosine >= 1 - allowed:
            break
    return best
