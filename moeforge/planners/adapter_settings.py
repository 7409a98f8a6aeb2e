"""Owns what adapter_config.json says: rank and scale of each module, and kinds that are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

AGAIN = "Save the adapter again with peft."
WITH_PEFT = "Merge it into its model with peft, and name the result as a model."

_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
"""Keys that make an adapter something else than W + scale·B·A."""
_MOVED_BASE = re.compile(r"pissa.*|olora|corda|loftq|lora_ga")
"""Initialisations that also changed the weights that the adapter was trained on."""

_MOST_REPETITIONS = 4
_LARGEST = 10**9
"""Of ranks and alphas; NaN and infinity are beyond it."""

_ENDING = r"(.*\.)?({})$"
"""How a pattern is the end of a module's name. Source: peft.utils.other.get_pattern_key."""


class Settings:
    """An adapter_config.json with peft's meanings.

    Args:
        config: it, as `problems` has nothing against it.

    Attributes:
        dora: whether the rows of the result have trained lengths.
        tying: whether head and embedding stay one matrix where the model ties them.
        saved: modules that were trained whole and copied for it, by the ends of their names.
        parameters: whether it adapts parameters that are no module's weight.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.dora = bool(config.get("use_dora"))
        self.tying = bool(config.get("ensure_weight_tying"))
        saved = config.get("modules_to_save")
        self.saved: tuple[str, ...] = tuple(saved) if isinstance(saved, list) else ()
        self.parameters = bool(config.get("target_parameters"))

    def _value(self, key: str, patterns: str, module: str) -> Any:
        """Return `key` for `module`: of the first pattern that is its name or the end of it."""
        for pattern, value in (self._config.get(patterns) or {}).items():
            if re.match(_ENDING.format(pattern), module):
                return value
        return self._config[key]

    def rank(self, module: str) -> int:
        """Return the rank of the matrices of `module`."""
        return int(self._value("r", "rank_pattern", module))

    def scale(self, module: str) -> float:
        """Return the factor on the product of the matrices of `module`.

        Source: Hu et al., arXiv 2106.09685, section 4.1: alpha/rank; with `use_rslora`
        Kalajdzievski, arXiv 2312.03732: alpha/√rank.
        """
        rank, alpha = self.rank(module), self._value("lora_alpha", "alpha_pattern", module)
        return float(alpha / (sqrt(rank) if self._config.get("use_rslora") else rank))


def _refuse_endless(pattern: str) -> None:
    """Refuse a pattern whose matching could take for ever: repeated groups, many repetitions.

    Raises:
        re.error: it is one; peft's are names with a few wildcards.
    """
    repeated = re.search(r"\)\s*[*+{]", pattern)
    if repeated or len(re.findall(r"[*+{]", pattern)) > _MOST_REPETITIONS:
        raise re.error("it repeats too much to be matched in time")


def problems(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what makes an adapter_config.json impossible or of another kind, each with a fix."""
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        yield f"modules_to_save is {str(saved)[:60]!r}, not a list of names", AGAIN
    for key in _VARIANTS:
        if config.get(key):
            yield f"{key} makes it something else than low-rank matrices", WITH_PEFT
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _MOVED_BASE.fullmatch(start):
        what = f'its training began with init_lora_weights "{start}", which changed the model too'
        fix = (
            "Save it in peft with path_initial_model_for_weight_conversion: then it is plain LoRA."
        )
        yield what, fix
    for key, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        known = config.get(patterns) or {}
        if not isinstance(known, dict):
            yield f"{patterns} is {known!r}, not a mapping of names to numbers", AGAIN
            continue
        for pattern in known:
            try:
                _refuse_endless(pattern)
                re.compile(_ENDING.format(pattern))
            except (re.error, OverflowError, RecursionError) as error:
                yield f"{patterns} has {pattern!r}, which is no pattern: {error}", AGAIN
        for value in (config.get(key), *known.values()):
            kinds = int if key == "r" else (int, float)
            if (
                isinstance(value, bool)
                or not isinstance(value, kinds)
                or (key == "r" and value < 1)
                or not abs(value) <= _LARGEST
            ):
                yield f"{key} is {repr(value)[:60]}", AGAIN
