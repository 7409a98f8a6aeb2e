"""Owns the routers of a mixture that transformers has loaded: where they are, what they decide.

Knows transformers' module layout; knows nothing of recipes, prompts or how gates are made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_ROUTER = re.compile(
    r"\.(\d+)\.(?:[a-z]\w*\.){0,2}(?:gate|router|gate\.wg|router\.layer|router\.proj)$"
)
"""Module that owns a router's weight, below its layer's number."""
_BIASES = ("e_score_correction_bias", "moe_statics.e_score_correction_bias", "expert_bias")
_PER_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "top_k")
_SIGMOID = {"glm4_moe", "dots1", "deepseek_v3", "solar_open", "hy_v3", "exaone_moe", "lfm2_moe"}
"""Types whose scores are sigmoids of the logits; those of all others are their softmax."""


@dataclass(frozen=True)
class Router:
    """One layer's router. E experts, H hidden.

    Attributes:
        layer: number of its layer.
        name: name of its weight in the model.
        owner: the module that has the weight; the router's input is its first argument.
        weight: [E, H].
        bias: what is added to the scores for selection only, [E], or None.
        sigmoid: whether scores are sigmoids of the logits, not their softmax.
        per_token: experts that each token passes through.
    """

    layer: int
    name: str
    owner: nn.Module
    weight: nn.Parameter
    bias: Tensor | None
    sigmoid: bool
    per_token: int

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [tokens, E] in float32 for inputs [..., H]."""
        flat = x.reshape(-1, x.shape[-1]).float()
        logits: Tensor = flat @ self.weight.float().T
        return logits

    def shares(self, logits: Tensor) -> Tensor:
        """Return the weights [tokens, E] with which experts count: zero but for the chosen ones.

        Scores of the chosen, divided by their sum: what every supported family computes, up to
        constants added to the sum against division by zero.
        """
        return shares(logits, self.per_token, sigmoid=self.sigmoid, bias=self.bias)


def scored(logits: Tensor, *, sigmoid: bool) -> Tensor:
    """Return the scores [tokens, E] of logits: sigmoids, or their softmax."""
    return logits.sigmoid() if sigmoid else logits.softmax(-1)


def chosen(scores: Tensor, per_token: int, bias: Tensor | None) -> Tensor:
    """Return the numbers [tokens, per_token] of the experts that tokens go to.

    Args:
        scores: [tokens, E].
        per_token: experts for each token.
        bias: what is added to the scores for this only, E elements, or None.
    """
    order = scores if bias is None else scores + bias.to(scores).reshape(-1)
    return order.topk(per_token, dim=-1).indices


def shares(logits: Tensor, per_token: int, *, sigmoid: bool, bias: Tensor | None = None) -> Tensor:
    """Return the weights [tokens, E] with which experts count, as `Router.shares` does."""
    import torch

    scores = scored(logits, sigmoid=sigmoid)
    places = chosen(scores, per_token, bias)
    kept = torch.zeros_like(scores).scatter(-1, places, scores.gather(-1, places))
    return kept / kept.sum(-1, keepdim=True)


def _per_token(config: Any) -> int:
    nested = getattr(config, "ffn_config", None)  # dbrx
    for holder, keys in ((config, _PER_TOKEN), (nested, ("moe_top_k",))):
        for key in keys if holder is not None else ():
            value = getattr(holder, key, None)
            if isinstance(value, list):  # hunyuan: one number for each layer
                value = value[0]
            if isinstance(value, int):
                return value
    raise ValueError(f"the config of this {config.model_type} model does not say how many experts")


def _bias(model: nn.Module, owner: str) -> Tensor | None:
    """Return the selection bias of the router whose weight module `owner` has."""
    named = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for stem in (owner, owner.rpartition(".")[0]):
        for bias in _BIASES:
            if f"{stem}.{bias}" in named:
                return named[f"{stem}.{bias}"]
    return None


def routers(model: nn.Module) -> list[Router]:
    """Return the routers of a loaded mixture, by layer; empty for a dense model.

    Raises:
        ValueError: the config does not say how many experts a token passes through.
    """
    config: Any = model.config
    found = []
    for name, module in model.named_modules():
        match = _ROUTER.search(name)
        weight = getattr(module, "weight", None)
        if match and weight is not None and weight.dim() == 2 and weight.shape[0] > 1:
            found.append((int(match[1]), name, module))
    kind = str(config.model_type).removeprefix("moeforge_")
    return [
        Router(
            layer,
            f"{name}.weight",
            module,
            module.weight,
            _bias(model, name),
            kind in _SIGMOID,
            _per_token(config),
        )
        for layer, name, module in sorted(found, key=lambda entry: entry[0])
    ]


@contextmanager
def recording(found: list[Router]) -> Iterator[dict[int, list[Tensor]]]:
    """Collect the logits [tokens, E] of every router, by layer, one entry per forward pass.

    Gradients flow through them.
    """
    seen: dict[int, list[Tensor]] = {router.layer: [] for router in found}
    hooks = []
    for router in found:

        def record(module: nn.Module, inputs: Any, router: Router = router) -> None:
            seen[router.layer].append(router.logits(inputs[0]))

        hooks.append(router.owner.register_forward_pre_hook(record))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
