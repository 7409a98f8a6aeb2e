"""The shipped recipes: what they promise, with the models that ship."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeforge
from moeforge.gates._tokenize import load_tokenizer
from moeforge.proof.heldout import load_output, loss, windows

RECIPES = Path(__file__).parent.parent / "recipes"
MODELS = RECIPES / "quickstart"
DOMAINS = ("python", "c", "german", "french")


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart as the README builds it: folder, and what it prints for scripts."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "moeforge", "build", str(RECIPES / "quickstart.yml"), "--json"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return folder / "quickstart", json.loads(run.stdout)


@pytest.fixture(scope="module")
def texts():
    tokenizer = load_tokenizer(MODELS / "base")
    return [windows(tokenizer, MODELS / "heldout" / f"{domain}.txt") for domain in DOMAINS]


def mean_loss(folder, texts):
    model = load_output(folder)
    return sum(loss(model, ids) for ids in texts) / len(texts)


def with_gates(mode):
    experts = [
        {
            "source_model": str(MODELS / domain),
            "prompts_file": str(MODELS / "prompts" / f"{domain}.jsonl"),
        }
        for domain in DOMAINS
    ]
    return {"base_model": str(MODELS / "base"), "experts": experts, "gate_mode": mode}


def test_fitted_beats_the_base_and_the_other_gates(quickstart, texts, tmp_path):
    folder, printed = quickstart
    losses = {name: sum(row) / 4 for name, row in printed["held_out"]["losses"].items()}
    fitted = losses["mixture"]
    assert fitted == pytest.approx(mean_loss(folder, texts), abs=1e-4)
    others = {name: value for name, value in losses.items() if name != "mixture"}
    assert len(others) == 6, "the base, four experts, their average"
    for mode in ("hidden", "hidden_avg", "random"):
        moeforge.build(with_gates(mode), tmp_path / mode)
        others[mode] = mean_loss(tmp_path / mode, texts)
    assert all(fitted < value for value in others.values()), others


def test_each_domain_goes_mostly_to_its_expert(quickstart):
    routing = quickstart[1]["held_out"]["routing"]
    for index, domain in enumerate(DOMAINS):
        assert sum(routing[domain]) == pytest.approx(1)
        assert max(routing[domain]) == routing[domain][index] > 0.5


def test_the_folder_loads_and_generates(quickstart):
    folder, _ = quickstart
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def main(", return_tensors="pt")["input_ids"]
    text = model.generate(ids, max_new_tokens=10, do_sample=False)
    assert text.shape[1] > ids.shape[1]
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / file).read_bytes() == (MODELS / "base" / file).read_bytes()


def test_the_card_tells_what_was_built(quickstart):
    from huggingface_hub import ModelCard

    folder, printed = quickstart
    card = ModelCard.load(folder / "README.md")
    assert {"merge", "moe", "moeforge"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert (RECIPES / "quickstart.yml").read_text().strip() in card.text
    assert f"{printed['held_out']['losses']['mixture'][0]:.3f}" in card.text
    assert (folder / "moeforge.yml").read_text() == (RECIPES / "quickstart.yml").read_text()


def test_shipped_models_are_small_and_trained():
    for name in ("base", *DOMAINS):
        assert (MODELS / name / "model.safetensors").stat().st_size <= 2_000_000
