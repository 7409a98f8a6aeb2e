"""Owns watching the routers of a mixture while it runs: what each decides for every token.

What counts is what transformers hands to the experts, so groups of experts, selection biases and
scales of a family have their say. Knows nothing of prompts or of what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moeforge import catalog
from moeforge.errors import BuildError, Finding
from moeforge.routing import Router, routers, scored

if TYPE_CHECKING:
    from torch import Tensor, nn

_NEAR = 0.01
"""Mean difference of weights, at most, where a way to compute scores is taken for the router's own:
above what bfloat16 rounds, far below how softmax and sigmoids differ."""

Decided = tuple["Tensor", "Tensor", "Tensor"]
"""chosen_TK, weights_TK and entropy_T of T tokens with K experts each. Of the chosen, the one with
the largest weight is first; weights add up to 1."""


def on_shelf(model: nn.Module) -> bool:
    """Say whether moeforge makes mixtures of this type."""
    kind = str(model.config.model_type)  # type: ignore[union-attr]
    return kind in catalog.names("families") or _ours(model)


def _ours(model: nn.Module) -> bool:
    kind = str(model.config.model_type)  # type: ignore[union-attr]
    return kind.startswith("moeforge_")


class Watch:
    """What one router decides in one forward pass."""

    def __init__(self, router: Router, model: nn.Module) -> None:
        import torch

        self.router = router
        self._logits: Tensor | None = None
        self._handed: tuple[Tensor, Tensor] | None = None
        self._experts = _experts(model, router)
        # The first prompt shows how logits become scores. Where it does not (one expert per token,
        # say), it is known of our own types and of those on the shelf.
        self._sigmoid: bool | None = router.sigmoid if on_shelf(model) else None
        self._asked = False
        self._alone = isinstance(self._experts, torch.nn.ModuleList)
        if self._alone and not _ours(model):
            what = f"{router.name}: code that moeforge does not know calls its experts one by one"
            raise BuildError(Finding(f"{what}; what they are given cannot be seen"))
        rows = router.weight.shape[0]
        if (count := getattr(self._experts, "num_experts", rows)) != rows:
            what = f"{router.name} has {rows} rows for {count} experts"
            raise BuildError(Finding(f"{what}; what the others are for is not known"))

    def hooks(self) -> Iterator[Any]:
        """Hook into the router and its experts; yield what removes that again."""
        yield self.router.owner.register_forward_hook(self._see_logits)
        if not self._alone:
            yield self._experts.register_forward_pre_hook(self._see_choice, with_kwargs=True)

    def _see_logits(self, module: nn.Module, given: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        self._logits = logits.detach().reshape(-1, logits.shape[-1]).double().cpu()

    def _see_choice(self, module: nn.Module, given: Any, named: dict[str, Any]) -> None:
        tensors = [t for t in (*given[1:], *named.values()) if hasattr(t, "is_floating_point")]
        numbers = [t for t in tensors if not t.is_floating_point()]
        weights = [t for t in tensors if t.is_floating_point()]
        if len(numbers) == len(weights) == 1:
            self._handed = numbers[0].detach().cpu(), weights[0].detach().double().cpu()

    def decided(self) -> Decided:
        """Return what was decided and forget it.

        Raises:
            BuildError: it cannot be seen, or the weights are no shares.
        """
        logits, self._logits = self._logits, None
        handed, self._handed = self._handed, None
        if logits is None or (handed is None and not self._alone):
            what = f"{self.router.name} was not asked as routers of known families are"
            raise BuildError(Finding(f"{what}: its choice cannot be seen"))
        if handed is None:
            weights, chosen = self.router.shares(logits).topk(self.router.per_token)
        else:
            chosen, weights = (t.reshape(len(logits), -1) for t in handed)
            weights, order = weights.sort(dim=-1, descending=True, stable=True)
            chosen = chosen.gather(-1, order)
        weights = weights / weights.sum(-1, keepdim=True)
        if not bool(weights.isfinite().all()) or bool((weights < 0).any()):
            what = f"{self.router.name} gives weights that are no shares: NaN, or negative"
            raise BuildError(Finding(what, "Its weights may be damaged."))
        if not self._asked:
            seen, self._asked = _kind_of_score(logits, chosen, weights), True
            self._sigmoid = self._sigmoid if seen is None else seen
        return chosen, weights, _entropy(logits, self._sigmoid)


def _kind_of_score(logits: Tensor, chosen: Tensor, weights: Tensor) -> bool | None:
    """Say whether the weights of the chosen are sigmoids of their logits, or their softmax.

    Both divided by their sum. None where neither is near, or one expert alone says nothing.
    """
    if chosen.shape[-1] < 2:
        return None
    errors = {}
    for sigmoid in (False, True):
        scores = scored(logits, sigmoid=sigmoid).gather(-1, chosen)
        shares = scores / scores.sum(-1, keepdim=True)
        errors[sigmoid] = float((shares - weights).abs().mean())
    best = min(errors, key=lambda sigmoid: errors[sigmoid])
    return best if errors[best] < _NEAR else None


def _entropy(logits: Tensor, sigmoid: bool | None) -> Tensor:
    """Return the entropy [tokens] of the scores over their sum, in units of log E.

    NaN where it is not known how logits become scores.
    """
    import torch

    if sigmoid is None:
        return torch.full((len(logits),), torch.nan, dtype=torch.float64)
    p_TE = scored(logits, sigmoid=sigmoid)
    p_TE = p_TE / p_TE.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(p_TE).sum(-1) / math.log(logits.shape[-1])
    return entropy


def _experts(model: nn.Module, router: Router) -> nn.Module:
    """Return the experts that a router hands tokens to: the nearest module of that name."""
    inside = router.name.split(".")
    while inside:
        inside.pop()
        found = getattr(model.get_submodule(".".join(inside)), "experts", None)
        if found is not None:
            experts: nn.Module = found
            return experts
    raise BuildError(Finding(f"{router.name}: no experts are beside this router"))


@contextmanager
def watching(model: nn.Module) -> Iterator[list[Watch]]:
    """Watch the routers of a mixture, by layer.

    Raises:
        BuildError: what one of them decides cannot be seen.
    """
    watches = [Watch(router, model) for router in routers(model)]
    hooks = [hook for watch in watches for hook in watch.hooks()]
    try:
        yield watches
    finally:
        for hook in hooks:
            hook.remove()
