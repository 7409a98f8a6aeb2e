"""fitted: a linear classifier of "which expert does this text want?" on the router's true input.

Per layer: ridge or logistic regression without intercept, one temperature, and biases for the load
of experts where balance asks for them. How strongly to regularise, and the temperature, are decided
by prompts that the fit did not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moeforge.gates import Gate, GateInput, Gates, LayerFit, LayerGate
from moeforge.gates._balance import biases, carrier, load
from moeforge.gates._classify import Classifier, fit_layer
from moeforge.gates._labels import Labels, against, labels
from moeforge.gates._solve import second_moment
from moeforge.routing import scored

if TYPE_CHECKING:
    from torch import Tensor

    from moeforge.forward import LayerInputs


def _calibrate(
    weight_EH: Tensor, inputs: Sequence[Tensor], weights: Sequence[float], data: GateInput
) -> tuple[LayerGate, tuple[float, ...], tuple[float, ...]]:
    """Return a layer's router with the load that is asked for, and the loads before and after.

    Args:
        weight_EH: as fitted.
        inputs: router inputs of each prompt of the calibration mix.
        weights: weight of each of their tokens.
        data: what is asked for.
    """
    import torch

    def times(rows: Tensor) -> Tensor:
        return torch.cat([x.double() @ rows.T.to(x.device) for x in inputs]).cpu()

    parts = zip(weights, inputs, strict=True)
    w_T = torch.cat([torch.full((len(x),), w, dtype=torch.float64) for w, x in parts])
    logits_TE, experts = times(weight_EH), len(weight_EH)
    scores_TE = scored(logits_TE, sigmoid=data.sigmoid)
    bias_E, asked = torch.zeros(experts).double(), data.parameters.balance
    before = after = tuple(load(scores_TE, w_T, data.per_token).tolist())
    if data.parameters.balanced and data.per_token < experts:
        wanted_E = asked if isinstance(asked, tuple) else (1 / experts,) * experts
        amount = 1.0 if isinstance(asked, tuple) else asked
        target_E = torch.tensor(wanted_E).double()
        if data.biased:
            bias_E = amount * biases(scores_TE, None, w_T, data.per_token, target_E)
            after = tuple(load(scores_TE, w_T, data.per_token, bias_E).tolist())
        else:
            v_H = _carrier(inputs, weights, data)
            found = biases(logits_TE, times(v_H[None])[:, 0], w_T, data.per_token, target_E)
            weight_EH = weight_EH + amount * found[:, None] * v_H
            after = tuple(load(times(weight_EH), w_T, data.per_token).tolist())
    gate = LayerGate(weight_EH.float(), bias_E.float() if data.biased else None)
    return gate, before, after


def _carrier(inputs: Sequence[Tensor], weights: Sequence[float], data: GateInput) -> Tensor:
    """Return what carries a bias in the weights, [H] in float64 on the CPU."""
    import torch

    pairs = list(zip(weights, inputs, strict=True))
    total = sum(weight * len(x) for weight, x in pairs)
    mean_H = torch.stack([weight * x.double().sum(0) for weight, x in pairs]).sum(0) / total
    xx_HH = second_moment(inputs, weights, data.share) / total
    return carrier(xx_HH.cpu(), mean_H.cpu())


def build(data: GateInput) -> Gates:
    """Return router weights, layer by layer, with what is known of each.

    Holds some H×H float64 matrices and, for the logistic method and for balancing, the router
    inputs of one layer in float64.
    """
    import torch

    experts = data.shape[1] - data.gated
    routed = [i for i, prompt in enumerate(data.prompts) if prompt.expert < experts]
    wanted = labels([data.prompts[i] for i in routed], experts)
    token_weight = dict(zip(routed, wanted.weights, strict=True))
    mixed = [i for i in routed if not data.prompts[i].negative]
    shared = against(data.prompts, experts) if data.gated else None
    made: list[LayerGate] = []
    fits: list[LayerFit] = []
    given = data.parameters

    def classifier(inputs: Sequence[Tensor], what: Labels, sigmoid: bool) -> Classifier:
        return fit_layer(
            inputs,
            what,
            method=given.method,
            regularization=given.regularization,
            sigmoid=sigmoid,
            share=data.share,
        )

    def fit(seen: Sequence[LayerInputs]) -> LayerGate:
        every = [i.mlp_TH[p.first :] for i, p in zip(seen, data.prompts, strict=True)]
        found = classifier([every[i] for i in routed], wanted, data.sigmoid)
        mix = [every[i] for i in mixed], [token_weight[i] for i in mixed]
        gate, before, after = _calibrate(found.weight[:experts], *mix, data)
        if shared is not None:
            # A sigmoid of one row is a softmax of two, of which it is the difference.
            pair = classifier(every, shared, False).weight
            row = (pair[0] - pair[1]).float()[None]
            gate = LayerGate(torch.cat([gate.weight, row]), gate.bias)
        made.append(gate)
        fits.append(LayerFit(found.regularization, found.temperature, found.loss, before, after))
        return gate

    if data.on_policy:
        assert data.grow is not None, "whoever asks for it can run the mixture"
        data.grow(fit)
    else:
        for seen in data.walk():
            fit(seen)
    weights_LEH = torch.stack([gate.weight for gate in made])
    biased = [gate.bias for gate in made if gate.bias is not None]
    return Gates(weights_LEH, torch.stack(biased) if biased else None, tuple(fits))


GATE = Gate("linear classifier on the router's true input", build, needs_prompts=True)
