"""Stacks: every output layer is the layer it came from, and the config follows the layers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moeforge
from moeforge.configs import portable
from moeforge.planners.layer_keys import Origin, restack
from moeforge.proof.heldout import load_output

SLICES = [(0, 0, 3), (1, 1, 4), (0, 2, 3)]
"""Model, first layer, end."""
ORIGIN = [(model, layer) for model, start, end in SLICES for layer in range(start, end)]


def stack(folders, **more):
    slices = [
        {"sources": [{"model": str(folders[model]), "layer_range": [start, end]}]}
        for model, start, end in SLICES
    ]
    return {"slices": slices, **more}


CASES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True},
    "granite": {},
    "gemma2": {"sliding_window": 8, "head_dim": 16},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2, "head_dim": 16},
    "mixtral": {"num_local_experts": 2},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [0, 2],
    },
}


@pytest.mark.parametrize("model_type", CASES)
def test_layers_are_where_they_belong(model_type, models, tmp_path):
    folders = [
        models(model_type, seed=seed, with_tokenizer=False, **CASES[model_type]) for seed in (1, 2)
    ]
    moeforge.build(stack(folders), tmp_path / "out")
    sources = [load_file(folder / "model.safetensors") for folder in folders]
    result = load_file(tmp_path / "out" / "model.safetensors")
    for new, (model, old) in enumerate(ORIGIN):
        theirs = {
            name.replace(f"layers.{old}.", f"layers.{new}."): tensor
            for name, tensor in sources[model].items()
            if f"layers.{old}." in name
        }
        assert theirs, "the source has such a layer"
        assert theirs.keys() == {name for name in result if f"layers.{new}." in name}
        assert all(torch.equal(result[name], tensor) for name, tensor in theirs.items())
    # Embeddings from the first slice's model, norm and head from the last slice's: both model 0.
    outside = {name for name in sources[0] if ".layers." not in name}
    assert outside == {name for name in result if ".layers." not in name}
    assert all(torch.equal(result[name], sources[0][name]) for name in outside)
    dense = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    made = load_output(tmp_path / "out")
    assert made.config.num_hidden_layers == len(ORIGIN)
    if getattr(dense[0].config, "layer_types", None):
        expected = [dense[model].config.layer_types[old] for model, old in ORIGIN]
        assert made.config.layer_types == expected
    ids = torch.arange(40)[None] % 256
    assert bool(made(input_ids=ids).logits.isfinite().all())
    cached = made.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = made.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(cached, plain)


def test_a_stack_of_all_layers_is_the_model(models, tmp_path):
    folder = models("qwen3", seed=1)
    whole = {"slices": [{"sources": [{"model": str(folder), "layer_range": [0, 4]}]}]}
    moeforge.build(whole, tmp_path / "out")
    ids = torch.arange(40)[None] % 256
    expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    assert torch.equal(load_output(tmp_path / "out")(input_ids=ids).logits, expected)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes()


def test_scale_with_filters(llamas, tmp_path):
    recipe = stack(llamas, parameters={"scale": [{"filter": "down_proj", "value": 0.5}]})
    moeforge.build(recipe, tmp_path / "out")
    source = load_file(llamas[1] / "model.safetensors")
    result = load_file(tmp_path / "out" / "model.safetensors")
    name = "mlp.down_proj.weight"
    assert torch.equal(result[f"model.layers.3.{name}"], 0.5 * source[f"model.layers.1.{name}"])
    name = "mlp.up_proj.weight"
    assert torch.equal(result[f"model.layers.3.{name}"], source[f"model.layers.1.{name}"])


def test_a_slice_may_merge_different_layers(llamas, tmp_path):
    sources = [
        {"model": str(llamas[0]), "layer_range": [0, 2], "parameters": {"weight": 1}},
        {"model": str(llamas[1]), "layer_range": [2, 4], "parameters": {"weight": 3}},
    ]
    recipe = {"merge_method": "linear", "slices": [{"sources": sources}]}
    moeforge.build(recipe, tmp_path / "out")
    one, two = (load_file(folder / "model.safetensors") for folder in llamas[:2])
    result = load_file(tmp_path / "out" / "model.safetensors")
    for new in (0, 1):
        name = f"model.layers.{new}.mlp.up_proj.weight"
        other = f"model.layers.{new + 2}.mlp.up_proj.weight"
        assert torch.allclose(result[name], (one[name] + 3 * two[other]) / 4, atol=1e-6)


def test_everything_unused_is_listed(llamas):
    plan = moeforge.plan(stack(llamas))
    unused = {read for read in plan.left_out if "layers.0." in read.name}
    assert unused
    assert all(read.source == str(llamas[1]) for read in unused), "layer 0 of the second model"


def test_lists_and_layer_numbers_follow_the_layers():
    config = {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "c"],
        "mlp_only_layers": [1],
        "eos_token_id": [7, 8, 9],
    }
    result = restack(config, [Origin("A", config, layer) for layer in (2, 1, 1, 0)])
    assert result["num_hidden_layers"] == 4
    assert result["layer_types"] == ["c", "b", "b", "a"]
    assert result["mlp_only_layers"] == [1, 2]
    assert result["eos_token_id"] == [7, 8, 9]
    assert config["layer_types"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "source",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ],
)
def test_configs_are_written_in_both_spellings(source):
    config = portable({**source, "_name_or_path": "/home/me/secret"}, "bfloat16")
    assert config["rope_theta"] == 5e5
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 2.0}
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert "_name_or_path" not in config


def test_tied_and_untied_heads_mix(models, tmp_path):
    tied = models("llama", seed=1, tie_word_embeddings=True)
    own = models("llama", seed=2)
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(tied)}, {"model": str(own)}],
        "parameters": {"weight": 1},
    }
    moeforge.build(recipe, tmp_path / "out")
    one, two = load_file(tied / "model.safetensors"), load_file(own / "model.safetensors")
    result = load_file(tmp_path / "out" / "model.safetensors")
    mean = (one["model.embed_tokens.weight"] + two["lm_head.weight"]) / 2
    assert torch.allclose(result["lm_head.weight"], mean, atol=1e-6)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    load_output(tmp_path / "out")
    recipe["models"] = [{"model": str(tied)}]
    moeforge.build(recipe, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert load_output(tmp_path / "tied").config.tie_word_embeddings is True
