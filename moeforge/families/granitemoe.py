"""granitemoe: the home of granite and hyperclovax; also of llama-like models with biases.

It is llama with four scalar multipliers and an optional bias on all four attention projections.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import QKVO_BIASES, Family, Mixture, _granite


def config(dense: Config, mixture: Mixture) -> Config:
    """Write GraniteMoe's keys."""
    return {**_granite.config(dense, mixture), **_granite.REMOVED}


FAMILY = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    accepts=_granite.accepts(),
    router=_granite.ROUTER,
    experts=_granite.EXPERTS,
    config=config,
    refuse=_granite.refuse,
    exotic=_granite.exotic,
    optional=QKVO_BIASES,
    fills=_granite.BIASES,
)
