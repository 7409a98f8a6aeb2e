"""Owns linear classifiers without intercept, by ridge or logistic regression, in float64.

Every sum is taken in a fixed order by pieces that one thread computes each, so that the number of
threads changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moeforge.workers import Share

if TYPE_CHECKING:
    from torch import Tensor

Solver = Callable[[float], "Tensor"]
"""Returns weights [H, C] on the CPU for a λ."""

_STRIPE = 256
"""Columns of Σxxᵀ, or rows of activations, in a piece of work."""
_STEPS = 200
"""Most steps of L-BFGS; it stops by itself, mostly after some thirty."""


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


class Moments:
    """Σ w·xxᵀ [H, H] and Σ w·x(y − 1/C)ᵀ [H, C]: all that ridge regression needs of the inputs."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        wanted: Sequence[Tensor],
        weights: Sequence[float],
        share: Share,
    ) -> None:
        self.xx_HH = second_moment(inputs, weights, share)
        self.xy_HC = self.xx_HH.new_zeros(len(self.xx_HH), len(wanted[0]))
        for x_TH, wanted_C, weight in zip(inputs, wanted, weights, strict=True):
            centred = wanted_C.to(self.xy_HC) - 1.0 / len(wanted_C)
            self.xy_HC.addr_(x_TH.double().sum(0), centred, alpha=weight)

    def add(self, other: Moments) -> None:
        """Add what another set of inputs gave."""
        self.xx_HH += other.xx_HH
        self.xy_HC += other.xy_HC

    def solve(self, regularization: float) -> Tensor:
        """Return (Σxxᵀ + λ·tr/H·I)⁻¹ Σxyᵀ [H, C], on the CPU."""
        import torch

        system = self.xx_HH.cpu().clone()
        system.diagonal().add_(max(regularization * float(system.trace()) / len(system), 1e-12))
        solution: Tensor = torch.linalg.solve(system, self.xy_HC.cpu())
        return solution


def normalised(logits: Tensor, *, sigmoid: bool) -> Tensor:
    """Return log(s/Σs) [tokens, C] for the scores s of logits: what a router weighs by, k = C."""
    import torch

    if sigmoid:
        logits = torch.nn.functional.logsigmoid(logits)
    return logits.log_softmax(-1)


def logistic(
    inputs: Sequence[Tensor],
    wanted: Sequence[Tensor],
    weights: Sequence[float],
    share: Share,
    *,
    sigmoid: bool,
) -> Solver:
    """Return the solver of Σ w·CE(y, s/Σs) + λ·tr(Σw·xxᵀ)/2H·‖W‖², the scores s being the router's.

    Multinomial logistic regression where scores are a softmax. Solved by L-BFGS in the axes of
    Σw·xxᵀ, each scaled to what curvature it has at least: the minimum is the same, and a few dozen
    steps reach it whatever the spread of the inputs.
    """
    import torch

    xx_HH = second_moment(inputs, weights, share)
    values_H, axes_HH = torch.linalg.eigh(xx_HH.cpu())
    axes_HH = axes_HH.to(xx_HH.device)
    pieces = torch.cat(list(inputs)).split(4 * _STRIPE)  # type: ignore[no-untyped-call]
    turned = share(lambda n: pieces[n].double() @ axes_HH, len(pieces))
    counts = [len(x) for x in inputs]
    y_TC = torch.cat([y.expand(n, -1) for y, n in zip(wanted, counts, strict=True)]).to(xx_HH)
    w_T = torch.cat([torch.full((n,), w) for w, n in zip(weights, counts, strict=True)]).to(xx_HH)
    y, w = y_TC.split(4 * _STRIPE), w_T.split(4 * _STRIPE)  # type: ignore[no-untyped-call]

    def step(number: int, weight_HC: Tensor) -> tuple[float, Tensor]:
        logits = turned[number] @ weight_HC
        logs = normalised(logits, sigmoid=sigmoid)
        slope = logs.exp() - y[number]
        if sigmoid:
            slope = slope * (1 - logits.sigmoid())
        loss = -(w[number] * (y[number] * logs).sum(-1)).sum()
        return float(loss), turned[number].T @ (slope * w[number][:, None])

    def solve(regularization: float) -> Tensor:
        penalty = max(regularization * float(values_H.sum()) / len(values_H), 1e-12)
        scale_H1 = (values_H.clamp_min(0) + penalty).rsqrt().to(xx_HH)[:, None]
        scaled_HC = torch.zeros(len(values_H), y_TC.shape[1], dtype=torch.float64).to(xx_HH)

        def closure() -> Any:
            weight_HC = scale_H1 * scaled_HC
            made = share(lambda n: step(n, weight_HC), len(turned))
            gradient = sum((g for _, g in made), penalty * weight_HC)
            scaled_HC.grad = scale_H1 * gradient
            total = sum(loss for loss, _ in made) + penalty / 2 * float((weight_HC**2).sum())
            return torch.tensor(total, dtype=torch.float64)

        optimizer = torch.optim.LBFGS(
            [scaled_HC],
            max_iter=_STEPS,
            history_size=20,
            tolerance_grad=1e-8,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        solution: Tensor = (axes_HH @ (scale_H1 * scaled_HC)).cpu()
        return solution

    return solve
