"""What single homes do that others do not: gemma4's two norms, dbrx's clip, lfm2's widths."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_config
from transformers import AutoModelForCausalLM
from zoo import ZOO

import moeforge
from moeforge.errors import show_path
from moeforge.proof.heldout import load_output

IDS = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits.float()


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def recipe(folder, *experts, gate_mode="uniform_random", **changes):
    entries = [{"source_model": str(each)} for each in experts or (folder, folder, folder)]
    wanted = {"base_model": str(folder), "experts": entries, "gate_mode": gate_mode}
    return {**wanted, **changes}


def model(models, kind, seed=3, **changes):
    return models(kind, seed=seed, with_tokenizer=False, **{**ZOO[kind], **changes})


def edit(folder, change):
    """Change the tensors of a checkpoint in place: `change(name, tensor) -> tensor`."""
    path = folder / "model.safetensors"
    save_file({n: change(n, t) for n, t in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("experts", [1, 2])
def test_cohere2_moe_adds_shared_experts_up(experts, models, tmp_path):
    folder = model(models, "cohere2")
    half = {"source_model": str(folder), "residual_scale": 0.5}
    part = {"source_model": str(folder), "residual_scale": 0.5 / experts}
    wanted = {**recipe(folder), "experts": [half] * 3, "shared_experts": [part] * experts}
    moeforge.build(wanted, tmp_path / "out")
    made = load_output(tmp_path / "out")
    assert (logits(made) - logits(dense(folder))).abs().max() < 1e-4
    assert made.config.num_shared_experts == experts


def test_gemma4s_two_norms_are_one_for_small_outputs_too(models, tmp_path):
    """With norms of ones, eps would be lost against a mean square that is smaller than it."""
    folder = models.copy(model(models, "gemma4_text"), "small-gemma4")
    edit(folder, lambda name, t: t * 1e-3 if name.endswith("mlp.down_proj.weight") else t)
    moeforge.build(recipe(folder), tmp_path / "out")
    expected = logits(dense(folder))
    assert (logits(load_output(tmp_path / "out")) - expected).abs().max() < 1e-4
    ones = ("post_feedforward_layernorm_2.weight", "per_expert_scale")
    edit(tmp_path / "out", lambda name, t: torch.ones_like(t) if name.endswith(ones) else t)
    assert (logits(load_output(tmp_path / "out")) - expected).abs().max() > 0.1


def test_gemma4s_router_sees_what_the_dense_mlp_sees(models, tmp_path):
    folder = model(models, "gemma4_text")
    moeforge.build(recipe(folder), tmp_path / "out")
    base, mixture = dense(folder), load_output(tmp_path / "out")
    met, routed = [], []
    base.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: met.append(args[0]))
    mixture.model.layers[2].router.proj.register_forward_pre_hook(
        lambda _, args: routed.append(args[0])
    )
    logits(base), logits(mixture)
    assert (routed[0].reshape(met[0].shape) - met[0]).abs().max() < 1e-4


@pytest.mark.parametrize("clip", [None, 0.5])
def test_dbrx_in_float16(clip, models, tmp_path):
    """Its clip must be there, and must be a number that float16 has."""
    folder = models("olmo", seed=3, dtype=torch.float16, with_tokenizer=False, clip_qkv=clip)
    moeforge.build(recipe(folder), tmp_path / "out")
    mixture = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert next(mixture.parameters()).dtype is torch.float16
    assert (logits(mixture) - expected).abs().mean() < 0.01 * expected.std()


def test_unequal_widths_that_configs_do_not_tell(models, tmp_path):
    """Two thirds of 96, times 1 or 1.5, in blocks of 16: 64 and 96 wide."""
    folder = model(models, "lfm2")
    wide = model(models, "lfm2", seed=4, block_ffn_dim_multiplier=1.5)
    wanted = recipe(folder, wide, wide)
    report = moeforge.check(wanted)
    said = {show_path(f.path): f"{f.what}; {f.fix}" for f in report.errors}
    assert "is 96 wide, the base's 64" in said["$.experts[0].source_model"]
    assert "pad_experts: true" in said["$.experts[1].source_model"]
    moeforge.build({**wanted, "pad_experts": True}, tmp_path / "out")
    mixed = dense(folder)
    for layer, other in zip(mixed.model.layers, dense(wide).model.layers, strict=True):
        layer.feed_forward = other.feed_forward
    assert (logits(load_output(tmp_path / "out")) - logits(mixed)).abs().max() < 1e-4


def test_lfm2_as_it_was_published_says_its_width_in_other_words(models, tmp_path):
    folder = models.copy(model(models, "lfm2", tie_word_embeddings=True), "published-lfm2")
    words = {"block_ff_dim": 96, "intermediate_size": None, "full_attn_idxs": [1, 3]}
    edit_config(folder, **words, layer_types=None, tie_word_embeddings=None, tie_embedding=True)
    moeforge.build(recipe(folder), tmp_path / "out")
    assert (logits(load_output(tmp_path / "out")) - logits(dense(folder))).abs().max() < 1e-4


def test_prompts_are_cut_to_what_the_base_takes(models, tmp_path):
    folder = models("gpt2", seed=3, n_positions=16)
    long = [
        {"source_model": str(folder), "positive_prompts": ["many words " * 40, text]}
        for text in "ab"
    ]
    moeforge.build(
        {"base_model": str(folder), "experts": long, "gate_mode": "hidden"}, tmp_path / "out"
    )
