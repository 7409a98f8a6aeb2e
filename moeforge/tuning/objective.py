"""Owns what routers are trained to lower: predictions of the next token, and the load balance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeforge.routing import Router, chosen, scored
from moeforge.tuning.data import IGNORED, Batch

if TYPE_CHECKING:
    from torch import Tensor, nn


def predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits [tokens, vocabulary] in float32 and labels [tokens] of the labelled tokens."""
    logits_BTV = model(input_ids=batch.ids_BT, use_cache=False).logits
    labelled = batch.labels_BT != IGNORED
    return logits_BTV[labelled].float(), batch.labels_BT[labelled]


def balance_loss(router: Router, logits_TE: Tensor) -> Tensor:
    """Return the load-balance loss of one layer, 1 where the load is even.

    E·Σ_e f_e·P_e with f_e the share of the choices that fall on expert e and P_e its mean score;
    scores of sigmoid routers are divided by their sum. Source: Fedus et al., "Switch
    Transformers", arXiv 2101.03961, equations 4 to 6, for more than one expert per token.
    """
    scores = scored(logits_TE, sigmoid=router.sigmoid)
    scores = scores / scores.sum(-1, keepdim=True)
    loss: Tensor = scores.shape[1] * (choices(router, logits_TE) * scores.mean(0)).sum()
    return loss


def choices(router: Router, logits_TE: Tensor) -> Tensor:
    """Return the share of the tokens' choices that falls on each expert, [E]."""
    scores = scored(logits_TE.detach(), sigmoid=router.sigmoid)
    places = chosen(scores, router.per_token, router.bias).flatten()
    return places.bincount(minlength=scores.shape[1]).float() / len(places)
