"""Owns what other engines make of moeforge's outputs: which they read, which they get wrong.

It reads a plan and runs nothing; docs/engines.md says with which versions everything was run.
"""

from __future__ import annotations

from moeforge.errors import Finding, RecipeError, nearest
from moeforge.plans import Fill, Plan
from moeforge.targets.traps import ROPES, TRAPS, ropes

TARGETS = {
    "transformers4": "transformers 4.57",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp",
    "mlx": "mlx-lm",
}
"""What `--target` takes, and what the engine calls itself."""

_MOST = "mixtral qwen2_moe qwen3_moe granitemoe ernie4_5_moe deepseek_v3 dots1 dbrx glm4_moe"
RUN = {
    "transformers4": f"{_MOST} granitemoeshared granitemoehybrid hunyuan_v1_moe flex_olmo "
    "moeforge_gemma2 moeforge_gpt2",
    "vllm": f"{_MOST} granitemoeshared granitemoehybrid granitemoe_swa mellum cohere2_moe "
    "lfm2_moe hunyuan_v1_moe gemma4_text flex_olmo",
    "llama.cpp": f"{_MOST} granitemoeshared granitemoehybrid granitemoe_swa mellum cohere2_moe "
    "qwen3_5_moe_text lfm2_moe hunyuan_v1_moe gemma4_text",
    "mlx": f"{_MOST} granitemoehybrid mellum lfm2_moe gemma4_text",
}
"""Mixtures that were run there: equal logits, apart from the traps."""

ABSENT = {
    "transformers4": """
afmoe axk1 axk2 bailing_hybrid beam cohere2_moe cohere_compass_text cwm deepseek_v32 deepseek_v4
dots3_note dots3_note_text exaone_moe flint gemma4 gemma4_text gemma4_unified gemma4_unified_text
glm4_moe_lite glm_moe_dsa granite_swa granitemoe_swa hrm_text hy_v3 hy_v4 hyperclovax inkling2_text
inkling_text internlm3 iquestcoder jais2 kimi_linear kolibri1 laguna lfm2_moe lfm3 mellum
mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral3 nanochat nemotron_h olmo_hybrid
qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp qwen4_exp_text solar_open youtu zaya""",
    "vllm": "",
    "llama.cpp": "flex_olmo",
    "mlx": "qwen3_5_moe_text granitemoeshared granitemoe_swa hunyuan_v1_moe flex_olmo cohere2_moe",
}
"""Model types that the engine does not have."""

CODE = {
    "llama.cpp": "runs no code of a model's own",
    "mlx": "runs no code of a model's own",
    "vllm": "does not run this model's own code: it asks for AutoModel in auto_map",
}
"""What engines say to program text that a model brings, where they do not run it."""

_COMPARE = "Compare its logits before you rely on it."
Findings = tuple[Finding, ...]


def named(target: str) -> None:
    """Refuse a word that is no target.

    Raises:
        RecipeError: it is none of `TARGETS`.
    """
    if target not in TARGETS:
        what = f'--target "{target}" is unknown{nearest(target, TARGETS)}'
        raise RecipeError(Finding(what, f"Known: {', '.join(TARGETS)}."))


def report(plan: Plan, target: str) -> tuple[Findings, Findings]:
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
    if kind in ABSENT[target].split():
        what = f"{engine} has no {kind}"
        return (Finding(what, "Choose another architecture, or another --target."),), ()
    if plan.code and target in CODE:
        what = f"{engine} {CODE[target]} ({', '.join(plan.code)})"
        return (Finding(what, "Choose an architecture other than remote."),), ()
    if plan.experts is None:
        return (), (Finding(f"{engine} reads this like any other {kind} model"),)
    if kind not in RUN[target].split():
        return (), (Finding(f"nobody has looked at what {engine} makes of {kind}", _COMPARE),)
    errors, notes = _trapped(plan, target)
    if not errors:
        notes += [*_unseen_ropes(plan, target), Finding(f"{engine} was run on {kind}")]
    return tuple(errors), tuple(notes)


def _trapped(plan: Plan, target: str) -> tuple[list[Finding], list[Finding]]:
    """Return the traps that this output falls into: errors, and warnings of limits."""
    errors: list[Finding] = []
    notes: list[Finding] = []
    for trap in TRAPS[target]:
        if plan.config["model_type"] not in trap.types.split():
            continue
        if what := trap.when(plan.config):
            finding = Finding(f"{TARGETS[target]} {what}", trap.fix, warning=trap.warning)
            (notes if trap.warning else errors).append(finding)
    if target == "llama.cpp" and _has_gate_of_zero(plan):
        what = "llama.cpp divides by the gate of the shared expert, which is zero: it gives NaN"
        errors.append(Finding(what, "Give the shared expert another gate."))
    return errors, notes


def _unseen_ropes(plan: Plan, target: str) -> list[Finding]:
    """Return a note on each scaling of rotary positions that was not run there."""
    kind = plan.config["model_type"]
    run = ROPES[target].get(kind, "").split()
    return [
        Finding(
            f"nobody has looked at what {TARGETS[target]} makes of {rope} positions in {kind}",
            _COMPARE,
        )
        for rope in ropes(plan.config)
        if rope not in run
    ]


def _has_gate_of_zero(plan: Plan) -> bool:
    """Find shared experts whose gate is zero: llama.cpp computes it as silu(x)/x."""
    return any(
        tensor.name.endswith("shared_expert_gate.weight") and tensor.expr == Fill(0.0)
        for tensor in plan.tensors
    )
