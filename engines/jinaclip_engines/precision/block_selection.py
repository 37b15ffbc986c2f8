"""Which blocks of a tower stay in float32, so that a lower precision holds what it must: `choose_kept`.

Rounding is not equally dear everywhere: what is lost before a channel grows large is multiplied with it. So nothing is
assumed. Where the graph with every block lowered is not near enough on the probe's inputs, each block is lowered alone,
and those that cost most stay in float32: as few as do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

# Where blocks have to stay at all, some inputs fare far worse than most, and the probe may not hold the worst: what it
# shows must then be this many times nearer.
CAUTION = 3.0
# A graph with more of its blocks in float32 is not worth its name; the certificate refuses what that leaves.
MOST_KEPT = 1 / 2


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        kept: blocks that stay in float32, in the tower's order.
        cosine: smallest cosine with float32 that was measured with these.
    """

    kept: tuple[str, ...]
    cosine: float


def choose_kept(blocks: Sequence[str], measure: Callable[[Collection[str]], float], enough: float) -> Choice:
    """The fewest blocks in float32 with which `measure` is near enough, at most MOST_KEPT of them, rounded up.

    Args:
        blocks: all of the tower, in order.
        measure: smallest cosine with float32 over the probe's inputs, when these blocks stay in float32.
        enough: what to reach without any; with some, 1 - cosine must be CAUTION times smaller. Where nothing does, the
            best that was measured is taken.
    """
    best = Choice((), measure(()))
    if best.cosine >= enough:
        return best
    enough = 1 - (1 - enough) / CAUTION
    cost = {block: 1 - measure([other for other in blocks if other != block]) for block in blocks}
    dearest = sorted(blocks, key=lambda block: -cost[block])
    for count in range(1, int(-(-len(blocks) * MOST_KEPT // 1)) + 1):
        kept = tuple(block for block in blocks if block in dearest[:count])
        # Losses about add up: with twice what is allowed left, measuring would only take time.
        if sum(cost[block] for block in dearest[count:]) > 2 * (1 - enough) and 2 * count < len(blocks) * MOST_KEPT:
            continue
        choice = Choice(kept, measure(kept))
        if not best.cosine >= choice.cosine:  # also where the first was NaN
            best = choice
        if best.cosine >= enough:
            break
    return best
