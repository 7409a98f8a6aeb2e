"""Owns the choice of a few rows out of many: representative of their own, far from the others'.

The formula is facility location (Lin & Bilmes, "A Class of Submodular Functions for Document
Summarization", ACL 2011, eq. 3) with one factor for each candidate:

    f(S) = mean over i of max over j in S of  max(0, cos(i, j)) · q_j
    q_j  = 1 − max(0, largest cosine of j with any row of the others)

Every row i of the pile wants a kept row near it, so the kept ones stand for the whole pile and two
alike are not both kept; a row that the others also have counts nothing. f is monotone and
submodular: taking, k times, the row that adds most gives at least 1 − 1/e of the best possible f
(Nemhauser, Wolsey & Fisher 1978). Max-marginal relevance (Carbonell & Goldstein 1998), the usual
alternative, prefers outliers: nothing in it asks whether a row stands for anything.

What it buys is little. Mean held-out loss of the quickstart's mixture, gate mode `fitted` by
logistic regression and by ridge, out of 64 prompts an expert; less than 0.003 apart is noise:

    prompts             logistic                ridge
    all                 2.415                   2.417
    10 kept             2.417                   2.420
    10 at random (5x)   2.423 (2.420-2.429)     2.424 (2.421-2.431)
    20 kept             2.416                   2.421
    20 at random (5x)   2.418 (2.415-2.422)     2.420 (2.417-2.422)

With q², or without q, or by max-marginal relevance, 10 and 20 kept gave 2.419 to 2.424.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeforge.prompting.embed import Vectors

_BLOCK = 512
"""Candidates whose cosines with the whole pile are in memory at once."""
_DIGITS = 6
"""Gains that agree to so many digits are equal, and the first row wins: what the embedding model
rounds differently with another batch must not decide."""


def distinctness(own: Vectors, others: Vectors) -> Vectors:
    """Return q [rows of `own`]: 1 for what is far from all `others`, 0 for what is among them."""
    import numpy as np

    if not len(others):
        return np.ones(len(own))
    blocks = range(0, len(own), _BLOCK)
    nearest = [(own[start : start + _BLOCK] @ others.T).max(axis=1) for start in blocks]
    return np.asarray(1.0 - np.concatenate(nearest).clip(0.0, 1.0))


def choose(own: Vectors, factors: Vectors, count: int, kept: int = 0) -> list[int]:
    """Return the numbers of `count` rows, in order, that greedily maximise f; of fewer rows all.

    Gains only shrink as rows are taken, so the gain of long ago is a bound, and only rows whose
    bound is the largest are looked at again (Minoux 1978): the same choice in less time. Memory is
    that of the vectors.

    Args:
        own: unit vectors of the pile.
        factors: q of each.
        count: how many to choose.
        kept: so many of the first rows are in S already; they are neither chosen nor returned.
    """
    import numpy as np

    def worth(first: int, last: int) -> Vectors:
        """Return max(0, cos(i, j)) · q_j as [rows, candidates first to last]."""
        return np.asarray((own @ own[first:last].T).clip(0.0, None) * factors[first:last])

    covered = np.zeros(len(own))
    for row in range(kept):
        covered = np.maximum(covered, worth(row, row + 1)[:, 0])

    def gains(first: int, last: int) -> Vectors:
        added = (worth(first, last) - covered[:, None]).clip(0.0, None).mean(axis=0)
        return np.asarray(added.round(_DIGITS))

    waiting: list[tuple[float, int, int]] = []  # minus the bound, row, rows taken when it was made
    for first in range(kept, len(own), _BLOCK):
        last = min(first + _BLOCK, len(own))
        found = gains(first, last).tolist()
        waiting += [(-gain, first + place, 0) for place, gain in enumerate(found)]
    heapq.heapify(waiting)
    chosen: list[int] = []
    while waiting and len(chosen) < count:
        _, row, seen = heapq.heappop(waiting)
        if seen < len(chosen):
            gain = float(gains(row, row + 1)[0])
            heapq.heappush(waiting, (-gain, row, len(chosen)))
            continue
        chosen.append(row)
        covered = np.maximum(covered, worth(row, row + 1)[:, 0])
    return sorted(chosen)
