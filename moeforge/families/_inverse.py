"""Owns which dense type an expert of a family makes, and the family's words read backwards.

Where a mixture's tensors differ from the dense type's in more than names, what undoes it is here.
Data and small functions; which expert is meant is for planners.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moeforge.configs import Config
from moeforge.dense import NORM
from moeforge.families import Tensors
from moeforge.families._rope import rotated
from moeforge.families._transforms import interleaved, renamed, split
from moeforge.plans import Concat, PlannedTensor, pieces
from moeforge.tensors import TensorSpec

Reason = Callable[[Config], str]


def _nothing(config: Config) -> str:
    return ""


@dataclass(frozen=True)
class Dense:
    """A dense type that holds an expert of a family with everything around it.

    Attributes:
        model_type: its name in config.json.
        architecture: class in transformers.
        config: (mixture's config) -> what to write over it; keys of mixtures are gone already.
        tensors: (mixture's config, tensors in the family's words) -> as the dense type stores them.
        refuse: (mixture's config) -> why this type does not hold it, or "".
        width: key of the config that says how wide its MLP is.
        ones: templates of tensors that the dense type has not, and that are ones everywhere where
            it holds the mixture.
    """

    model_type: str
    architecture: str
    config: Callable[[Config], Config] = lambda config: {}
    tensors: Callable[[Config, Tensors], Tensors] = lambda config, tensors: tensors
    refuse: Reason = _nothing
    width: str = "intermediate_size"
    ones: tuple[str, ...] = ()


def _has(key: str, words: str) -> Reason:
    return lambda config: f"it has no {words} ({key} is {config[key]})" if config.get(key) else ""


def _joined(name: str, tensors: Sequence[PlannedTensor]) -> PlannedTensor:
    parts = tuple(piece for tensor in tensors for piece in pieces(tensor))
    height = sum(tensor.spec.shape[0] for tensor in tensors)
    spec = TensorSpec(tensors[0].spec.dtype, (height, *tensors[0].spec.shape[1:]))
    return PlannedTensor(name, spec, Concat(parts))


def _fused_mlp(own: Tensors, old: str, fused: str, down: str) -> dict[str, PlannedTensor]:
    """Put gate and up projections into one matrix, below `fused`, as phi3, glm and granite do."""
    result: dict[str, PlannedTensor] = {}
    for name, tensor in own.items():
        stem, found, part = name.partition(old)
        if part == "gate_proj.weight":
            halves = [tensor, own[f"{stem}{found}up_proj.weight"]]
            result[stem + fused] = _joined(stem + fused, halves)
        elif part == "down_proj.weight":
            result[stem + down] = renamed(tensor, stem + down)
        elif part != "up_proj.weight":
            result[name] = tensor
    return result


# --- llama, mistral, qwen2, qwen3  ---


def _llama(config: Config) -> Config:
    return {"attention_bias": False, "mlp_bias": False, "sliding_window": None}


def _slides(config: Config) -> Config:
    """Write out which layers slide."""
    window = config.get("sliding_window")
    used = bool(window) and config.get("use_sliding_window") is not False
    kinds = config.get("layer_types") or []
    used = used and set(kinds) != {"full_attention"}
    return {
        "use_sliding_window": used,
        "sliding_window": window if used else None,
        "layer_types": list(kinds) if used else None,
    }


def _qwen3_of_one_kind(config: Config) -> Config:
    return {"use_sliding_window": False, "sliding_window": None, "layer_types": None}


def _no_windows(config: Config) -> str:
    if config.get("use_sliding_window"):
        return f"it slides in all layers or in none (sliding_window is {config['sliding_window']})"
    return ""


def _mellum(config: Config) -> Config:
    parameters = dict(next(iter(config["rope_parameters"].values())))
    return {**_slides(config), "rope_parameters": parameters}


def _two_rotations(config: Config) -> str:
    kinds = set(config.get("layer_types") or ())
    found = [config["rope_parameters"][kind] for kind in sorted(kinds)]
    if any(parameters != found[0] for parameters in found):
        return "it rotates all its layers alike, and this model does not (rope_parameters)"
    return ""


def _unbiased(config: Config) -> str:
    if config.get("qkv_bias") is False:
        return "its queries, keys and values have biases, this model's have not (qkv_bias is false)"
    return ""


# --- glm


def _plain_glm(*, biased: bool) -> Reason:
    def refuse(config: Config) -> str:
        if rotated(config) != config["head_dim"]:
            return "it rotates whole heads (partial_rotary_factor)"
        if bool(config["attention_bias"]) is not biased:
            return f"its attention has {'' if biased else 'no '}biases (attention_bias)"
        return ""

    return refuse


def _whole_heads(config: Config) -> Config:
    parameters = dict(config.get("rope_parameters") or {})
    parameters.pop("partial_rotary_factor", None)
    return {"partial_rotary_factor": None, "rope_parameters": parameters}


def _glm(config: Config, own: Tensors) -> Tensors:
    """Rotate neighbouring dimensions, of the beginning of each head, and fuse the MLP."""
    size, turned = config["head_dim"], rotated(config)
    result = _fused_mlp(own, ".mlp.", ".mlp.gate_up_proj.weight", ".mlp.down_proj.weight")
    for name, tensor in result.items():
        if ".self_attn.q_proj." in name or ".self_attn.k_proj." in name:
            result[name] = interleaved(tensor, size, turned, leading=True)
    return result


# --- olmo, of DBRX

_NO_CLIP = 65504.0
"""What stands for none in DBRX, see `dbrx`."""


def _olmo(config: Config) -> Config:
    attention, mlp = config["attn_config"], config["ffn_config"]
    clip = attention.get("clip_qkv")
    return {
        **dict.fromkeys(("d_model", "n_heads", "n_layers", "max_seq_len", "attn_config")),
        **dict.fromkeys(("ffn_config", "emb_pdrop", "resid_pdrop")),
        "hidden_size": config["d_model"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": attention["kv_n_heads"],
        "num_hidden_layers": config["n_layers"],
        "max_position_embeddings": config["max_seq_len"],
        "hidden_act": (mlp.get("ffn_act_fn") or {}).get("name", "silu"),
        "clip_qkv": None if clip in (None, _NO_CLIP) else clip,
        "attention_bias": False,
    }


def _unfused_attention(config: Config, own: Tensors) -> Tensors:
    size = config["d_model"] // config["n_heads"]
    groups = config["attn_config"]["kv_n_heads"]
    result: dict[str, PlannedTensor] = {}
    for name, tensor in own.items():
        stem, found, _ = name.partition("Wqkv.weight")
        if found:
            names = [f"{stem}{part}_proj.weight" for part in "qkv"]
            counts = [size * count for count in (config["n_heads"], groups, groups)]
            result.update((made.name, made) for made in split(tensor, names, counts))
        elif name != NORM:
            result[name] = tensor
    return result


# --- granite, lfm2


def _hybrid(config: Config) -> Config:
    return {"num_local_experts": 0, "num_experts_per_tok": 0}


def _shared_mlp(config: Config, own: Tensors) -> Tensors:
    stem = ".shared_mlp"
    return _fused_mlp(own, ".mlp.", f"{stem}.input_linear.weight", f"{stem}.output_linear.weight")


_LFM2 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _feed_forward(config: Config, own: Tensors) -> Tensors:
    result = {}
    for name, tensor in own.items():
        stem, found, part = name.partition(".mlp.")
        if found:
            kind, _, rest = part.partition(".")
            name = f"{stem}.feed_forward.{_LFM2[kind]}.{rest}"
        result[name] = renamed(tensor, name)
    return result


def _lfm2(config: Config) -> Config:
    return {"block_auto_adjust_ff_dim": False, "block_ff_dim": None}


# --- all

_QWEN3 = ("qwen3", "Qwen3ForCausalLM")
_GRANITE = Dense("granite", "GraniteForCausalLM", lambda config: {"mlp_bias": False})
_BLOCK = "transformer.blocks.{layer}.norm_attn_norm"

DENSE: Mapping[str, tuple[Dense, ...]] = {
    "mixtral": (
        Dense(
            "llama",
            "LlamaForCausalLM",
            _llama,
            refuse=_has("sliding_window", "sliding attention"),
        ),
        Dense(
            "mistral",
            "MistralForCausalLM",
            lambda config: {"sliding_window": config.get("sliding_window")},
        ),
    ),
    "qwen2_moe": (Dense("qwen2", "Qwen2ForCausalLM", _slides, refuse=_unbiased),),
    "qwen3_moe": (Dense(*_QWEN3, _qwen3_of_one_kind, refuse=_no_windows),),
    "qwen3_5_moe_text": (Dense("qwen3_5_text", "Qwen3_5ForCausalLM"),),
    "mellum": (Dense(*_QWEN3, _mellum, refuse=_two_rotations),),
    "dots1": (Dense(*_QWEN3, _slides),),
    "glm4_moe": (
        Dense("llama", "LlamaForCausalLM", _whole_heads, refuse=_plain_glm(biased=False)),
        Dense("qwen2", "Qwen2ForCausalLM", _whole_heads, refuse=_plain_glm(biased=True)),
        Dense("glm", "GlmForCausalLM", tensors=_glm),
    ),
    "deepseek_v3": (Dense("youtu", "YoutuForCausalLM"),),
    "ernie4_5_moe": (Dense("ernie4_5", "Ernie4_5ForCausalLM"),),
    "flex_olmo": (Dense("olmo2", "Olmo2ForCausalLM"),),
    "cohere2_moe": (Dense("cohere2", "Cohere2ForCausalLM"),),
    "hunyuan_v1_moe": (Dense("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM"),),
    "granitemoe": (_GRANITE,),
    "granitemoeshared": (_GRANITE,),
    "granitemoe_swa": (Dense("granite_swa", "GraniteSWAForCausalLM"),),
    "granitemoehybrid": (
        Dense(
            "granitemoehybrid",
            "GraniteMoeHybridForCausalLM",
            _hybrid,
            _shared_mlp,
            width="shared_intermediate_size",
        ),
    ),
    "lfm2_moe": (Dense("lfm2", "Lfm2ForCausalLM", _lfm2, _feed_forward),),
    "dbrx": (
        Dense(
            "olmo",
            "OlmoForCausalLM",
            _olmo,
            _unfused_attention,
            ones=(*(f"{_BLOCK}.norm_{n}.weight" for n in (1, 2)), "transformer.norm_f.weight"),
        ),
    ),
}
"""For each family the dense types that hold its experts, the first that takes a model first."""

NONE = {
    "gemma4_text": "its experts lie beside an MLP of the layer, each with norms of its own, and no "
    "dense layer adds up two normalised branches",
}
"""Families whose experts make no dense model, and why."""

_WORDS = (
    "auto_map aux_loss_alpha capacity_factor decoder_sparse_step ep_size "
    "expert_selection_fn first_k_dense_replace mlp_layer_types mlp_only_layers "
    "moe_capacity moe_gate moe_intermediate_size moe_k moe_layer_end_index moe_layer_freq "
    "moe_layer_interval moe_layer_start_index moe_norm_min moe_num_experts "
    "moe_num_shared_experts moe_topk moe_use_aux_free mtp_layer_types mtp_mlp_layer_types "
    "n_group n_routed_experts n_shared_experts norm_topk_prob num_dense_layers "
    "num_experts num_experts_per_tok num_local_experts num_nextn_predict_layers "
    "num_shared_expert num_shared_experts output_router_logits "
    "prefix_dense_intermediate_size prefix_dense_sliding_window_pattern qkv_bias "
    "routed_scaling_factor router_aux_loss_coef router_jitter_noise scoring_func seq_aux "
    "shared_expert_combination_strategy shared_expert_intermediate_size "
    "shared_intermediate_size topk_group topk_method use_expert_bias use_qk_norm"
)
MIXTURES_ONLY = frozenset(_WORDS.split())
"""Keys of configs that speak of experts, or of what only mixtures say."""
