"""Every family for every dense type it accepts: identical experts are the dense model."""

import json

import pytest
import torch
from tiny import LAYERS, WIDE
from transformers import AutoModelForCausalLM
from zoo import ENDS, ZOO

import moeforge
from moeforge import catalog, families
from moeforge.families import Mixture
from moeforge.planners.homes import objection
from moeforge.proof.heldout import load_output

THETA = {"rope_theta": 5e4}
PLAIN = {"rope_type": "default", **THETA}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA}
LONG = {
    "rope_type": "longrope",
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    **THETA,
}
FIRST = {"original_max_position_embeddings": 32}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
WHOLE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    **THETA,
}
QUERIES_SCALED = {
    **YARN,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}

VARIANTS = {
    "phi3": [
        {},
        {"tie_word_embeddings": True},
        {"sliding_window": 8},
        {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.75}},
        {"original_max_position_embeddings": 32, "rope_parameters": LONG},
        {"original_max_position_embeddings": 128, "rope_parameters": LONG},
        {"original_max_position_embeddings": 32, "rope_parameters": WHOLE},
        {"original_max_position_embeddings": 128, "rope_parameters": WHOLE},
    ],
    "helium": [{}, {"tie_word_embeddings": True}, {"attention_bias": True}],
    "internlm3": [{}, {"attention_bias": True, "mlp_bias": True}],
    "iquestcoder": [{"tie_word_embeddings": True}, {"head_dim": 32}],
    "ministral3": [
        {"rope_parameters": QUERIES_SCALED},
        {
            "rope_parameters": QUERIES_SCALED,
            "sliding_window": 8,
            "tie_word_embeddings": True,
            "head_dim": 32,
        },
    ],
    "arcee": [{}, {"tie_word_embeddings": True}, {"mlp_bias": True}, {"hidden_act": "silu"}],
    "gemma": [
        {},
        {"tie_word_embeddings": False},
        {"head_dim": 32, "hidden_act": "gelu"},
        {"use_bidirectional_attention": True},
        {"attention_bias": True},
    ],
    "hyperclovax": [
        {"use_post_norm": False},
        {
            "use_post_norm": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            **MULTIPLIERS,
        },
        {},
    ],
    "seed_oss": [
        {},
        {"attention_bias": False, "attention_out_bias": True},
        {"attention_bias": False, "head_dim": 32, "tie_word_embeddings": True},
    ],
    "granitemoehybrid": [
        {},
        {
            "layer_types": ["attention"] * 4,
            "position_embedding_type": "rope",
            "attention_bias": True,
            **MULTIPLIERS,
        },
        {"mamba_proj_bias": True, "shared_intermediate_size": 80, "tie_word_embeddings": True},
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ],
    "granite_swa": [
        {"attention_multiplier": 0.25},
        {"layer_rope_theta": [0, 1e4, 1e5, 1e4], "attention_bias": True, **MULTIPLIERS},
        {"tie_word_embeddings": False, "attention_multiplier": 0.25, "mlp_bias": True},
    ],
    "smollm3": [
        {},
        {"no_rope_layers": [0, 1, 1, 0], "attention_bias": True, "tie_word_embeddings": False},
        {"use_sliding_window": True, "sliding_window": 8},
    ],
    "llama": [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
        {"attention_bias": True},
        {"sliding_window": 8},
    ],
    "mistral": [{}, {"sliding_window": 8}, {"sliding_window": None}, {"head_dim": 32}],
    "qwen2": [
        {"use_sliding_window": False},
        {"use_sliding_window": False, "tie_word_embeddings": True},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ],
    "qwen3": [
        {"use_sliding_window": False},
        {"use_sliding_window": False, "tie_word_embeddings": True},
        {"use_sliding_window": False, "attention_bias": True},
        {},
        {"use_sliding_window": False, "rope_parameters": YARN},
    ],
    "granite": [
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
        {"attention_bias": True, "attention_multiplier": 0.25},
    ],
    "ministral": [
        {},
        {"layer_types": ENDS},
        {"layer_types": ["full_attention"] * 4, "tie_word_embeddings": True},
        {"layer_types": ENDS, "head_dim": 32},
    ],
    "cwm": [{}, {"layer_types": ENDS, "tie_word_embeddings": True, "rope_parameters": PLAIN}],
    "glm": [
        {},
        {"attention_bias": False, "tie_word_embeddings": True},
        {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25}, "head_dim": 32},
    ],
    "youtu": [
        {},
        {"q_lora_rank": None, "tie_word_embeddings": False},
        {"attention_bias": True, "rope_interleave": False},
        {"rope_parameters": {**YARN, "mscale_all_dim": 0.7}},
    ],
    "minicpm3": [
        {},
        {"tie_word_embeddings": False, "attention_bias": True, "scale_emb": 3},
        {"q_lora_rank": None, "scale_depth": None, "dim_model_base": None, "v_head_dim": 8},
        {"rope_parameters": {"rope_type": "longrope", **FACTORS, **THETA}},
        {"mlp_bias": True},
        {"rope_parameters": {"rope_type": "longrope", **FIRST, **FACTORS, **THETA}},
    ],
    "ernie4_5": [{}, {"tie_word_embeddings": False, "head_dim": 32}, {"use_bias": True}],
    "hunyuan_v1_dense": [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 32},
        {"rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, **THETA}},
    ],
    "qwen3_5_text": [
        {},
        {"tie_word_embeddings": True, "attention_bias": True},
        {"layer_types": None, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
    ],
    "olmo2": [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
    ],
    "olmo": [
        {"clip_qkv": 0.5},
        {"clip_qkv": None, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
        {"attention_bias": True},
    ],
    "cohere": [
        {},
        {"tie_word_embeddings": False, "logit_scale": 0.5},
        {"attention_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}},
        {"use_qk_norm": True},
    ],
    "cohere2": [
        {},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        {"tie_word_embeddings": False, "attention_bias": True},
    ],
    "lfm2": [
        {},
        {"block_auto_adjust_ff_dim": False, "tie_word_embeddings": False},
        {"conv_bias": True, "block_ffn_dim_multiplier": 1.3},
    ],
    "gemma4_text": [
        {},
        {"hidden_size_per_layer_input": 0, "tie_word_embeddings": False, "attention_bias": True},
        {"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
        {"attention_k_eq_v": True, "global_head_dim": 32, "num_global_key_value_heads": 1},
        {"final_logit_softcapping": 5.0, "rms_norm_eps": 1e-3},
    ],
}

NOT_GRANITE = [
    ("internlm3", 1),
    ("qwen2", 2),
    *(("mistral", i) for i in (0, 1, 3)),
    ("gemma", 3),
    ("hyperclovax", 2),
]
REFUSED = {
    ("mixtral", "llama", 4),
    ("mixtral", "helium", 2),
    ("mixtral", "internlm3", 1),
    ("mixtral", "arcee", 2),
    ("mixtral", "arcee", 3),
    ("mixtral", "granite", 1),
    ("mixtral", "ernie4_5", 2),
    ("mixtral", "gemma", 3),
    ("mixtral", "gemma", 4),
    *((name, *case) for name in ("granitemoe", "granitemoeshared") for case in NOT_GRANITE),
    ("granitemoehybrid", "granitemoehybrid", 3),
    ("granitemoe_swa", "granite_swa", 2),
    ("dbrx", "olmo", 3),
    ("mixtral", "ministral", 1),
    ("mixtral", "ministral", 3),
    ("mixtral", "phi3", 3),
    ("mixtral", "phi3", 4),
    ("mixtral", "phi3", 5),
    ("qwen2_moe", "llama", 4),
    ("qwen3_moe", "qwen3", 3),
    ("glm4_moe", "llama", 4),
    ("glm4_moe", "phi3", 2),
    ("glm4_moe", "mistral", 0),
    ("glm4_moe", "mistral", 1),
    ("glm4_moe", "mistral", 3),
    ("glm4_moe", "qwen2", 2),
    ("deepseek_v3", "minicpm3", 4),
    ("ernie4_5_moe", "ernie4_5", 2),
    ("cohere2_moe", "cohere", 4),
}
"""Family, dense type and variant that have no exact home there; another family takes them."""

GATES = {"lfm2_moe": "uniform_random"}
"""It adds 1e-6 to a sum of sigmoids: large negative logits are not exact, as its note says."""


def cases():
    return list(every_case())


def every_case():
    for name in catalog.names("families"):
        family = families.load(name)
        for dense in sorted(family.accepts):
            assert dense in VARIANTS, f"add variants of {dense} to this test"
            for number, _ in enumerate(VARIANTS[dense]):
                yield pytest.param(name, dense, number, id=f"{dense}-{number}-to-{name}")


def logits(model, ids):
    with torch.no_grad():
        return model.float().eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(("name", "dense", "number"), cases())
def test_identical_experts_are_the_dense_model(name, dense, number, models, tmp_path):
    family, variant = families.load(name), VARIANTS[dense][number]
    folder = models(dense, seed=3, with_tokenizer=False, **{**ZOO[dense], **variant})
    config = json.loads((folder / "config.json").read_text())
    reason = objection(family, config, Mixture(3, 2, WIDE, (True,) * LAYERS))
    recipe = {
        "base_model": str(folder),
        "experts": [{"source_model": str(folder)} for _ in range(3)],
        "gate_mode": GATES.get(name, "random"),
        "architecture": name,
    }
    assert bool(reason) is ((name, dense, number) in REFUSED)
    if reason:
        report = moeforge.check(recipe)
        assert report.exit_code == 4
        assert reason in report.errors[0].fix
        return
    moeforge.build(recipe, tmp_path / "moe")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (2, 48), generator=generator)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder), ids)
    mixture = load_output(tmp_path / "moe")
    assert type(mixture).__name__ == family.architecture
    assert (logits(mixture, ids) - expected).abs().max() < 1e-4
    assert expected.std() > 0.1, "the comparison means something"
    cached = mixture.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = mixture.generate(
        ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(cached, plain)
