"""Dense types layer by layer: MLPs meet what they meet in transformers' own forward pass."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo import ZOO

import moeforge
from moeforge import families
from moeforge.dense import anatomy
from moeforge.families._remote import REFUSED, REMOTE
from moeforge.forward import layer_inputs, load_dense, quiet
from moeforge.planners import Planner
from moeforge.recipe import Reference
from moeforge.sources import open_source
from moeforge.weights import Weights

DENSE = sorted(kind for kind in ZOO if kind in REMOTE or families.candidates(kind))
NOT_LAYERED = {
    "falcon_mamba": "its layers have no MLP",
    "hrm_text": "it has two stacks of layers",
    "mamba": "its layers have no MLP",
    "mamba2": "its layers have no MLP",
    "rwkv": "its feed_forward is not called mlp, and mixes neighbouring tokens",
    "zamba": "some layers have no MLP",
    "zamba2": "some layers have no MLP",
}
PROMPTS = [list(range(3, 30)), [7, 9, 200, 11, 250]]


def weights_of(folder):
    planner = Planner(lambda reference: open_source(reference.model))
    return Weights(planner.model(Reference(model=str(folder)), ()))


def model(models, kind, **changes):
    return models(kind, seed=3, with_tokenizer=False, **{**ZOO[kind], **changes})


def config(folder):
    return json.loads((folder / "config.json").read_text())


def tokens(states, count):
    """Hidden states [..., tokens, hidden] of a prompt: the first stream, the last tokens."""
    return states.reshape(-1, *states.shape[-2:])[0, -count:]


def hooked(dense, place, prompt):
    """Residuals and MLP inputs that hooks on the ordinary model record, layer by layer."""
    residual, mlp, hooks = [], [], []
    for layer in dense.get_submodule(place.layers.rstrip(".")):
        hooks.append(layer.register_forward_pre_hook(lambda _, args: residual.append(args[0])))
        inner = layer.get_submodule(place.mlp)
        hooks.append(inner.register_forward_pre_hook(lambda _, args: mlp.append(args[0])))
    with torch.no_grad():
        dense(input_ids=torch.tensor([prompt]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [[tokens(each, len(prompt)) for each in list_] for list_ in (residual, mlp)]


def compare(folder):
    weights, place = weights_of(folder), anatomy(config(folder))
    seen = list(layer_inputs(config(folder), PROMPTS, weights.read, weights.rows))
    with quiet():
        dense = AutoModelForCausalLM.from_pretrained(folder).eval()
    for number, prompt in enumerate(PROMPTS):
        residual, mlp = hooked(dense, place, prompt)
        assert len(seen) == len(mlp) == len(residual) > 0
        for layer, inputs in enumerate(seen):
            assert (inputs[number].mlp_TH - mlp[layer]).abs().max() < 1e-5, layer
            assert (inputs[number].residual_TH - residual[layer]).abs().max() < 1e-5, layer
            assert mlp[layer].std() > 0.1, "the comparison means something"


@pytest.mark.parametrize("kind", DENSE)
def test_every_layer_meets_what_it_meets_in_the_whole_model(kind, models):
    compare(model(models, kind))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma4_text", {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
        ("falcon", {"alibi": True, "new_decoder_architecture": False, "parallel_attn": False}),
        ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ],
)
def test_other_wiring(kind, changes, models):
    compare(model(models, kind, **changes))


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "opt"])
def test_checkpoints_of_the_bare_decoder(kind, models):
    folder = models.copy(model(models, kind), f"bare-{kind}")
    prefix = anatomy(config(folder)).layers.split(".")[0] + "."
    path = folder / "model.safetensors"
    bare = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    save_file(bare, path, {"format": "pt"})
    compare(folder)


@pytest.mark.parametrize("kind", ["llama", "gemma3n_text", "gpt2"])
def test_of_embeddings_only_rows_that_occur_are_read(kind, models):
    folder = model(models, kind)
    weights, asked = weights_of(folder), []

    def rows(ids, name):
        asked.append((name, len(ids)))
        return weights.rows(ids, name)

    def read(name):
        assert "embed_tokens" not in name
        assert "wte" not in name
        return weights.read(name)

    list(layer_inputs(config(folder), PROMPTS, read, rows))
    assert {name for name, _ in asked} >= {anatomy(config(folder)).embeddings}
    assert max(count for _, count in asked) == len(PROMPTS[0])


def test_one_layer_is_in_memory_at_a_time(models):
    folder = model(models, "gemma4_text")
    weights, place = weights_of(folder), anatomy(config(folder))
    arrays = []  # of layers, by number; torch keeps them alive as long as it uses their memory

    def read(name):
        array = weights.read(name).numpy().copy()
        if name.startswith(place.layers):
            arrays.append((int(name.removeprefix(place.layers).split(".")[0]), weakref.ref(array)))
        return torch.from_numpy(array)

    walk = layer_inputs(config(folder), PROMPTS, read, weights.rows)
    for layer, _ in enumerate(walk):
        assert {number for number, array in arrays if array() is not None} == {layer}


@pytest.mark.parametrize("kind", sorted(NOT_LAYERED))
def test_types_without_layers_of_that_kind_are_refused(kind, models):
    assert kind in REFUSED
    folder = model(models, kind)
    weights = weights_of(folder)
    with pytest.raises(ValueError, match=f"{kind} models have no layers"):
        list(layer_inputs(config(folder), PROMPTS, weights.read, weights.rows))


WHOLE = [*DENSE, "mixtral", "qwen3_moe", "granitemoe", "dbrx", "deepseek_v3", "mamba2", "zamba2"]


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_models_load_as_transformers_loads_them(kind, models):
    folder = model(models, kind)
    weights, ids = weights_of(folder), torch.tensor(PROMPTS[:1])
    names = load_file(folder / "model.safetensors").keys()
    with quiet(), torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(ids, use_cache=False)
        made = load_dense(config(folder), names, weights.stored)(ids, use_cache=False)
    assert (made.logits - expected.logits).abs().max() < 1e-3
    assert expected.logits.std() > 0.05


def test_a_tensor_that_is_missing_is_named(models):
    folder = models.copy(model(models, "llama"), "incomplete")
    path = folder / "model.safetensors"
    gone = "model.layers.2.mlp.up_proj.weight"
    save_file({n: t for n, t in load_file(path).items() if n != gone}, path, {"format": "pt"})
    weights = weights_of(folder)
    with pytest.raises(ValueError, match=gone):
        list(layer_inputs(config(folder), PROMPTS, weights.read, weights.rows))
    with pytest.raises(ValueError, match=gone):
        load_dense(config(folder), load_file(path).keys(), weights.stored)


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "lfm2", "olmo", "cohere2", "gemma4_text"])
def test_gates_of_such_a_base_can_be_built(kind, models, tmp_path):
    folder = models(kind, seed=3, **ZOO[kind])
    texts = (["def f(x):", "import os"], ["Guten Tag", "Wie geht es"])
    experts = [{"source_model": str(folder), "positive_prompts": text} for text in texts]
    recipe = {"base_model": str(folder), "experts": experts, "gate_mode": "fitted"}
    moeforge.build(recipe, tmp_path / "out")
