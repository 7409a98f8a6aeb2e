"""qwen2_moe: a home of qwen2 models, with a shared expert that contributes nothing.

llama.cpp does not renormalise this family's expert weights; granitemoe is the home for GGUF.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import LLAMA_LAYER, Family, Fill

_LAYER = "model.layers.{layer}"
_EXPERT = f"{_LAYER}.mlp.experts.{{expert}}"
_SHARED_WIDTH = 256
"""Wide enough for quantised blocks; its down projection is zero, so the width changes nothing."""
_SHARED_GATE = 2.0**-10
"""Not zero: llama.cpp computes this gate as silu(x)/x."""


def _shared_width(dense: Config) -> int:
    return min(_SHARED_WIDTH, int(dense["intermediate_size"]))


def refuse(dense: Config) -> str:
    """Other engines compute this family with SiLU only."""
    if dense["hidden_act"] != "silu":
        return f"other engines compute Qwen2-MoE with SiLU, this model has {dense['hidden_act']}"
    return ""


def config(dense: Config, n_experts: int, per_token: int) -> Config:
    """Write Qwen2-MoE's keys.

    Which layers slide is written out: the MoE family has another rule for it than the dense one,
    for which layers from `max_window_layers` on slide.
    """
    depth = dense["num_hidden_layers"]
    kinds = dense.get("layer_types") or [
        "sliding_attention" if layer >= dense["max_window_layers"] else "full_attention"
        for layer in range(depth)
    ]
    return {
        "num_experts": n_experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": dense["intermediate_size"],
        "shared_expert_intermediate_size": _shared_width(dense),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
        "output_router_logits": False,
        "layer_types": kinds if dense["use_sliding_window"] else ["full_attention"] * depth,
        "attention_bias": None,
        "mlp_bias": None,
    }


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    accepts={"qwen2": 0},
    router=f"{_LAYER}.mlp.gate.weight",
    experts={
        f"{_EXPERT}.gate_proj.weight": ("gate_proj.weight",),
        f"{_EXPERT}.up_proj.weight": ("up_proj.weight",),
        f"{_EXPERT}.down_proj.weight": ("down_proj.weight",),
    },
    config=config,
    refuse=refuse,
    layer=(*LLAMA_LAYER, *(f"self_attn.{part}_proj.bias" for part in "qkv")),
    fills={
        f"{_LAYER}.mlp.shared_expert.gate_proj.weight": Fill(
            lambda dense: (_shared_width(dense), dense["hidden_size"])
        ),
        f"{_LAYER}.mlp.shared_expert.up_proj.weight": Fill(
            lambda dense: (_shared_width(dense), dense["hidden_size"])
        ),
        f"{_LAYER}.mlp.shared_expert.down_proj.weight": Fill(
            lambda dense: (dense["hidden_size"], _shared_width(dense))
        ),
        f"{_LAYER}.mlp.shared_expert_gate.weight": Fill(
            lambda dense: (1, dense["hidden_size"]), _SHARED_GATE
        ),
    },
)
