"""Experts that have no MLPs of their own are warned of before a build, from headers alone."""

import json

import pytest
import torch
from safetensors.torch import save_file

from moeforge import checking
from moeforge.sources import open_source

LLAMA = {"attention": "self_attn.q_proj", "MLP": "mlp.up_proj"}
OPT = {"attention": "self_attn.q_proj", "MLP": "fc1"}


def adapter(folder, module, rows=64, stem="model.layers"):
    folder.mkdir()
    name = f"base_model.model.{stem}.0.{module}.lora_{{}}.weight"
    factors = {name.format("A"): torch.ones(2, 64), name.format("B"): torch.ones(rows, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    target = module.rpartition(".")[2]
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [target]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def warned(base, *experts, **more):
    entries = [e if isinstance(e, dict) else {"source_model": str(e)} for e in experts]
    recipe = {"base_model": str(base), "experts": entries, "gate_mode": "random", **more}
    report = checking.check(recipe)
    assert not report.errors
    return [note for note in report.notes if "has the same MLPs" in note.what]


@pytest.mark.parametrize(("kind", "parts"), [("llama", LLAMA), ("opt", OPT)])
def test_an_adapter_of_attention_alone_leaves_the_expert_the_base(kind, parts, models, tmp_path):
    base = models(kind)
    width = next(s for n, s in shapes(base).items() if parts["MLP"] in n and len(s) == 2)[0]
    stem = "model.layers" if kind == "llama" else "model.decoder.layers"
    lone = f"{base}+{adapter(tmp_path / 'attention', parts['attention'], stem=stem)}"
    whole = f"{base}+{adapter(tmp_path / 'mlp', parts['MLP'], width, stem)}"
    (found,) = warned(base, whole, lone, base)
    assert found.what == f"{lone} has the same MLPs as {base}: as an expert it is the base again"
    assert found.path == ("experts", 1, "source_model")
    assert found.warning
    assert "target_modules" in found.fix
    named = [found.what.split(" has ")[0] for found in warned(base, whole, lone, layers=[1, 2])]
    assert named == [whole, lone], "it changes layer 0 alone, which has no experts here"
    assert not warned(base, whole, {"source_model": lone, "residual_scale": 0.5})


def shapes(folder):
    source = open_source(str(folder))
    return {name: spec.shape for name, spec in source.specs().items()}


def test_one_file_under_two_names_is_one_expert(llamas, tmp_path):
    base, other, third = llamas
    (tmp_path / "again").symlink_to(other)
    (found,) = warned(base, other, third, tmp_path / "again")
    assert found.what.endswith(f"has the same MLPs as {other}: as an expert it is expert 0 again")
    assert "trained" in found.fix
    assert not warned(base, base, base), "copies to be trained are given so"
