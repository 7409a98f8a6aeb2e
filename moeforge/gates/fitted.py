"""fitted: a linear classifier of "whose prompt is this?" on the router's true input.

Per layer, in closed form: ridge regression onto one-hot expert labels, then one temperature. How
strongly to regularise, and the temperature, are decided by prompts that the fit did not see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.gates import Gate, GateInput, TokenizedPrompt

if TYPE_CHECKING:
    from torch import Tensor

_REGULARIZATION = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Candidates for λ, relative to the mean variance of the inputs."""
_HELD_OUT = 4
"""Every fourth prompt of an expert is held out while λ and the temperature are chosen."""
_COARSE = [2.0**step for step in range(-4, 16)]
_FINE = [2.0 ** (step / 8) for step in range(-7, 8)]
"""Factors tried on the logits, then around the best of them; the loss is convex in the factor."""


def targets(prompt: TokenizedPrompt, experts: int) -> Tensor:
    """Return the wanted distribution [E]: the expert, or, for a negative prompt, all others."""
    import torch

    if prompt.negative and experts > 1:
        wanted = torch.full((experts,), 1.0 / (experts - 1))
        wanted[prompt.expert] = 0.0
        return wanted
    wanted = torch.zeros(experts)
    wanted[prompt.expert] = 1.0
    return wanted


def held_out(prompts: tuple[TokenizedPrompt, ...], experts: int) -> list[bool]:
    """Say for each prompt whether it is held out; nothing is where an expert has but one prompt."""
    counts = [0] * experts
    held = []
    for prompt in prompts:
        counts[prompt.expert] += not prompt.negative
        last_of_group = counts[prompt.expert] % _HELD_OUT == 2
        held.append(last_of_group and not prompt.negative)
    return held if min(counts) > 1 else [False] * len(prompts)


class _Moments:
    """Σ xxᵀ [H, H] and Σ x(y − 1/E)ᵀ [H, E], added up prompt by prompt in float64.

    Every expert's tokens weigh the same in total, however many there are of them.
    """

    def __init__(self, hidden: int, experts: int, device: object) -> None:
        import torch

        options = {"dtype": torch.float64, "device": device}
        self.xx_HH = torch.zeros(hidden, hidden, **options)  # type: ignore[call-overload]
        self.xy_HE = torch.zeros(hidden, experts, **options)  # type: ignore[call-overload]

    def add(self, x_TH: Tensor, wanted_E: Tensor, weight: float) -> None:
        x = x_TH.double()
        self.xx_HH.addmm_(x.T, x, alpha=weight)
        centred = wanted_E.to(x) - 1.0 / len(wanted_E)
        self.xy_HE.addr_(x.sum(0), centred, alpha=weight)

    def solve(self, regularization: float) -> Tensor:
        """Return W [H, E] = (Σxxᵀ + λ·tr/H·I)⁻¹ Σxyᵀ."""
        import torch

        hidden = self.xx_HH.shape[0]
        ridge = regularization * float(self.xx_HH.trace()) / hidden
        system = self.xx_HH.clone()
        system.diagonal().add_(max(ridge, 1e-12))
        solution: Tensor = torch.linalg.solve(system, self.xy_HE)
        return solution


def best_temperature(
    logits_TE: Tensor, wanted_TE: Tensor, weights_T: Tensor
) -> tuple[float, float]:
    """Return the least weighted cross entropy, and the factor on the logits that has it."""
    share_T = weights_T / weights_T.sum()

    def loss(factor: float) -> float:
        entropy_T = -(wanted_TE * (factor * logits_TE).log_softmax(-1)).sum(-1)
        return float((entropy_T * share_T).sum())

    coarse = min((loss(factor), factor) for factor in _COARSE)[1]
    return min((loss(coarse * factor), coarse * factor) for factor in _FINE)


def fit_layer(
    inputs: list[Tensor], wanted: list[Tensor], weights: list[float], held: list[bool]
) -> Tensor:
    """Return one layer's router weight [E, H].

    Args:
        inputs: router inputs of each prompt [tokens, H].
        wanted: wanted distribution of each prompt [E].
        weights: weight of each token of a prompt.
        held: prompts that choose λ and temperature; where none is, all of them do.
    """
    import torch

    hidden, experts = inputs[0].shape[1], len(wanted[0])
    device = inputs[0].device
    shown, hidden_part = _Moments(hidden, experts, device), _Moments(hidden, experts, device)
    for x_TH, wanted_E, weight, out in zip(inputs, wanted, weights, held, strict=True):
        (hidden_part if out else shown).add(x_TH, wanted_E, weight)
    judges = [i for i, out in enumerate(held) if out] or list(range(len(held)))
    x_TH = torch.cat([inputs[i] for i in judges]).double()
    wanted_TE = torch.cat([wanted[i].expand(len(inputs[i]), -1) for i in judges]).to(x_TH)
    weights_T = torch.cat([torch.full((len(inputs[i]),), weights[i]) for i in judges]).to(x_TH)
    # Without held-out prompts the loss would choose the least λ: take the strongest instead.
    candidates = _REGULARIZATION if any(held) else _REGULARIZATION[-1:]
    choices = []
    for regularization in candidates:
        logits_TE = x_TH @ shown.solve(regularization)
        loss, factor = best_temperature(logits_TE, wanted_TE, weights_T)
        choices.append((loss, regularization, factor))
    _, regularization, factor = min(choices)
    shown.xx_HH += hidden_part.xx_HH
    shown.xy_HE += hidden_part.xy_HE
    return (factor * shown.solve(regularization)).T.float().cpu()


def build(data: GateInput) -> Tensor:
    """Return gates_LEH: ridge weights times the temperature, layer by layer.

    Holds two H×H float64 matrices and the router inputs of one layer.
    """
    import torch

    prompts = tuple(data.prompts)
    experts = data.shape[1]
    wanted = [targets(prompt, experts) for prompt in prompts]
    held = held_out(prompts, experts)
    tokens = [0] * experts
    for prompt in prompts:
        tokens[prompt.expert] += len(prompt.ids) - prompt.first
    weights = [1.0 / tokens[prompt.expert] for prompt in prompts]
    layers = []
    for inputs in data.walk():
        chosen = [i.mlp_TH[p.first :] for i, p in zip(inputs, prompts, strict=True)]
        layers.append(fit_layer(chosen, wanted, weights, held))
    return torch.stack(layers)


GATE = Gate("ridge classifier on the router's true input", build, needs_prompts=True)
