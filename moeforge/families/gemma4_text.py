"""gemma4_text: dense models of this type become mixtures of the same type.

The MoE layer is norm(norm₁(mlp(x)) + norm₂(Σ experts)), the dense one norm(mlp(x)). The MLP beside
the experts becomes zero. Two norms in a row are one where eps is lost against the mean square; so
that it is not lost for small outputs either, the experts' sum is scaled by c = 2⁻¹⁰ and norm₂ by
s = √(eps·(1/c² − 1)): then norm(norm₂(c·y)) = √(1 − c²)·norm(y) with the eps of the dense norm.

The router normalises the residual by itself; its scale is the weight of the norm before the dense
MLP times √hidden, so that it sees what that MLP sees.
"""

from __future__ import annotations

from moeforge.configs import Config
from moeforge.dense import EMBEDDINGS, NORM
from moeforge.families import Accept, Family, Fill, Mixture, Tensors
from moeforge.families._transforms import affine, constant, renamed

_LAYER = "model.layers.{layer}"
_BEFORE = "pre_feedforward_layernorm.weight"
_SCALE = 2.0**-10
_IDLE_WIDTH = 256
"""Of the MLP of zeros beside the experts: wide enough for quantised blocks."""
_MADE = (
    "router.scale",
    "pre_feedforward_layernorm_2.weight",
    "post_feedforward_layernorm_2.weight",
)
_NORMS = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    _BEFORE,
    "post_feedforward_layernorm.weight",
    "layer_scalar",
)
_QUERIES = ("self_attn.q_proj.weight", "self_attn.q_norm.weight", "self_attn.o_proj.weight")
_KEYS = ("self_attn.k_proj.weight", "self_attn.k_norm.weight")
_VALUES = "self_attn.v_proj.weight"
_PER_LAYER = (
    "per_layer_input_gate.weight",
    "per_layer_projection.weight",
    "post_per_layer_input_norm.weight",
)


def refuse(dense: Config) -> str:
    """A mixture is no base."""
    return "this model is a mixture already (enable_moe_block)" if dense["enable_moe_block"] else ""


def words(dense: Config) -> Config:
    """Write out which layers slide, and the rotary parameters of both kinds."""
    depth = dense["num_hidden_layers"]
    kinds = list(
        dense.get("layer_types")
        or [
            "full_attention" if layer % 6 == 0 else "sliding_attention" for layer in range(1, depth)
        ]
    )
    rope = dense.get("rope_parameters") or {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
        },
    }
    return {
        **dense,
        "layer_types": [*kinds[: depth - 1], "full_attention"],  # the last is, whatever it says
        "rope_parameters": rope,
    }


def tensors(dense: Config, own: Tensors) -> Tensors:
    """Add the router's scale and the norms around the experts."""
    result = dict(own)
    for name, tensor in own.items():
        stem, found, _ = name.partition(_BEFORE)
        if not found:
            continue
        scale, before, after = (stem + rest for rest in _MADE)
        result[scale] = renamed(affine(tensor, dense["hidden_size"] ** 0.5), scale)
        result[before] = renamed(tensor, before)
        value = (dense["rms_norm_eps"] * (_SCALE**-2 - 1)) ** 0.5
        result[after] = constant(after, value, tensor.spec, tensor.spec.shape)
    return result


def layer(dense: Config, index: int) -> tuple[str, ...]:
    """Return what a layer has beside its MLP; the last layers may use others' keys and values."""
    sliding = dense["layer_types"][index] == "sliding_attention"
    parts = (*_NORMS, *_MADE, *_QUERIES)
    if index < dense["num_hidden_layers"] - dense["num_kv_shared_layers"]:
        parts += (*_KEYS, *(() if dense["attention_k_eq_v"] and not sliding else (_VALUES,)))
    return (*parts, *(_PER_LAYER if dense["hidden_size_per_layer_input"] else ()))


def config(dense: Config, mixture: Mixture) -> Config:
    """Write what a mixture says; all its layers are of one width."""
    return {
        "enable_moe_block": True,
        "num_experts": mixture.experts,
        "top_k_experts": mixture.per_token,
        "moe_intermediate_size": mixture.width,
        "intermediate_size": _idle(mixture),
        "use_double_wide_mlp": False,
        "hidden_act": None,
        "mlp_bias": None,
        "rope_theta": None,
    }


def _idle(mixture: Mixture) -> int:
    return min(_IDLE_WIDTH, mixture.width)


FAMILY = Family(
    model_type="gemma4_text",
    architecture="Gemma4ForCausalLM",
    accepts={"gemma4_text": Accept(refuse=refuse, config=words, tensors=tensors)},
    router=f"{_LAYER}.router.proj.weight",
    experts={
        f"{_LAYER}.experts.gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
        f"{_LAYER}.experts.down_proj": ("down_proj.weight",),
    },
    config=config,
    layer=layer,
    optional=(
        *(f"self_attn.{part}_proj.bias" for part in "qkvo"),
        *_KEYS,  # of layers that do not use them: some checkpoints have them
        _VALUES,
    ),
    outside_optional=(
        "lm_head.weight",
        "model.embed_tokens_per_layer.weight",
        "model.per_layer_model_projection.weight",
        "model.per_layer_projection_norm.weight",
    ),
    outside=(EMBEDDINGS, NORM),
    sparse_fills={
        f"{_LAYER}.router.per_expert_scale": Fill(
            lambda config, mixture: (mixture.experts,), _SCALE
        ),
        f"{_LAYER}.post_feedforward_layernorm_1.weight": Fill(
            lambda config, mixture: (config["hidden_size"],), 1.0
        ),
        **{
            f"{_LAYER}.mlp.{part}_proj.weight": Fill(
                lambda config, mixture: (_idle(mixture), config["hidden_size"])
            )
            for part in ("gate", "up")
        },
        f"{_LAYER}.mlp.down_proj.weight": Fill(
            lambda config, mixture: (config["hidden_size"], _idle(mixture))
        ),
    },
)
