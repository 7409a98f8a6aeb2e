"""What a dense config.json leaves unsaid: the defaults here are those of transformers' classes."""

import json

import pytest
import torch
from tiny import LAYERS, WIDE, edit_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from zoo import ZOO

import moeforge
from moeforge import families
from moeforge.configs import rope
from moeforge.dense import DEFAULTS, complete
from moeforge.families import Mixture
from moeforge.planners.homes import objection
from moeforge.proof.heldout import load_output

IDS = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
EVERY_LAYER = Mixture(3, 2, WIDE, (True,) * LAYERS)
USABLE = {
    "hyperclovax": {"use_post_norm": False},
    "phi3": {"original_max_position_embeddings": 4096},
}
"""What has to be said for a model that some family holds."""


def defaults(kind):
    """What a config of this type says that was given nothing but sizes."""
    values = CONFIG_MAPPING[kind]().to_dict()
    return {**values, **(values.get("rope_parameters") or {})}


@pytest.mark.parametrize("kind", sorted(DEFAULTS))
def test_defaults_are_those_of_transformers(kind):
    theirs = defaults(kind)
    for key, value in DEFAULTS[kind].items():
        if key == "rope_parameters":
            assert value.items() <= theirs[key].items()
            continue
        if value is None or (kind.startswith("qwen") and key == "sliding_window"):
            continue  # The class puts what follows from other keys in its place.
        assert theirs[key] == value, key
    sizes = {key: theirs[key] for key in ("hidden_size", "num_attention_heads")}
    full = complete({"model_type": kind, "num_hidden_layers": 2, **sizes})
    latent = "qk_rope_head_dim" in theirs  # head_dim has another meaning there
    for key in ("num_key_value_heads", "head_dim", "hidden_act", "attention_bias", "mlp_bias"):
        if theirs.get(key) is not None and not (latent and key == "head_dim"):
            assert full[key] == theirs[key], key
    if "rope_theta" in theirs:
        assert (rope(full) or {})["rope_theta"] == theirs["rope_theta"]


def bare(folder, kind):
    """Take out of config.json what is default, and spell the rest as transformers 4 did."""
    config = json.loads((folder / "config.json").read_text())
    theirs = CONFIG_MAPPING[kind]().to_dict()
    unsaid = [
        key
        for key, value in config.items()
        if key in theirs and theirs[key] == value and key not in ("model_type", "vocab_size")
    ]
    changes = dict.fromkeys(unsaid)
    rotary = config.get("rope_parameters")
    if rotary and not any(isinstance(value, dict) for value in rotary.values()):
        scaled = {k: v for k, v in rotary.items() if k != "rope_theta"}
        changes["rope_parameters"] = None
        if rotary["rope_type"] != "default":
            changes |= {"rope_scaling": scaled, "rope_theta": rotary["rope_theta"]}
        elif rotary["rope_theta"] != theirs["rope_parameters"]["rope_theta"]:
            changes["rope_theta"] = rotary["rope_theta"]
        if "partial_rotary_factor" in scaled:
            changes["partial_rotary_factor"] = scaled["partial_rotary_factor"]
    edit_config(folder, **changes)


def logits(model):
    with torch.no_grad():
        return model.float().eval()(input_ids=IDS, use_cache=False).logits


def worst_of_homes(folder, kind, expected, out):
    """Build this model with identical experts in every home that holds it; largest difference."""
    config = json.loads((folder / "config.json").read_text())
    homes = [f for f in families.candidates(kind) if not objection(f, config, EVERY_LAYER)]
    assert homes, [objection(f, config, EVERY_LAYER) for f in families.candidates(kind)]
    found = {}
    for family in homes:
        recipe = {
            "base_model": str(folder),
            "experts": [{"source_model": str(folder)}] * 3,
            "gate_mode": "uniform_random",
            "architecture": family.model_type,
        }
        moeforge.build(recipe, out / family.model_type)
        made = logits(load_output(out / family.model_type))
        found[family.model_type] = (made - expected).abs().max().item()
    return max(found.values()), found


@pytest.mark.parametrize("kind", sorted(DEFAULTS))
def test_a_config_that_leaves_out_its_defaults_is_the_same_model(kind, models, tmp_path):
    shape = {**ZOO[kind], **USABLE.get(kind, {})}
    made = models(kind, seed=3, with_tokenizer=False, **shape)
    folder = models.copy(made, f"bare-{kind}")
    bare(folder, kind)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(made))).abs().max() < 1e-5
    worst, found = worst_of_homes(folder, kind, expected, tmp_path)
    assert worst < 1e-4, found


@pytest.mark.parametrize("kind", ["cwm", "ministral3"])
def test_a_config_without_rotary_parameters_has_those_of_its_type(kind, models, tmp_path):
    made = models(kind, seed=3, with_tokenizer=False, **ZOO[kind])
    folder = models.copy(made, f"unsaid-{kind}")
    edit_config(folder, rope_parameters=None)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder))
    worst, found = worst_of_homes(folder, kind, expected, tmp_path)
    assert worst < 1e-4, found
