"""Owns saying how well two experts' prompts can be told apart.

The measure is that of the router itself: a linear probe. For two sets of prompts a ridge regression
of ±1 on their embeddings is fitted, each set weighing the same, and each prompt is judged by the
fit to all others. Leaving one out needs no second fit: with H = K(K + λI)⁻¹ the prediction without
prompt i is (f_i − H_ii·y_i) / (1 − H_ii) (Allen's PRESS; Golub, Heath & Wahba 1979). The share
judged right, averaged over both sets, is 1 for sets that are apart and about ½ for two halves of
one set, whatever the embedding model, the domain, or the number of prompts. Texts that both sets
have are judged wrong, their twin being known under the other name: far below ½ the sets repeat
each other.

Why not the mean cosine to the nearest prompt of the other set: it has no fixed scale. On the
quickstart's prompts (all-MiniLM-L6-v2, medians of 400 and 600 draws), from 2 to 32 prompts a set,
it grows from 0.28 to 0.44 for samples of one file and from 0.17 to 0.28 for two files, and the
ranges overlap up to 20 prompts; the probe says 0.44-0.48 and 0.97-1.00 from 8 prompts on.

Threshold, from the same draws. `same`: two disjoint samples of one file; `apart`: samples of two.

    prompts a set   same: median, 95 %   apart: 5 %, median   same ≥ 0.7   apart < 0.7
          5            0.30   0.70           0.50   0.90           7.0 %      13.7 %
          8            0.44   0.69           0.69   0.97           3.8 %       7.0 %
         10            0.45   0.70           0.75   1.00           6.2 %       0.8 %
         16            0.47   0.66           0.84   0.97           1.0 %       0.2 %
         32            0.48   0.62           0.88   0.98           1.0 %       0.0 %

Whole files (64 prompts each) give 0.91 (French, German) to 1.00; a file against its copy 0.00;
against a set of which a quarter is its own text 0.68; its halves 0.47 to 0.53.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeforge.errors import Finding
from moeforge.prompting import piles
from moeforge.prompting.embed import Embed
from moeforge.prompting.piles import Pile

if TYPE_CHECKING:
    from moeforge.prompting.embed import Vectors

TOLD_APART = 0.7
"""Probe accuracy below which two experts cannot be told apart; see the table above."""
FEWEST = 10
"""Distinct prompts that both sets must have for the accuracy to mean something."""
_MOST = 256
"""Prompts of a set that the probe looks at, evenly spaced; its matrices are twice as wide."""
_RIDGE = 0.1
"""λ, relative to the mean of K's diagonal; from 0.01 to 10 accuracies moved by 0.03 at most."""


@dataclass(frozen=True)
class Overlap:
    """How well the prompts of experts can be told apart.

    Attributes:
        labels: the experts.
        prompts: distinct prompts of each.
        accuracy: [experts][experts] leave-one-out accuracy of a linear probe, 0 to 1, the same in
            both directions; None on the diagonal and where one has fewer than 10 prompts.
    """

    labels: tuple[str, ...]
    prompts: tuple[int, ...]
    accuracy: tuple[tuple[float | None, ...], ...]

    def findings(self) -> tuple[Finding, ...]:
        """Return a warning for each two experts that cannot be told apart, at the second's place.

        And a note for each expert with too few prompts to say.
        """
        found = []
        for j, name in enumerate(self.labels):
            if self.prompts[j] < FEWEST:
                what = (
                    f"{name} has {self.prompts[j]} distinct prompts: too few to say what overlaps"
                )
                found.append(Finding(what, f"Give {FEWEST} or more.", ("experts", j)))
            for i, other in enumerate(self.labels[:j]):
                accuracy = self.accuracy[i][j]
                if accuracy is None or accuracy >= TOLD_APART:
                    continue
                what = (
                    f"the prompts of {other} and {name} cannot be told apart: a linear probe is "
                    f"right for {accuracy:.0%} of them, of two halves of one text for 50 %"
                )
                fix = "Give each expert prompts that only it should answer, or drop one of the two."
                found.append(Finding(what, fix, ("experts", j), warning=True))
        return tuple(found)


def accuracy(one: Vectors, other: Vectors) -> float:
    """Return the leave-one-out accuracy of a linear probe between two sets of unit vectors.

    The mean of the accuracies on both; a prompt exactly between them is judged wrong.
    """
    import numpy as np

    sizes = (len(one), len(other))
    sides = np.repeat([1.0, -1.0], sizes)
    weights = np.sqrt(np.repeat([0.5 / sizes[0], 0.5 / sizes[1]], sizes))
    x = np.concatenate([one, other])
    x = np.column_stack([x, np.ones(len(x))]) * weights[:, None]  # the last column: an intercept
    y = sides * weights
    kernel = x @ x.T
    ridge = _RIDGE * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
    hat = np.linalg.solve(kernel + ridge, kernel)
    own = np.diag(hat)
    without = (hat.T @ y - own * y) / (1.0 - own)
    right = without * y > 1e-12
    return float((right[: sizes[0]].mean() + right[sizes[0] :].mean()) / 2)


def overlap(given: Sequence[Pile], embed: Embed) -> Overlap:
    """Return how well the prompts of each two piles can be told apart."""
    import numpy as np

    texts, counts = [], []
    for pile in given:
        every = [piles.text_of(prompt) for prompt in pile.prompts]
        numbers = piles.distinct(every)
        most = min(len(numbers), _MOST)
        texts.append([every[numbers[n * len(numbers) // most]] for n in range(most)])
        counts.append(len(numbers))
    ends = np.cumsum([len(each) for each in texts]).tolist()
    parts = np.split(embed([text for each in texts for text in each]), ends[:-1])
    found: list[list[float | None]] = [[None] * len(parts) for _ in parts]
    for j, one in enumerate(parts):
        for i, other in enumerate(parts[:j]):
            if min(len(one), len(other)) >= FEWEST:
                found[i][j] = found[j][i] = accuracy(one, other)
    labels = tuple(pile.label for pile in given)
    return Overlap(labels, tuple(counts), tuple(map(tuple, found)))
