"""Owns DeepSeek's mixture block, which several families share: sigmoid scores, shared experts.

Without shared experts their tensors are still there, of size zero: transformers expects them.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.families import Fill, Mixture, Shape, Shared, each

_MLP = "model.layers.{layer}.mlp"
_SHARED = f"{_MLP}.shared_experts"

ROUTER = f"{_MLP}.gate.weight"
BIAS = f"{_MLP}.gate.e_score_correction_bias"
EXPERTS = each(f"{_MLP}.experts.{{expert}}")
DENSE_MLP = each(_MLP)
SHARED = Shared(each(_SHARED), step=lambda config, mixture: mixture.width)


def _unless_shared(shape: Shape) -> Shape:
    return lambda config, mixture: () if mixture.shared else shape(config, mixture)


_EMPTY_ROWS = Fill(_unless_shared(lambda config, mixture: (0, config["hidden_size"])))
_EMPTY_COLUMNS = Fill(_unless_shared(lambda config, mixture: (config["hidden_size"], 0)))
FILLS = {
    # Float32 in every dtype of the model: it decides close calls between experts.
    BIAS: Fill(lambda config, mixture: (mixture.experts,), dtype="float32"),
    f"{_SHARED}.gate_proj.weight": _EMPTY_ROWS,
    f"{_SHARED}.up_proj.weight": _EMPTY_ROWS,
    f"{_SHARED}.down_proj.weight": _EMPTY_COLUMNS,
}


def too_few(mixture: Mixture) -> str:
    """Return why the router cannot have this number of experts, or ""."""
    if mixture.experts < 2:
        return f"its router compares the two best experts, this mixture has {mixture.experts}"
    return ""


def block(mixture: Mixture) -> Config:
    """Return the keys of the mixture block; one group of experts, weights that add up to one."""
    return {
        "n_routed_experts": mixture.experts,
        "num_experts_per_tok": mixture.per_token,
        "moe_intermediate_size": mixture.width,
        "n_shared_experts": mixture.shared // mixture.width,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "output_router_logits": False,
    }
