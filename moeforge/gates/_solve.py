"""Owns linear classifiers without intercept, by ridge or logistic regression, in float64.

Every sum is taken in a fixed order by pieces that one thread computes each, so that the number of
threads changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.workers import Share

if TYPE_CHECKING:
    from torch import Tensor

Solver = Callable[[int, float], "Tensor"]
"""Returns weights [H, C] on the CPU, given how many groups of examples count, and λ."""

_STRIPE = 256
"""Columns of Σxxᵀ in a piece of work."""
_ROWS = 1024
"""Rows of activations in a piece of work."""
_STEPS = 200
"""Most steps of L-BFGS; it stops by itself, mostly after some thirty."""


@dataclass(frozen=True)
class Examples:
    """What a classifier learns from.

    Attributes:
        inputs: of each prompt [tokens, H].
        wanted: distribution over the classes for each prompt [C].
        weights: weight of each token of a prompt.
    """

    inputs: Sequence[Tensor]
    wanted: Sequence[Tensor]
    weights: Sequence[float]

    def by_token(self) -> tuple[Tensor, Tensor]:
        """Return what is wanted [T, C] and what it weighs [T] for each token, in float64."""
        import torch

        counts = [len(x) for x in self.inputs]
        rows = [y.expand(n, -1) for y, n in zip(self.wanted, counts, strict=True)]
        weights = [
            torch.full((n,), w, dtype=torch.float64)
            for w, n in zip(self.weights, counts, strict=True)
        ]
        device = self.inputs[0].device
        return torch.cat(rows).double().to(device), torch.cat(weights).double().to(device)


def second_moment(inputs: Sequence[Tensor], weights: Sequence[float], share: Share) -> Tensor:
    """Return Σ w·xxᵀ [H, H] in float64 for inputs [tokens, H], on their device."""
    import torch

    hidden = inputs[0].shape[1]
    total = torch.zeros(hidden, hidden, dtype=torch.float64, device=inputs[0].device)

    def work(number: int) -> None:
        columns = slice(number * _STRIPE, (number + 1) * _STRIPE)
        for x_TH, weight in zip(inputs, weights, strict=True):
            x = x_TH.double()
            total[:, columns].addmm_(x.T, x[:, columns], alpha=weight)

    share(work, -(-hidden // _STRIPE))
    return total


def ridge(groups: Sequence[Examples], share: Share, *, sigmoid: bool = False) -> Solver:
    """Return the solver W = (Σxxᵀ + λ·tr/H·I)⁻¹ Σx(y − 1/C)ᵀ, all sums weighted.

    Two matrices, H×H and H×C, are all that is kept of a group. What scores are made of logits makes
    no difference.
    """
    import torch

    kept = []
    for group in groups:
        xx_HH = second_moment(group.inputs, group.weights, share)
        xy_HC = xx_HH.new_zeros(len(xx_HH), len(group.wanted[0]))
        for x_TH, wanted_C, weight in zip(group.inputs, group.wanted, group.weights, strict=True):
            centred = wanted_C.to(xy_HC) - 1.0 / len(wanted_C)
            xy_HC.addr_(x_TH.double().sum(0), centred, alpha=weight)
        kept.append((xx_HH.cpu(), xy_HC.cpu()))

    def solve(count: int, regularization: float) -> Tensor:
        system = torch.stack([xx_HH for xx_HH, _ in kept[:count]]).sum(0)
        system.diagonal().add_(max(regularization * float(system.trace()) / len(system), 1e-12))
        wanted_HC = torch.stack([xy_HC for _, xy_HC in kept[:count]]).sum(0)
        solution: Tensor = torch.linalg.solve(system, wanted_HC)
        return solution

    return solve


def normalised(logits: Tensor, *, sigmoid: bool, dim: int = -1) -> Tensor:
    """Return log(s/Σs) for the scores s of logits: what a router weighs by where k = C.

    Args:
        logits: of all classes along `dim`.
        sigmoid: scores are sigmoids.
        dim: -1 for [tokens, C], 0 for [C, tokens].
    """
    import torch

    if sigmoid:
        logits = torch.nn.functional.logsigmoid(logits)
    return logits.log_softmax(dim)


def logistic(groups: Sequence[Examples], share: Share, *, sigmoid: bool = False) -> Solver:
    """Return the solver of Σ w·CE(y, s/Σs) + λ·tr(Σw·xxᵀ)/2H·‖W‖², the scores s being the router's.

    Multinomial logistic regression where scores are a softmax. Solved by L-BFGS in the axes of
    Σw·xxᵀ, each scaled to what curvature it has at least: the minimum is the same, and a few dozen
    steps reach it whatever the spread of the inputs. Each solution is where the next one starts.
    All inputs are kept, in float64.
    """
    import torch

    inputs = [x for group in groups for x in group.inputs]
    xx_HH = second_moment(inputs, [w for group in groups for w in group.weights], share)
    values_H, axes_HH = torch.linalg.eigh(xx_HH.cpu())
    values_H, axes_HH = values_H.clamp_min(0).to(xx_HH), axes_HH.to(xx_HH)
    kept = [_turned(group, axes_HH, share) for group in groups]
    start = values_H.new_zeros(len(groups[0].wanted[0]), len(values_H))

    def solve(count: int, regularization: float) -> Tensor:
        pieces = [piece for group in kept[:count] for piece in group]
        trace = sum(float((w_T[:, None] * x_TH**2).sum()) for x_TH, _, w_T in pieces)
        penalty = max(regularization * trace / len(values_H), 1e-12)
        scale_H = (values_H + penalty).rsqrt()
        scaled_CH = start / scale_H  # the last solution is near

        def closure() -> Any:
            weight_CH = scale_H * scaled_CH
            made = share(lambda n: _slope(*pieces[n], weight_CH, sigmoid=sigmoid), len(pieces))
            scaled_CH.grad = scale_H * sum((slope for _, slope in made), penalty * weight_CH)
            total = sum(loss for loss, _ in made) + penalty / 2 * float((weight_CH**2).sum())
            return torch.tensor(total, dtype=torch.float64)

        optimizer = torch.optim.LBFGS(
            [scaled_CH],
            max_iter=_STEPS,
            history_size=20,
            tolerance_grad=1e-7,
            tolerance_change=1e-11,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        start.copy_(scale_H * scaled_CH)
        solution: Tensor = (start @ axes_HH.T).T.cpu()
        return solution

    return solve


def _turned(group: Examples, axes_HH: Tensor, share: Share) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return inputs in other axes, what is wanted and the weights, by pieces of work."""
    import torch

    pieces = torch.cat(list(group.inputs)).split(_ROWS)  # type: ignore[no-untyped-call]
    turned = share(lambda n: pieces[n].double() @ axes_HH, len(pieces))
    y_TC, w_T = group.by_token()
    split = range(0, len(w_T), _ROWS)
    rows = [(y_TC[n : n + _ROWS].T.contiguous(), w_T[n : n + _ROWS]) for n in split]
    return [(x, *row) for x, row in zip(turned, rows, strict=True)]


def _slope(
    x_TH: Tensor, y_CT: Tensor, w_T: Tensor, weight_CH: Tensor, *, sigmoid: bool
) -> tuple[float, Tensor]:
    """Return Σ w·CE(y, s/Σs) of some tokens, and its derivative by the weights [C, H].

    Classes come first here, for they are few: products and sums take a third of the time.
    """
    logits = weight_CH @ x_TH.T
    logs = normalised(logits, sigmoid=sigmoid, dim=0)
    slope = logs.exp() - y_CT
    if sigmoid:
        slope = slope * (1 - logits.sigmoid())
    loss = -(w_T * (y_CT * logs).sum(0)).sum()
    return float(loss), (slope * w_T) @ x_TH
