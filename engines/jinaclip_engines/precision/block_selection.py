"""Select the blocks of a tower that stay in float32 to keep a lower precision accurate: `choose_kept`.

Some blocks tolerate rounding less than others, so each block's error is measured. First all blocks are lowered. If this
is not accurate enough on the calibration inputs, each block is lowered alone to measure its error, and the blocks with
the largest errors stay in float32, as few as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

# If blocks must stay in float32, some inputs have much larger errors than others, and the calibration inputs may not
# include the worst ones. The allowed error is then divided by this factor.
CAUTION = 3.0
# Largest share of blocks in float32. A graph that is still inaccurate with this many does not pass certification.
MOST_KEPT = 1 / 2


@dataclass(frozen=True)
class Choice:
    """The selected blocks.

    Attributes:
        kept: blocks that stay in float32, in the tower's order.
        cosine: smallest cosine with float32 that was measured with this selection.
    """

    kept: tuple[str, ...]
    cosine: float


def choose_kept(blocks: Sequence[str], measure: Callable[[Collection[str]], float], enough: float) -> Choice:
    """Select the fewest blocks that must stay in float32, at most the share MOST_KEPT, rounded up.

    Args:
        blocks: all blocks of the tower, in order.
        measure: function that returns the smallest cosine with float32 over the calibration inputs, when the given
            blocks stay in float32.
        enough: required cosine when no block stays in float32. With some blocks in float32, 1 - cosine must be CAUTION
            times smaller.

    Returns:
        The first selection that reaches the required cosine; if none does, the best one measured.
    """
    best = Choice((), measure(()))
    if best.cosine >= enough:
        return best
    enough = 1 - (1 - enough) / CAUTION
    cost = {block: 1 - measure([other for other in blocks if other != block]) for block in blocks}
    dearest = sorted(blocks, key=lambda block: -cost[block])
    for count in range(1, int(-(-len(blocks) * MOST_KEPT // 1)) + 1):
        kept = tuple(block for block in blocks if block in dearest[:count])
        # Errors of blocks approximately add up. If their sum is over twice the allowed error, skip the measurement.
        if sum(cost[block] for block in dearest[count:]) > 2 * (1 - enough) and 2 * count < len(blocks) * MOST_KEPT:
            continue
        choice = Choice(kept, measure(kept))
        if not best.cosine >= choice.cosine:  # true also if the first one was NaN
            best = choice
        if best.cosine >= enough:
            break
    return best
