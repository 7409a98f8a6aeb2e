"""Owns the table of what single engines get wrong. Every line was run: tests/test_engines.py.

A trap is a function of the output's config.json that says what the engine does, or "".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Trap:
    """Where an engine reads a mixture and computes something else, or refuses it.

    Attributes:
        types: model types of the mixture.
        when: (config.json of the output) -> what the engine does, or "".
        fix: what to do about it.
        warning: the output is right within limits that the text names.
    """

    types: str
    when: Callable[[Config], str]
    fix: str
    warning: bool = False


def window(config: Config) -> str:
    """One window for all layers, which the engine does not read."""
    size = config.get("sliding_window")
    if not size or size >= config.get("max_position_embeddings", 0):
        return ""
    return (
        f"looks back at all tokens where this model looks back {size} (sliding_window): the same "
        "up to that length, other numbers beyond it"
    )


def mixed_windows(config: Config) -> str:
    """Layers that slide beside layers that do not."""
    if "sliding_attention" not in (config.get("layer_types") or ()):
        return ""
    return "does not read layer_types here, by which some layers of this model slide"


def some_slide(config: Config) -> str:
    """Layers that slide beside layers that do not, of which the engine makes something else."""
    if len(set(config["layer_types"])) == 1:
        return ""
    return "computes other numbers beyond the window where only some layers slide (layer_types)"


def no_window(config: Config) -> str:
    """An architecture of sliding layers, without one."""
    if "sliding_attention" in (config.get("layer_types") or ()):
        return ""
    return "ends itself on this architecture where no layer slides (layer_types)"


def not_renormalised(config: Config) -> str:
    """Weights of the chosen experts that do not add up to 1."""
    if config["num_experts_per_tok"] == config["num_experts"]:
        return ""
    return (
        "weighs the chosen experts by probabilities that add up to less than 1, in spite of "
        "norm_topk_prob"
    )


def tied(config: Config) -> str:
    """A head that is the embedding, where the engine wants a tensor."""
    if not config.get("tie_word_embeddings"):
        return ""
    return "does not load it without lm_head.weight, and this model ties its head"


def no_shared(config: Config) -> str:
    """No shared expert, where the engine takes one for granted."""
    if config.get("n_shared_experts"):
        return ""
    return "does not load it without a shared expert (n_shared_experts is 0)"


def grouped_heads(config: Config) -> str:
    """Fewer heads of keys than of queries."""
    if config["num_key_value_heads"] == config["num_attention_heads"]:
        return ""
    return (
        f"does not load it with {config['num_key_value_heads']} heads of keys for "
        f"{config['num_attention_heads']} of queries"
    )


def dense_layers(config: Config) -> str:
    """Layers without experts among those with them."""
    if not config.get("mlp_only_layers"):
        return ""
    return "does not convert it when some layers have no experts (mlp_only_layers)"


def mamba(config: Config) -> str:
    """Mamba layers."""
    if "mamba" not in (config.get("layer_types") or ()):
        return ""
    return "computes other numbers in this architecture's Mamba layers"


def biases(what: str) -> Callable[[Config], str]:
    """Return a trap for biases of the attention."""
    return lambda config: f"{what} (attention_bias is true)" if config.get("attention_bias") else ""


def always(what: str) -> Callable[[Config], str]:
    """Return a trap that nothing avoids."""
    return lambda config: what


def lacks(key: str) -> Callable[[Config], str]:
    """Return a trap for a key that the engine asks for."""
    return lambda config: "" if key in config else f"asks for {key} in config.json and stops"


def head_dim(config: Config) -> str:
    """Heads whose width is not hidden / heads."""
    width = config["hidden_size"] / config["num_attention_heads"]
    given = config.get("head_dim") or width
    if given == width:
        return ""
    return f"takes heads for {width:g} wide (hidden_size / heads), head_dim is {given}"


def activation(config: Config) -> str:
    """An activation other than SiLU."""
    given = config.get("hidden_act", "silu")
    return "" if given in ("silu", "swish") else f"computes SiLU whatever hidden_act says: {given}"


def ropes(config: Config) -> dict[str, Config]:
    """Return the scalings of rotary positions that are none of the default, by kind."""
    parameters = config.get("rope_parameters") or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {
        kind: rope
        for rope in (nested or [parameters])
        if (kind := rope.get("rope_type", "default")) != "default"
    }


def scaled(*kinds: str) -> Callable[[Config], str]:
    """Return a trap for these scalings of rotary positions; for all of them if none is named."""

    def when(config: Config) -> str:
        found = [kind for kind in ropes(config) if not kinds or kind in kinds]
        return f"ignores the scaling of rotary positions here ({found[0]})" if found else ""

    return when


def yarn_factors(config: Config) -> str:
    """YaRN whose factor on attention is given by mscale."""
    yarn = ropes(config).get("yarn", {})
    if "mscale" not in yarn and "mscale_all_dim" not in yarn:
        return ""
    return "does not read YaRN's mscale and mscale_all_dim as transformers does"


ROPES: dict[str, dict[str, str]] = {
    "transformers4": {
        "mixtral": "linear llama3 yarn longrope",
        "qwen3_moe": "yarn",
        "granitemoe": "yarn",
        "glm4_moe": "longrope",
        "deepseek_v3": "yarn",
        "flex_olmo": "linear",
    },
    "vllm": {
        "mixtral": "linear llama3 yarn longrope",
        "qwen3_moe": "yarn",
        "granitemoe": "yarn",
        "glm4_moe": "longrope",
        "cohere2_moe": "linear",
        "gemma4_text": "proportional",
    },
    "llama.cpp": {
        "mixtral": "linear llama3 yarn",
        "qwen3_moe": "yarn",
        "granitemoe": "yarn",
    },
    "mlx": {"granitemoe": "yarn"},
}
"""Scalings of rotary positions that were run and are right, by engine and mixture."""

_ACT = "Choose models with SiLU for this engine."
_GRANITE = "Write architecture: granitemoe."
_SHORT = "Keep texts below that length, or choose models without a window."
_OTHER = "Choose models without it, or another --target."
_SHARED = "Give shared_experts."
_ON_CPU = "computes other numbers on a CPU; on a GPU nobody has looked"
_QWEN = "mixtral qwen2_moe qwen3_moe"

TRAPS: dict[str, tuple[Trap, ...]] = {
    "transformers4": (
        Trap("qwen2_moe", mixed_windows, _OTHER),
        Trap("dbrx", scaled(), _OTHER),
    ),
    "vllm": (
        Trap("mixtral granitemoe", activation, _ACT),
        Trap("qwen2_moe", mixed_windows, _OTHER),
        Trap("cohere2_moe", some_slide, _OTHER),
        Trap("glm4_moe dots1 deepseek_v3", no_shared, _SHARED),
        Trap("deepseek_v3", always(_ON_CPU), "Compare its logits on yours.", warning=True),
        Trap("lfm2_moe", always("computes other numbers from the second token on"), _OTHER),
        Trap("dbrx flex_olmo", always("does not load this architecture"), _OTHER),
        Trap("granitemoe", biases("leaves attention biases out without a word"), _OTHER),
        Trap("qwen3_moe", biases("leaves the bias of o_proj out without a word"), _OTHER),
    ),
    "llama.cpp": (
        Trap("mixtral granitemoe", activation, _ACT),
        Trap("mixtral", window, _SHORT, warning=True),
        Trap("mixtral glm4_moe", scaled("longrope"), _OTHER),
        Trap("mixtral deepseek_v3", yarn_factors, _OTHER),
        Trap("dbrx cohere2_moe", scaled(), _OTHER),
        Trap("qwen2_moe dots1", mixed_windows, _OTHER),
        Trap("qwen2_moe", not_renormalised, _GRANITE),
        Trap("qwen2_moe", tied, _GRANITE),
        Trap("qwen3_moe", biases("does not load attention biases here"), _OTHER),
        Trap("qwen3_moe", dense_layers, "Give all layers experts."),
        Trap("glm4_moe dots1 deepseek_v3", no_shared, _SHARED),
        Trap("dots1", grouped_heads, "Write architecture: mellum."),
        Trap("granitemoe_swa", no_window, _OTHER),
        Trap("hunyuan_v1_moe", lacks("moe_intermediate_size"), _OTHER),
        Trap("gemma4_text", always("does not convert the text model alone"), _OTHER),
    ),
    "mlx": (
        Trap("mixtral granitemoe", activation, _ACT),
        Trap("mixtral", window, _SHORT, warning=True),
        Trap("mixtral", head_dim, _OTHER),
        Trap(f"{_QWEN} dbrx glm4_moe", scaled(), _OTHER),
        Trap("qwen2_moe dots1", mixed_windows, _OTHER),
        Trap("qwen2_moe", not_renormalised, _GRANITE),
        Trap("qwen2_moe", tied, _GRANITE),
        Trap("deepseek_v3", tied, _OTHER),
        Trap("qwen3_moe", biases("does not load attention biases here"), _OTHER),
        Trap("glm4_moe dots1 deepseek_v3", no_shared, _SHARED),
        Trap("glm4_moe", lacks("rope_scaling"), 'Write "rope_scaling": null into config.json.'),
        Trap("granitemoehybrid", mamba, _OTHER),
        Trap("gemma4_text", always("does not load this architecture with experts"), _OTHER),
    ),
}
"""What was found, by engine."""
