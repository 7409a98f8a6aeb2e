"""Owns one layer's classifier: λ and temperature chosen by prompts that the fit did not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeforge.gates._labels import Labels
from moeforge.gates._solve import Examples, logistic, normalised, ridge
from moeforge.workers import Share, alone

if TYPE_CHECKING:
    from torch import Tensor

_METHODS = {"ridge": ridge, "logistic": logistic}
_REGULARIZATION = {
    "ridge": (0.001, 0.01, 0.1, 1.0, 10.0),
    "logistic": (1e-4, 0.001, 0.01, 0.1),
}
"""Candidates for λ, relative to the mean variance of the inputs."""
_COARSE = [2.0**step for step in range(-4, 16)]
_FINE = [2.0 ** (step / 8) for step in range(-7, 8)]
"""Factors tried on the logits, then around the best of them."""


@dataclass(frozen=True)
class Classifier:
    """A linear classifier without intercept.

    Attributes:
        weight: [C, H] in float64 on the CPU; the temperature is in it.
        regularization: λ.
        temperature: factor on the logits.
        loss: cross entropy on held-out prompts in nats; NaN where there are none.
    """

    weight: Tensor
    regularization: float
    temperature: float
    loss: float


def best_temperature(
    logits_TE: Tensor, wanted_TE: Tensor, weights_T: Tensor, *, sigmoid: bool = False
) -> tuple[float, float]:
    """Return the least weighted cross entropy, and the factor on the logits that has it.

    The cross entropy is that of all scores divided by their sum, as the router weighs experts; over
    the chosen ones alone, a wanted expert that is not among them would cost infinity.
    """
    share_T = weights_T / weights_T.sum()

    def loss(factor: float) -> float:
        entropy_T = -(wanted_TE * normalised(factor * logits_TE, sigmoid=sigmoid)).sum(-1)
        return float((entropy_T * share_T).sum())

    coarse = min((loss(factor), factor) for factor in _COARSE)[1]
    return min((loss(coarse * factor), coarse * factor) for factor in _FINE)


def fit_layer(
    inputs: Sequence[Tensor],
    wanted: Labels,
    *,
    method: str = "logistic",
    regularization: float | None = None,
    sigmoid: bool = False,
    share: Share = alone,
) -> Classifier:
    """Return one layer's classifier.

    Args:
        inputs: router inputs of each prompt [tokens, H].
        wanted: what they want, and which prompts choose λ and temperature; where none does, all
            choose the temperature, and λ is the strongest.
        method: "logistic" or "ridge".
        regularization: λ, if it is given.
        sigmoid: scores are sigmoids.
        share: gives work to threads.
    """
    import torch

    def group(held: bool) -> Examples:
        chosen = [i for i, out in enumerate(wanted.held) if out is held]
        return Examples(
            [inputs[i] for i in chosen],
            [wanted.wanted[i] for i in chosen],
            [wanted.weights[i] for i in chosen],
        )

    groups = [group(False), group(True)] if any(wanted.held) else [group(False)]
    solve = _METHODS[method](groups, share, sigmoid=sigmoid)
    judges = groups[-1]
    y_TC, w_T = judges.by_token()
    # Without held-out prompts the loss would choose the least λ: take the strongest instead.
    known = _REGULARIZATION[method]
    unseen = len(groups) > 1
    candidates = (regularization,) if regularization else known if unseen else known[-1:]
    choices = []
    for candidate in sorted(candidates, reverse=True):  # each is the start of the next, weaker one
        weight_HC = solve(1, candidate).to(y_TC)
        logits_TC = torch.cat([x.double() @ weight_HC for x in judges.inputs])
        loss, factor = best_temperature(logits_TC, y_TC, w_T, sigmoid=sigmoid)
        choices.append((loss, candidate, factor))
    loss, chosen, factor = min(choices)
    weight_EH = factor * solve(len(groups), chosen).T
    return Classifier(weight_EH, chosen, factor, loss if unseen else float("nan"))
