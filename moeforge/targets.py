"""Owns what other engines make of moeforge's outputs: which they read, which they get wrong.

It reads a plan and runs nothing. What was run and what was only read stands in docs/engines.md;
tests/test_engines.py holds this file against the engines themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moeforge.errors import Finding, RecipeError, nearest
from moeforge.plans import Fill, Plan

TARGETS = {
    "transformers4": "transformers 4.57",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp",
    "mlx": "mlx-lm",
}
"""What `--target` takes, and what the engine calls itself."""

RUN: dict[str, frozenset[str]] = {
    "transformers4": frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "granitemoe"}),
    "vllm": frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "granitemoe"}),
    "llama.cpp": frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "granitemoe"}),
    "mlx": frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "granitemoe"}),
}
"""Mixtures whose logits were compared there, apart from the traps below."""

_NOT_IN_4 = """
afmoe axk1 axk2 bailing_hybrid beam cohere2_moe cohere_compass_text cwm deepseek_v32 deepseek_v4
dots3_note dots3_note_text exaone_moe flint gemma4 gemma4_text gemma4_unified gemma4_unified_text
glm4_moe_lite glm_moe_dsa granite_swa granitemoe_swa hrm_text hy_v3 hy_v4 hyperclovax inkling2_text
inkling_text internlm3 iquestcoder jais2 kimi_linear kolibri1 laguna lfm2_moe lfm3 mellum
mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral3 nanochat nemotron_h olmo_hybrid
qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp qwen4_exp_text solar_open youtu zaya
"""

ABSENT: dict[str, frozenset[str]] = {"transformers4": frozenset(_NOT_IN_4.split())}
"""Model types that the engine has no class for."""


@dataclass(frozen=True)
class Trap:
    """Where an engine reads a mixture and computes something else, or refuses it.

    Attributes:
        types: model types of the mixture.
        when: (config.json of the output) -> what the engine does, or "".
        fix: what to do about it.
        warning: the output is right within limits that the text names.
    """

    types: tuple[str, ...]
    when: Callable[[dict[str, Any]], str]
    fix: str
    warning: bool = False


def _window(config: dict[str, Any]) -> str:
    window = config.get("sliding_window")
    if not window or window >= config.get("max_position_embeddings", 0):
        return ""
    return (
        f"looks back at all tokens where this model looks back {window} (sliding_window): the "
        "same up to that length, other numbers beyond it"
    )


def _mixed_windows(config: dict[str, Any]) -> str:
    if "sliding_attention" not in (config.get("layer_types") or ()):
        return ""
    return "does not read layer_types here, by which some layers of this model slide"


def _not_renormalised(config: dict[str, Any]) -> str:
    if config["num_experts_per_tok"] == config["num_experts"]:
        return ""
    return (
        "weighs the chosen experts by probabilities that add up to less than 1, in spite of "
        "norm_topk_prob"
    )


def _tied(config: dict[str, Any]) -> str:
    if not config.get("tie_word_embeddings"):
        return ""
    return "does not load it without lm_head.weight, and this model ties its head"


def _biases(what: str) -> Callable[[dict[str, Any]], str]:
    return lambda config: f"{what} (attention_bias is true)" if config.get("attention_bias") else ""


def _scaled_rope(config: dict[str, Any]) -> str:
    kind = (config.get("rope_parameters") or {}).get("rope_type", "default")
    return "" if kind == "default" else f"ignores the scaling of rotary positions ({kind})"


def _head_dim(config: dict[str, Any]) -> str:
    width = config["hidden_size"] / config["num_attention_heads"]
    given = config.get("head_dim") or width
    if given == width:
        return ""
    return f"takes heads for {width:g} wide (hidden_size / heads), head_dim is {given}"


def _activation(config: dict[str, Any]) -> str:
    given = config.get("hidden_act", "silu")
    return "" if given in ("silu", "swish") else f"computes SiLU whatever hidden_act says: {given}"


_NO_BIASES = (
    "Choose another --target; no home of a model with attention biases is read right there."
)
_GRANITE = "Write architecture: granitemoe."
_NO_WINDOW = "No setting helps: keep texts below that length, or take models without a window."
_OTHER = "Choose models without it for this engine."

TRAPS: dict[str, tuple[Trap, ...]] = {
    "transformers4": (Trap(("qwen2_moe",), _mixed_windows, _OTHER),),
    "vllm": (
        Trap(("mixtral", "qwen2_moe", "granitemoe"), _activation, _OTHER),
        Trap(("qwen2_moe",), _mixed_windows, _OTHER),
        Trap(("granitemoe",), _biases("drops attention biases without a word"), _NO_BIASES),
        Trap(("qwen3_moe",), _biases("drops the bias of o_proj without a word"), _NO_BIASES),
        Trap(("granitemoe", "qwen2_moe"), _head_dim, _OTHER),
    ),
    "llama.cpp": (
        Trap(("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe"), _activation, _OTHER),
        Trap(("mixtral",), _window, _NO_WINDOW, warning=True),
        Trap(("qwen2_moe",), _mixed_windows, _OTHER),
        Trap(("qwen2_moe",), _not_renormalised, _GRANITE),
        Trap(("qwen2_moe",), _tied, _GRANITE),
        Trap(("qwen3_moe",), _biases("does not load attention biases here"), _OTHER),
    ),
    "mlx": (
        Trap(("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe"), _activation, _OTHER),
        Trap(("mixtral",), _window, _NO_WINDOW, warning=True),
        Trap(("mixtral", "qwen2_moe", "granitemoe"), _head_dim, _OTHER),
        Trap(("mixtral", "qwen2_moe", "qwen3_moe"), _scaled_rope, _OTHER),
        Trap(("qwen2_moe",), _mixed_windows, _OTHER),
        Trap(("qwen2_moe",), _not_renormalised, _GRANITE),
        Trap(("qwen2_moe",), _tied, _GRANITE),
        Trap(("qwen3_moe",), _biases("does not load attention biases here"), _OTHER),
    ),
}
"""What was found, by engine."""


def report(plan: Plan, target: str) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """Return what another engine gets wrong about a planned output, and what else is to be known.

    Args:
        plan: the output.
        target: one of `TARGETS`.

    Returns:
        errors: the engine does not load the output, or computes something else.
        notes: warnings of limits, and whether anyone has looked.

    Raises:
        RecipeError: `target` is none of `TARGETS`.
    """
    named(target)
    engine, kind = TARGETS[target], str(plan.config.get("model_type"))
    if kind in ABSENT.get(target, ()):
        what = f"{engine} has no {kind}"
        return (Finding(what, "Choose another architecture, or another --target."),), ()
    if plan.code:
        return _code(plan, target)
    if plan.experts is None:
        return (), (Finding(f"{engine} reads this like any other {kind} model"),)
    if kind not in RUN[target]:
        what = f"nobody has looked at what {engine} makes of {kind}"
        return (), (Finding(what, "Compare its logits before you rely on it.", warning=True),)
    found = [
        (trap, Finding(f"{engine} {what}", trap.fix, warning=trap.warning))
        for trap in TRAPS[target]
        if kind in trap.types and (what := trap.when(plan.config))
    ]
    errors = [finding for trap, finding in found if not trap.warning]
    notes = [finding for trap, finding in found if trap.warning]
    if target == "llama.cpp":
        errors += _zero_gates(plan)
    if not errors:
        notes.append(Finding(f"{engine} was run on {kind}: equal logits"))
    return tuple(errors), tuple(notes)


def named(target: str) -> None:
    """Refuse a word that is no target.

    Raises:
        RecipeError: it is none of `TARGETS`.
    """
    if target not in TARGETS:
        what = f'--target "{target}" is unknown{nearest(target, TARGETS)}'
        raise RecipeError(Finding(what, f"Known: {', '.join(TARGETS)}."))


def _code(plan: Plan, target: str) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """Say what an engine makes of a model that brings program text of its own."""
    engine, files = TARGETS[target], ", ".join(plan.code)
    if target in ("llama.cpp", "mlx"):
        what = f"{engine} knows no model that brings code of its own ({files})"
        return (Finding(what, "Choose an architecture other than remote."),), ()
    what = f"nobody has looked at what {engine} makes of code of its own ({files})"
    return (), (Finding(what, "Compare its logits before you rely on it.", warning=True),)


def _zero_gates(plan: Plan) -> list[Finding]:
    """Find shared experts whose gate is zero: llama.cpp computes it as silu(x)/x."""
    if not any(
        tensor.name.endswith("shared_expert_gate.weight") and tensor.expr == Fill(0.0)
        for tensor in plan.tensors
    ):
        return []
    what = "llama.cpp divides by the gate of the shared expert, which is zero: all logits are NaN"
    return [Finding(what, "Give the shared expert another gate.")]
