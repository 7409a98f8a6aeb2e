"""granitemoeshared: granitemoe with shared experts, added to the routed ones as they are.

Where a recipe gives shared experts without prompts, this is what llama-like models become.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import QKVO_BIASES, Family, Mixture, _granite


def config(dense: Config, mixture: Mixture) -> Config:
    """Write GraniteMoeShared's keys; a width of 0 means that there is no shared expert."""
    shared = {"shared_intermediate_size": mixture.shared}
    return {**_granite.config(dense, mixture), **_granite.REMOVED, **shared}


FAMILY = Family(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    accepts=_granite.accepts(later=1),
    router=_granite.ROUTER,
    experts=_granite.EXPERTS,
    config=config,
    refuse=_granite.refuse,
    exotic=_granite.exotic,
    optional=QKVO_BIASES,
    fills=_granite.BIASES,
    shared=_granite.SHARED,
)
