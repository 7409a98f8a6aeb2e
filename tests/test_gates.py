"""Gate modes and the layer-by-layer base: right inputs, right shapes, same seed same bits."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeforge
from moeforge import catalog, gates
from moeforge.forward import layer_inputs
from moeforge.gates import GateInput, TokenizedPrompt
from moeforge.planners import Planner
from moeforge.recipe import Reference
from moeforge.sources import open_source
from moeforge.weights import Weights

PROMPTS = {
    0: ["def f(x):\n    return x + 1", "import os", "class A(B): pass"],
    1: ["Der schnelle braune Fuchs springt.", "Guten Morgen, wie geht es dir heute?"],
}
NEGATIVE = {0: ["Guten Abend"]}


def weights_of(folder):
    planner = Planner(lambda reference: open_source(reference.model))
    return Weights(planner.model(Reference(model=str(folder)), ()))


def gate_input(folder, seed=0, prompts=PROMPTS, negative=NEGATIVE, experts=2):
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = weights_of(folder)
    tokenized = [
        TokenizedPrompt(expert, bad, tuple(tokenizer(text)["input_ids"]), 1)
        for bad, table in ((False, prompts), (True, negative))
        for expert, texts in table.items()
        for text in texts
    ]
    shape = (config["num_hidden_layers"], experts, config["hidden_size"])

    def walk():
        return layer_inputs(config, [p.ids for p in tokenized], weights.read, weights.rows)

    return GateInput(shape, seed, tokenized, weights.rows, walk)


def made(mode, data):
    found = gates.load(mode).build(data)
    return found.weights_LEH if isinstance(found, gates.Gates) else found


def hooked(folder, text, side=None, attention="eager"):
    """What transformers itself computes: residual and MLP inputs [layers, tokens, hidden]."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "</s>"
    residual, mlp = [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: residual.append((args or (kwargs["hidden_states"],))[0]),
            with_kwargs=True,
        )
        layer.mlp.register_forward_pre_hook(lambda module, args: mlp.append(args[0]))
    if side is None:
        batch = tokenizer(text, return_tensors="pt")
    else:
        tokenizer.padding_side = side
        batch = tokenizer(
            [text, text + " and a much longer text"], padding=True, return_tensors="pt"
        )
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    real = batch["attention_mask"][0].bool()
    return torch.stack([r[0][real] for r in residual]), torch.stack([m[0][real] for m in mlp])


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "granite"])
def test_the_base_runs_layer_by_layer_as_it_does_in_transformers(model_type, models):
    extra = {"sliding_window": 6} if model_type == "mistral" else {}
    folder = models(model_type, seed=5, **extra)
    text = "Attention sinks and sliding windows"
    residual, mlp = hooked(folder, text)
    config = json.loads((folder / "config.json").read_text())
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    weights = weights_of(folder)
    for attention in ("sdpa", "eager"):
        walk = layer_inputs(config, [ids, ids[:7]], weights.read, weights.rows, attention=attention)
        seen = [inputs[0] for inputs in walk]
        assert (torch.stack([s.residual_TH for s in seen]) - residual).abs().max() < 1e-4
        assert (torch.stack([s.mlp_TH for s in seen]) - mlp).abs().max() < 1e-4
    assert mlp.std() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_and_attention_do_not_change_what_gates_see(side, attention, models):
    folder = models("llama", seed=5)
    text = "A prompt"
    padded = hooked(folder, text, side, attention)
    config = json.loads((folder / "config.json").read_text())
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    weights = weights_of(folder)
    seen = [inputs[0] for inputs in layer_inputs(config, [ids], weights.read, weights.rows)]
    assert (torch.stack([s.residual_TH for s in seen]) - padded[0]).abs().max() < 1e-4
    assert (torch.stack([s.mlp_TH for s in seen]) - padded[1]).abs().max() < 1e-4


@pytest.mark.parametrize("name", catalog.names("gates"))
def test_shape_finiteness_and_same_seed_same_bits(name, models):
    folder = models("llama", seed=5)
    first, again = made(name, gate_input(folder)), made(name, gate_input(folder))
    assert first.shape == (4, 2, 64)
    assert first.dtype == torch.float32
    assert bool(first.isfinite().all())
    assert torch.equal(first, again)
    other_seed = made(name, gate_input(folder, seed=1))
    assert torch.equal(first, other_seed) is ("random" not in name)
    assert bool(first.any()) is (name != "zeros")


def by_hand(folder, which, reduce, texts):
    vectors = [reduce(hooked(folder, text)[which]) for text in texts]
    return torch.stack(vectors).mean(0)


@pytest.mark.parametrize(
    ("name", "which", "reduce"),
    [
        ("hidden", 1, lambda x_LTH: x_LTH[:, 1:].mean(1)),
        ("hidden_last", 0, lambda x_LTH: x_LTH[:, -1]),
        ("hidden_avg", 0, lambda x_LTH: x_LTH.mean(1)),
    ],
)
def test_mean_gates_are_the_means_they_say(name, which, reduce, models):
    folder = models("llama", seed=5)
    result = gates.load(name).build(gate_input(folder))
    for expert in (0, 1):
        row = by_hand(folder, which, reduce, PROMPTS[expert])
        if expert in NEGATIVE:
            row = row - by_hand(folder, which, reduce, NEGATIVE[expert])
        row = row / row.norm(dim=-1, keepdim=True)
        assert (result[:, expert] - row).abs().max() < 1e-4


def test_cheap_embed_sums_embedding_rows(models):
    folder = models("llama", seed=5)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = gates.load("cheap_embed").build(gate_input(folder))

    def direction(texts):
        total = sum(table[tokenizer(text)["input_ids"]].sum(0) for text in texts)
        return total / total.norm()

    row = direction(PROMPTS[0]) - direction(NEGATIVE[0])
    assert (result[2, 0] - row / row.norm()).abs().max() < 1e-5
    assert (result[0, 1] - direction(PROMPTS[1])).abs().max() < 1e-5


def recipe(base, experts, **more):
    return {
        "base_model": base,
        "experts": [
            {"source_model": str(folder), "positive_prompts": PROMPTS[i]}
            for i, folder in enumerate(experts)
        ],
        **more,
    }


def routers(folder):
    tensors = load_file(folder / "model.safetensors")
    return torch.stack([tensors[name] for name in sorted(tensors) if ".gate." in name])


def test_an_inline_base_gives_the_gates_of_the_same_base_on_disk(llamas, tmp_path):
    inline = {
        "merge_method": "slerp",
        "base_model": str(llamas[0]),
        "models": [{"model": str(folder)} for folder in llamas[:2]],
        "parameters": {"t": 0.25},
    }
    moeforge.build(inline, tmp_path / "base")
    for mode in ("fitted", "hidden", "cheap_embed"):
        for name, base in (("one", inline), ("two", str(tmp_path / "base"))):
            out = tmp_path / f"{mode}-{name}"
            # By default only gates of a base that is a recipe are fitted to the mixture itself.
            given = {"on_policy": True} if mode == "fitted" else {}
            moeforge.build(recipe(base, llamas[1:], gate_mode=mode, gate_parameters=given), out)
        one, two = routers(tmp_path / f"{mode}-one"), routers(tmp_path / f"{mode}-two")
        assert (one - two).abs().max() < 1e-3 * one.abs().max()


def test_chats_go_through_the_chat_template(llamas, models, tmp_path):
    folder = models.copy(llamas[0], "chatty")
    template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "Guten Tag"}]}) + "\n"
    )
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "user: Guten Tag"}) + "\n")
    found = {}
    for kind in ("chat", "text"):
        data = recipe(str(folder), llamas[1:], gate_mode="hidden")
        data["experts"][1] = {
            "source_model": str(llamas[2]),
            "prompts_file": str(tmp_path / f"{kind}.jsonl"),
        }
        moeforge.build(data, tmp_path / kind)
        found[kind] = routers(tmp_path / kind)
    assert torch.equal(found["chat"], found["text"])
    data["experts"][1]["prompts_file"] = str(tmp_path / "chat.jsonl")
    data["base_model"] = str(llamas[0])
    with pytest.raises(moeforge.errors.PlanError, match="no chat template"):
        moeforge.build(data, tmp_path / "never")
    assert not (tmp_path / "never").exists()
