"""Owns the load of experts on calibration text: measuring it, and biases that make it as wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.routing import chosen

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS = 400
"""Most corrections of the biases; a hundred do as a rule."""
_CLOSE = 0.01
"""Loads are as wanted when none is off by more than this part of itself."""
_PATIENCE = 8
"""Corrections that do not come nearer before they are made half as large."""


def load(
    scores_TE: Tensor, weights_T: Tensor, per_token: int, bias_E: Tensor | None = None
) -> Tensor:
    """Return the share of the choices [E] that each expert gets; it sums to one.

    Args:
        scores_TE: by which experts are chosen.
        weights_T: what each token counts.
        per_token: experts for each token.
        bias_E: is added to the scores.
    """
    import torch

    places = chosen(scores_TE, per_token, bias_E)
    counts = torch.zeros(scores_TE.shape[1]).to(weights_T)
    counts.index_add_(0, places.flatten(), weights_T.repeat_interleave(per_token))
    return counts / counts.sum()


def carrier(xx_HH: Tensor, mean_H: Tensor) -> Tensor:
    """Return v [H] for which v·x is as near to 1 as can be: v = M⁻¹m / (mᵀM⁻¹m), M = E[xxᵀ] + εI.

    Adding b·v to a router row acts as a bias b, which routers have no place for. Least squares for
    v·x = 1, divided by the mean of v·x.
    """
    import torch

    system = xx_HH.clone()
    system.diagonal().add_(1e-6 * float(system.trace()) / len(system))
    found: Tensor = torch.linalg.solve(system, mean_H)
    return found / (mean_H @ found)


def biases(
    scores_TE: Tensor,
    carried_T: Tensor | None,
    weights_T: Tensor,
    per_token: int,
    target_E: Tensor,
) -> Tensor:
    """Return biases [E] under which the load is `target_E`: b += η·log(target / load), repeated.

    Args:
        scores_TE: by which experts are chosen: scores, or logits, which choose alike.
        carried_T: what a bias of one adds to those of a token; one where None.
        weights_T: what each token counts.
        per_token: experts for each token.
        target_E: wanted shares, in sum one and none above 1/per_token.
    """
    import torch

    bias_E = torch.zeros_like(target_E)
    rate = float(scores_TE.std(-1).mean())  # biases are as large as what they compete with
    least = float(weights_T.min() / weights_T.sum()) / 2  # stands for no token at all
    best, best_E, since = float("inf"), bias_E, 0
    for _ in range(_ROUNDS):
        order = scores_TE + (bias_E if carried_T is None else carried_T[:, None] * bias_E)
        gap_E = (target_E / load(order, weights_T, per_token).clamp_min(least)).log()
        worst = float(gap_E.abs().max())
        since = 0 if worst < best else since + 1
        if worst < best:
            best, best_E = worst, bias_E
        if best < _CLOSE:
            break
        if since >= _PATIENCE:
            rate, since, bias_E = rate / 2, 0, best_E
            continue
        bias_E = bias_E + rate * gap_E
    return best_E - best_E.mean()
