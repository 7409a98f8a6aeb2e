"""Owns what is said of a mixture's routing: counts, and the measures that follow from them.

Knows numbers only; knows nothing of models, files or how the numbers are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

DEAD = 0.01
"""An expert is dead in a layer if it gets less than this part of an even share of the weight."""
FEWEST = 5
"""Choices that an even share must have before an expert is called dead: with fewer, an expert that
is chosen as often as all others is missed by chance more often than once in e⁵ ≈ 150 layers."""
DOMINATING = 4
"""An expert dominates a layer if its weight is more than this many even shares, or lies nearer to
all of the weight than to an even share."""

Mapping = Literal["given", "order", "best"]


@dataclass(frozen=True)
class DomainCount:
    """How much of one domain was read.

    Attributes:
        name: its label.
        prompts: how many.
        tokens: tokens that count.
        cut: prompts that were longer than the model takes; what is beyond was left out.
        experts: numbers of the experts that are the domain's own; empty where nobody says so.
    """

    name: str
    prompts: int
    tokens: int
    cut: int
    experts: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """A prompt whose tokens are shown one by one. L layers, T tokens, K experts per token.

    Attributes:
        domain: label.
        pieces: the text of each token that is shown.
        tokens: all tokens of the prompt that count; `pieces` are the first of them.
        chosen_LTK: numbers of the experts, the one with the largest weight first.
        weights_LTK: their weights, which add up to 1.
    """

    domain: str
    pieces: tuple[str, ...]
    tokens: int
    chosen_LTK: NDArray[np.int64]
    weights_LTK: Floats


@dataclass(frozen=True)
class RouteReport:
    """Where the tokens of each domain go. L layers, D domains, E experts.

    Attributes:
        model: its name.
        model_type: its type in transformers.
        layers: numbers of the layers that have a router.
        experts: labels.
        per_token: experts that each token passes through.
        domains: what was read.
        mapping: whence comes the expert that is right for a domain: "given" by the caller; by
            "order", file i being expert i's; or "best", the one-to-one assignment in each layer
            with the highest accuracy on these very tokens, which flatters the router.
        choices_LDE: tokens that pass through each expert.
        weights_LDE: sum over tokens of the weight of each expert; a token's weights add up to 1.
        firsts_LDE: tokens whose largest weight is this expert's.
        confidence_LD: sum over tokens of the largest weight.
        entropy_LD: sum over tokens of the entropy of the router's distribution, in units of log E;
            NaN where it is not known how this type of model makes scores of logits.
        samples: prompts to be shown.
    """

    model: str
    model_type: str
    layers: tuple[int, ...]
    experts: tuple[str, ...]
    per_token: int
    domains: tuple[DomainCount, ...]
    mapping: Mapping
    choices_LDE: Floats
    weights_LDE: Floats
    firsts_LDE: Floats
    confidence_LD: Floats
    entropy_LD: Floats
    samples: tuple[Sample, ...] = field(default=(), repr=False)

    @property
    def tokens(self) -> int:
        """Return the tokens of all domains."""
        return sum(domain.tokens for domain in self.domains)

    @property
    def even(self) -> float:
        """Return the share of each expert if all had the same."""
        return 1 / len(self.experts)

    def alike(self) -> RouteReport:
        """Return the same as if every domain had as many tokens, so that each counts the same."""
        import numpy as np

        counts = np.array([domain.tokens for domain in self.domains], dtype=np.float64)
        factor_D = self.tokens / len(counts) / counts
        factor_DE = factor_D[:, None]
        return replace(
            self,
            choices_LDE=self.choices_LDE * factor_DE,
            weights_LDE=self.weights_LDE * factor_DE,
            firsts_LDE=self.firsts_LDE * factor_DE,
            confidence_LD=self.confidence_LD * factor_D,
            entropy_LD=self.entropy_LD * factor_D,
        )

    def load_LE(self) -> Floats:
        """Return each expert's share of all choices in its layer."""
        return _shares(self.choices_LDE.sum(1))

    def weight_LE(self) -> Floats:
        """Return each expert's share of all weight in its layer."""
        return _shares(self.weights_LDE.sum(1))

    def weight_LDE(self) -> Floats:
        """Return each expert's share of the weight that the tokens of a domain have."""
        return _shares(self.weights_LDE)

    def entropy_L(self) -> Floats:
        """Return the mean entropy of the router's distribution: 0 for certain, 1 for even."""
        mean: Floats = self.entropy_LD.sum(1) / self.tokens
        return mean

    def confidence_L(self) -> Floats:
        """Return the mean weight of the first choice."""
        mean: Floats = self.confidence_LD.sum(1) / self.tokens
        return mean

    @cached_property
    def owners(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Experts that are right for each domain, by layer; empty where a domain has none."""
        if self.mapping != "best":
            return tuple(tuple(d.experts for d in self.domains) for _ in self.layers)
        return tuple(_assigned(accuracy_DE) for accuracy_DE in _shares(self.firsts_LDE))

    def accuracy_LD(self) -> Floats:
        """Return the share of tokens whose first choice is right for their domain.

        NaN where no expert is the domain's own.
        """
        import numpy as np

        shares = _shares(self.firsts_LDE)
        return np.array(
            [
                [
                    share_E[list(experts)].sum() if experts else np.nan
                    for share_E, experts in zip(share_DE, owners, strict=True)
                ]
                for share_DE, owners in zip(shares, self.owners, strict=True)
            ]
        )

    def dead(self) -> tuple[tuple[int, ...], ...] | None:
        """Return the dead experts of each layer; None where there are too few tokens to tell."""
        if self.tokens * self.per_token * self.even < FEWEST:
            return None
        return _where(self.weight_LE() < DEAD * self.even)

    def dominating(self) -> tuple[tuple[int, ...], ...]:
        """Return the experts of each layer that get far more than others."""
        return _where(self.weight_LE() > min(DOMINATING * self.even, (1 + self.even) / 2))


def _shares(amounts: Floats) -> Floats:
    shares: Floats = amounts / amounts.sum(-1, keepdims=True)
    return shares


def _where(flags_LE: NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(e) for e in flags_E.nonzero()[0]) for flags_E in flags_LE)


def _assigned(share_DE: Floats) -> tuple[tuple[int, ...], ...]:
    """Return an expert for each domain, none twice, with the largest sum of shares."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    rows, columns = linear_sum_assignment(share_DE, maximize=True)
    found = dict(zip(map(int, rows), map(int, columns), strict=True))
    return tuple((found[d],) if d in found else () for d in range(len(share_DE)))


def names(report: RouteReport, numbers: Sequence[int]) -> str:
    """Return the labels of experts in words."""
    return ", ".join(report.experts[number] for number in numbers)
