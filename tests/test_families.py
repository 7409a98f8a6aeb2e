"""Every family for every dense type it accepts: identical experts are the dense model."""

import json

import pytest
import torch
from tiny import LAYERS, WIDE
from zoo import ZOO
from transformers import AutoModelForCausalLM

import moeforge
from moeforge import catalog, families
from moeforge.families import Mixture
from moeforge.planners.homes import objection
from moeforge.proof.heldout import load_output

VARIANTS = {
    "phi3": [{}, {"tie_word_embeddings": True}, {"sliding_window": 8}],
    "helium": [{}, {"tie_word_embeddings": True}],
    "llama": [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
        {"attention_bias": True},
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
}

REFUSED = {("mixtral", "llama", 4), ("granitemoe", "llama", 2), ("granitemoe", "qwen2", 2)}
"""Family, dense type and variant that have no exact home there; another family takes them."""


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
        "gate_mode": "random",
        "architecture": name,
    }
    assert bool(reason) is ((name, dense, number) in REFUSED)
    if reason:
        report = moeforge.check(recipe)
        assert report.exit_code == 4
        assert reason in report.errors[0].what
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
