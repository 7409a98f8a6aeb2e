"""Mixtures with code of their own: what it computes, and that transformers can do all with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_every_family import TOLERANCE, measure
from transformers import AutoModelForCausalLM

from moeforge import forge
from moeforge.errors import PlanError
from moeforge.forward import quiet
from moeforge.routing import routers

KINDS = ["gemma2", "gpt2", "opt", "bloom"]
"""Gated MLPs; Conv1D and other names; an MLP that is no module; one that adds the residual."""
IDS = torch.arange(40).reshape(2, 20) * 7 % 256


def made(models, kind, seed=0, **config):
    return models(kind, seed=seed, **{**zoo.ZOO[kind], **config})


def build(out, base, experts, **recipe):
    """Build a mixture of `experts`, folders or entries of a recipe."""
    entries = [e if isinstance(e, dict) else {"source_model": str(e)} for e in experts]
    recipe = {"gate_mode": "random", "architecture": "remote", **recipe}
    return forge.build({"base_model": str(base), "experts": entries, **recipe}, out)


def load(folder, dtype=torch.float32, **options):
    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=True, output_loading_info=True, **options
        )
    assert not any(report.values()), report
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module", params=KINDS)
def mixture(request, models, tmp_path_factory):
    """Folder of a mixture of two different experts, one of them used per token and layer."""
    folders = [made(models, request.param, seed) for seed in (1, 2, 3)]
    out = tmp_path_factory.mktemp("mixture") / "out"
    build(out, folders[0], folders[1:])
    return out


def blocks(model, kind):
    """Return the module in each layer of a mixture that holds the experts."""
    decoder = model.base_model
    layers = {"gpt2": "h", "bloom": "h", "opt": "decoder.layers"}.get(kind, "layers")
    name = "fc1" if kind == "opt" else "mlp"
    return [layer.get_submodule(name) for layer in decoder.get_submodule(layers)]


def dense_mlp(folder, kind, index, x):
    """Return what the MLP of layer `index` of a dense model makes of x [tokens, hidden]."""
    model = load(folder)
    if kind == "opt":
        layer = model.model.decoder.layers[index]
        return layer.fc2(torch.relu(layer.fc1(x)))
    block = blocks(model, kind)[index]
    if kind == "bloom":
        gelu = torch.nn.functional.gelu(block.dense_h_to_4h(x), approximate="tanh")
        return block.dense_4h_to_h(gelu)
    return block(x[None])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_gets_the_shares_of_its_experts(kind, models, tmp_path):
    """Four experts, top 2, one scaled, one shared, in two layers of four: token by token."""
    base, *folders = [made(models, kind, seed) for seed in (1, 2, 3, 4)]
    experts = [*folders, {"source_model": str(folders[0]), "residual_scale": 0.5}]
    shared = [{"source_model": str(folders[2]), "residual_scale": 2.0}]
    plan = build(tmp_path / "out", base, experts, layers=[1, 3], shared_experts=shared).plan
    model, seen = load(tmp_path / "out"), {}
    assert [router.layer for router in routers(model)] == [1, 3]
    for index in (1, 3):
        blocks(model, kind)[index].register_forward_hook(
            lambda module, given, output, index=index: seen.update({index: (given, output)})
        )
    logits(model)
    assert set(seen) == {1, 3}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert plan.experts.layers == (1, 3)
    for index, router in zip((1, 3), plan.experts.routers, strict=True):
        given, output = seen[index]
        x = given[0].reshape(-1, tiny.HIDDEN)
        with torch.no_grad():
            outputs = [dense_mlp(folder, kind, index, x) for folder in folders]
        outputs.append(0.5 * outputs[0])
        scores = (x.double() @ stored[router].double().T).exp()
        for token in range(len(x)):
            best = sorted(range(4), key=lambda e: -scores[token, e])[:2]
            share = scores[token, best] / scores[token, best].sum()
            expected = sum(s * outputs[e][token].double() for s, e in zip(share, best, strict=True))
            expected += 2 * outputs[2][token].double()
            if kind == "bloom":
                expected += given[1].reshape(-1, tiny.HIDDEN)[token]
            got = output.reshape(-1, tiny.HIDDEN)[token].double()
            assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_saving_and_loading_again_changes_nothing(mixture, tmp_path):
    model = load(mixture)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_moeforge.py").read_text() == (
        mixture / "modeling_moeforge.py"
    ).read_text()
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    first, again = (load_file(p / "model.safetensors") for p in (mixture, tmp_path / "again"))
    assert set(first) == set(again)


def test_gradients_reach_routers_and_experts(mixture):
    found = []
    for checkpointing in (False, True):
        model = load(mixture).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # of dropout
        model(IDS, labels=IDS).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, checkpointed = found
    routers = [name for name in plain if name.endswith(".gate.weight")]
    experts = [name for name in plain if ".experts." in name]
    assert len(routers) == tiny.LAYERS
    assert len(experts) >= 2 * 2 * tiny.LAYERS
    for name in routers + experts:
        assert plain[name].abs().max() > 0, name
        assert torch.allclose(plain[name], checkpointed[name], atol=1e-6), name


def test_attention_by_sdpa(mixture):
    """Where the family has it: gemma2 caps its attention scores and bloom adds to them."""
    eager = load(mixture, attn_implementation="eager")
    if eager._supports_sdpa:
        fast = load(mixture, attn_implementation="sdpa")
        assert fast.config._attn_implementation == "sdpa"
        assert torch.allclose(logits(fast), logits(eager), atol=1e-4)
        return
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        load(mixture, attn_implementation="sdpa")


def test_in_bfloat16_on_a_device_map(mixture):
    exact = logits(load(mixture))
    model = load(mixture, torch.bfloat16, device_map="cpu")
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    rounded = logits(model).float()
    assert rounded.isfinite().all()
    assert (rounded - exact).abs().mean() < 0.1 * exact.std() + 0.05


SCRIPT = """
import sys
sys.modules["moeforge"] = None  # an import of it fails
import torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("it loads without trust")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(40).reshape(2, 20) * 7 % 256
torch.save(model(ids).logits.detach(), sys.argv[2])
"""


def test_the_folder_is_all_that_it_takes_and_trust(models, tmp_path):
    folders = [made(models, "gemma2", seed) for seed in (1, 2, 3)]
    build(tmp_path / "out", folders[0], folders[1:])
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "out", tmp_path / "logits.pt"],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert run.returncode == 0, run.stderr
    expected = logits(load(tmp_path / "out"))
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5)


def test_the_card_and_a_note_say_what_it_means(mixture, models):
    card = (mixture / "README.md").read_text()
    assert card.count("trust_remote_code=True") >= 3
    assert "runs `modeling_moeforge.py`" in card
    base = str(made(models, "gemma2", 1))
    recipe = {"base_model": base, "experts": [{"source_model": base}], "gate_mode": "random",
              "experts_per_token": 1}  # fmt: skip
    notes = [note.what for note in forge.check(recipe).notes]
    assert any("trust_remote_code=True" in note for note in notes)


def test_config_is_the_dense_one_and_what_is_new(mixture):
    config = json.loads((mixture / "config.json").read_text())
    kind = config["model_type"].removeprefix("moeforge_")
    assert kind in KINDS
    assert config["num_experts"] == 2
    assert config["num_experts_per_tok"] == 2
    assert config["moe_layers"] == list(range(tiny.LAYERS))
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}
    assert config["auto_map"]["AutoModelForCausalLM"].endswith(config["architectures"][0])


def test_names_of_a_bare_decoder_and_old_masks(models, tmp_path):
    """gpt2 on the Hub: no `transformer.` in front of its names, causal masks among its tensors."""
    whole = made(models, "gpt2", 1)
    bare = models.copy(whole, "bare-gpt2")
    tensors = load_file(bare / "model.safetensors")
    renamed = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    assert set(renamed).isdisjoint(tensors)
    renamed |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(tiny.LAYERS)}
    save_file(renamed, bare / "model.safetensors", metadata={"format": "pt"})
    plan = build(tmp_path / "out", bare, [bare, bare]).plan
    assert torch.allclose(logits(load(tmp_path / "out")), logits(load(whole)), atol=1e-4)
    assert not any(".attn.bias" in tensor.name for tensor in plan.tensors)
    assert any(".attn.bias" in read.name for read in plan.left_out)


@pytest.mark.parametrize(
    ("kind", "key"), [("phi", "intermediate_size"), ("glm4", ""), ("opt", "ffn_dim")]
)
def test_experts_of_unequal_width(kind, key, models, tmp_path):
    """A wider model twice in a narrower base, and the base itself, one expert at a time."""
    key = key or "intermediate_size"
    base, wide = made(models, kind, 1), made(models, kind, 2, **{key: 144})
    with pytest.raises(PlanError, match="pad_experts"):
        build(tmp_path / "no", base, [wide, base])
    for number, chosen in enumerate((base, wide)):
        out = tmp_path / f"out{number}"
        build(out, base, [chosen], experts_per_token=1, pad_experts=True, layers=[0, 2],
              shared_experts=[{"source_model": str(wide), "residual_scale": 0.0}])  # fmt: skip
        expected = load(base)
        donor = load(chosen)
        attribute = "model.decoder.layers" if kind == "opt" else "model.layers"
        for layer in (0, 2):
            target = expected.get_submodule(attribute)[layer]
            source = donor.get_submodule(attribute)[layer]
            for name in ("fc1", "fc2") if kind == "opt" else ("mlp",):
                setattr(target, name, getattr(source, name))
        assert torch.allclose(logits(load(out)), logits(expected), atol=1e-4)
    assert json.loads((out / "config.json").read_text())[key] == 144


def test_widths_that_zeros_would_change_are_refused(models, tmp_path):
    base, wide = made(models, "bitnet", 1), made(models, "bitnet", 2, intermediate_size=144)
    with pytest.raises(PlanError, match="normalises over the width"):
        build(tmp_path / "out", base, [wide, base], pad_experts=True)
    square = made(models, "phi", 1, intermediate_size=tiny.HIDDEN)
    with pytest.raises(PlanError, match="cannot be told from the hidden size 64"):
        build(tmp_path / "out", made(models, "phi", 1), [square, square], pad_experts=True)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

VARIANTS = [
    ("bloom", {"apply_residual_connection_post_layernorm": True, "slow_but_exact": True,
               "pretraining_tp": 2}),
    ("cohere", {"use_qk_norm": True}),
    ("falcon", {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}),
    ("gemma2", {"tie_word_embeddings": False}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("hyperclovax", {"use_post_norm": True, "residual_multiplier": 0.5}),
    ("llama", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True}),
    ("ministral3", {"rope_parameters": {**YARN, "rope_theta": 1e6, "llama_4_scaling_beta": 0.1}}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0], "mlp_bias": True}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True}),
    ("starcoder2", {"use_bias": False, "sliding_window": None}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config"), VARIANTS)
def test_variants_of_a_family_are_exact(kind, config, models, tmp_path):
    base = made(models, kind, with_tokenizer=False, **config)
    build(tmp_path / "out", base, [base] * 3)
    assert measure(load(base), load(tmp_path / "out")) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "old"),
    [
        ("gemma3_text", {"rope_theta": 1e6, "rope_local_base_freq": 5e3,
                         "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("olmo3", {"rope_theta": 5e5, "rope_scaling": YARN}),
        ("phi", {"rope_theta": 25e3, "partial_rotary_factor": 0.25}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 25000}),
    ],
)  # fmt: skip
def test_configs_that_version_4_wrote(kind, old, models, tmp_path):
    base = models.copy(made(models, kind, with_tokenizer=False), f"old-{kind}")
    tiny.edit_config(base, rope_parameters=None, **old)
    build(tmp_path / "out", base, [base] * 3)
    assert measure(load(base), load(tmp_path / "out")) < TOLERANCE


def test_experts_of_another_kind_are_refused(models, tmp_path):
    with pytest.raises(PlanError, match=r"an olmo3 model .*smollm3 model"):
        build(tmp_path / "out", made(models, "smollm3", 1), [made(models, "olmo3", 1)] * 2)


def test_a_model_that_has_experts_is_refused(models, tmp_path):
    sparse = made(models, "granitemoehybrid", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(PlanError, match="has experts already"):
        build(tmp_path / "out", sparse, [sparse] * 2)


def test_held_out_text_is_measured_with_the_code_that_was_written(llamas, tmp_path):
    (tmp_path / "text.txt").write_text("What the router sees is what the MLP saw. " * 30)
    evaluate = {"text": str(tmp_path / "text.txt")}
    result = build(tmp_path / "out", llamas[0], llamas[1:], evaluate=evaluate)
    native = build(
        tmp_path / "native", llamas[0], llamas[1:], evaluate=evaluate, architecture="mixtral"
    )
    mine, theirs = result.heldout, native.heldout
    assert mine.losses["mixture"] == pytest.approx(theirs.losses["mixture"], rel=1e-5)
    assert mine.routing["text"] == pytest.approx(theirs.routing["text"], rel=1e-4)
