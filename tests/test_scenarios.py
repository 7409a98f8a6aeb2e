"""The fifteen bad inputs that users of merge tools stumble over: text and exit code of each.

One test a case, through the real command. Where an input is allowed and harms the result there is a
warning, and `--strict` refuses it.
"""

import json
import shutil

import pytest
import tiny
import torch
import warm
import yaml
from safetensors.torch import load_file, save_file
from tiny import edit_config

import moeforge
from moeforge.errors import BuildError

WEIGHTS = "model.safetensors"
CODE, PROSE = ["def sort(list):", "import os"], ["Es war einmal", "Guten Tag"]


@pytest.fixture
def run(tmp_path):
    """Runs a command on a recipe: `run(data, code)` -> what it prints on both streams."""

    def act(data, code, *options, command="check"):
        path = tmp_path / "recipe.yml"
        path.write_text(data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False))
        done = warm.moeforge(command, path, *options, cwd=tmp_path)
        text = done.stdout + done.stderr
        assert done.returncode == code, text
        assert "Traceback" not in text
        return text

    return act


def moe(base, *experts, **changes):
    prompts = [CODE, PROSE, ["1 + 2"]]
    entries = [
        {"source_model": str(model), "positive_prompts": given}
        for model, given in zip(experts, prompts, strict=False)
    ]
    return {"base_model": str(base), "experts": entries, **changes}


def linear(*folders, **changes):
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders]
    return {"merge_method": "linear", "models": models, **changes}


def damaged(models, folder, name, change):
    """A copy of a model whose tensors `change` has changed."""
    copy = models.copy(folder, name)
    tensors = load_file(copy / WEIGHTS)
    change(tensors)
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    return copy


def test_1_a_typo_in_a_key_or_a_method(run, llamas):
    base, a, b = llamas
    recipe = yaml.safe_dump(moe(base, a, b), sort_keys=False) + "expert_per_token: 1\n"
    text = run(recipe, 2)
    assert 'unknown key "expert_per_token" — did you mean "experts_per_token"?' in text
    assert f"line {recipe.count(chr(10))}, " in text
    text = run({**linear(a, b), "merge_method": "dare-ties"}, 2)
    assert 'unknown merge method "dare-ties" — did you mean "dare_ties"? Known: ' in text


def test_2_an_expert_of_another_width(run, models, llamas):
    base, a, _ = llamas
    other = models("llama", 3, intermediate_size=128)
    text = run(moe(base, a, other), 4)
    assert f"{other} has intermediate_size 128, {base} has 96" in text
    assert "Use fine-tunes of the base, or pad_experts: true" in text
    assert "$.experts[1].source_model" in text
    assert "≠ 128" in text, "the odd cell of the table"


def test_3_an_expert_of_another_depth(run, models, llamas):
    base, a, _ = llamas
    text = run(moe(base, a, models("llama", 4, num_hidden_layers=6)), 4)
    assert f"has 6 layers, {base} has 4" in text
    assert "Or give the expert by ranges of layers" in text


def test_4_an_expert_with_other_positions(run, models, llamas):
    base, a, _ = llamas
    other = models("llama", 5, rope_theta=50000.0, max_position_embeddings=128)
    text = run(moe(base, a, other), 0)
    assert f"warning: line 7, $.experts[1].source_model: {other} has rope_theta 50000.0" in text
    assert "attention comes from the base" in text
    assert "activations they were not trained on" in text
    assert "error: " in run(moe(base, a, other), 4, "--strict")


def test_5_an_expert_with_more_tokens(run, models, llamas):
    base, a, b = llamas
    more = models.copy(a, "more-tokens")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(more)
    text = run(moe(base, more, b), 0)
    assert f"{more} has 2 tokens that {base} lacks: <|im_start|>, <|im_end|>" in text
    assert "one embedding table, the base's, so these would be lost" in text
    text = run(linear(b, more), 0)
    assert "2 tokens" in text
    assert "write tokenizer: {source: union} for all" in text


def test_5_tokens_under_other_ids(run, models, llamas):
    base, a, b = llamas
    moved = models.copy(a, "moved-tokens")
    tokenizer = json.loads((moved / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["1"], ids["2"] = ids["2"], ids["1"]
    (moved / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = run(linear(b, moved), 4, "--strict")
    assert f"{moved} has 2 tokens under other ids than {b}: " in text
    assert "write tokenizer: {source: base}" in text
    assert "2 tokens under other ids" in run(moe(base, moved, b), 0)


def test_6_more_rows_than_tokens(run, llamas):
    text = run(linear(*llamas[:2]), 0)
    tokens = len(tiny.tokenizer())
    assert f"300 rows for {tokens} tokens; {300 - tokens} padding rows are kept" in text


def test_7_tied_and_untied_heads(run, models, llamas):
    _, a, b = llamas
    tied = models("llama", 6, tie_word_embeddings=True)
    text = run(linear(tied, b), 0)
    assert "an output head of its own: the output has one, and embeddings serve" in text
    text = run(moe(tied, a, b), 0)
    assert "has an output head of its own, which is left out" in text
    assert "≠ no" in text, "the odd cell of the table"


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ],
    ids=lambda settings: settings["quant_method"],
)
def test_8_a_quantised_model(settings, run, models, llamas):
    copy = models.copy(llamas[1], f"quantised-{settings['quant_method']}")
    edit_config(copy, quantization_config=settings)
    (copy / "README.md").write_text("---\nbase_model: acme/B\n---\n")
    text = run(linear(llamas[0], copy), 3)
    assert f"is quantised ({settings['quant_method']}, 4-bit); its numbers cannot be merged" in text
    assert "Use the 16-bit original, which its card names: acme/B." in text


def test_8_a_gguf_file(run, llamas, tmp_path):
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    text = run(linear(llamas[0], folder), 3)
    assert "holds GGUF files, which are quantised for llama.cpp" in text
    assert "Use the original checkpoint." in text


def test_9_an_adapter_in_place_of_a_model(run, llamas, tmp_path):
    folder = tmp_path / "lora-code"
    folder.mkdir()
    config = {"base_model_name_or_path": "acme/base-7b", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(llamas[1] / WEIGHTS, folder / "adapter_model.safetensors")
    text = run(moe(llamas[0], llamas[1], folder), 3)
    assert f"{folder} is an adapter for acme/base-7b, not a model" in text
    assert f'Write "acme/base-7b+{folder}"' in text


def test_10_wrong_layer_ranges(run, llamas):
    spans = [(llamas[0], [0, 4]), (llamas[1], [3, 3]), (llamas[1], [3, 6])]
    slices = [{"sources": [{"model": str(m), "layer_range": span}]} for m, span in spans]
    text = run({"slices": slices}, 4)
    assert "layer_range [3, 3] is empty" in text
    assert "For layer 3 alone write [3, 4]." in text
    assert f"layer_range [3, 6], but {llamas[1]} has 4 layers" in text
    assert "Valid: 0 to 4, the end is exclusive." in text


def test_11_mixed_families(run, models, llamas):
    base, a, _ = llamas
    gpt = models("gpt2", 0, n_embd=64, n_layer=4, n_head=4)
    for recipe in (linear(base, a, gpt), moe(base, a, gpt)):
        text = run(recipe, 4)
        assert f"{gpt} is a gpt2 model, {base} a llama model (64 hidden, 4 heads)" in text
        assert "no setting makes one model of them" in text
        assert f"Of one family with {base}: {a}." in text
        assert "≠ gpt2" in text, "the odd cell of the table"


def test_12_prompts_missing_or_the_same(run, llamas):
    base, a, b = llamas
    same = moe(base, a, b)
    same["experts"][1]["positive_prompts"] = CODE
    text = run(same, 4)
    assert "$.experts[1]: experts[0] has the same prompts: no router can tell them apart" in text
    near = moe(base, a, b)
    near["experts"][1]["positive_prompts"] = [f"{text} " for text in CODE]
    text = run(near, 4, "--strict")
    assert "100% of the words in its prompts and in those of experts[0] are the same" in text
    missing = moe(base, a, b)
    del missing["experts"][1]["positive_prompts"]
    text = run(missing, 4)
    assert "needs prompts for every expert, this one has none" in text
    assert "or choose gate_mode: random to train it" in text


def test_13_tensors_without_a_place(run, models, llamas):
    name = "model.layers.3.linear_attn.conv1d.weight"
    odd = damaged(models, llamas[1], "odd", lambda t: t.update({name: torch.zeros(4)}))
    text = run(moe(llamas[0], odd, llamas[2]), 4)
    assert f"1 tensors that {llamas[0]} lacks: {name}" in text
    assert "No weight is dropped silently" in text
    text = run(moe(odd, llamas[0], llamas[2]), 4)
    assert f"has no place for 1 tensors of {odd}: {name}" in text
    assert name in run(linear(llamas[0], odd), 4)


def test_14_not_enough_room(run, models, tmp_path, llamas):
    """A model of 3 TB: a header and a hole. No disk here has room for another."""
    vast, layers, wide = models.copy(llamas[0], "vast"), 400, 10**7
    specs = {"model.embed_tokens.weight": [300, 64], "model.norm.weight": [64]}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        specs |= {f"{stem}.mlp.{part}_proj.weight": [wide, 64] for part in ("gate", "up")}
        specs[f"{stem}.mlp.down_proj.weight"] = [64, wide]
    header, end = {}, 0
    for name, shape in specs.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with open(vast / WEIGHTS, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    edit_config(vast, num_hidden_layers=layers, intermediate_size=wide, tie_word_embeddings=True)
    text = run(linear(vast), 5, "-o", tmp_path / "out")
    assert "the output takes 3.07 TB" in text
    assert "GB free" in text or "TB free" in text
    assert "Choose another disk with -o, or write dtype: bfloat16 (saves 1.54 TB)." in text
    assert "memory  about" in text
    text = run(linear(vast), 5, "-o", tmp_path / "out", command="build")
    assert "the output takes 3.07 TB" in text
    assert not (tmp_path / "out").exists()


def test_15_values_that_are_not_finite(run, models, llamas, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name][3, 5] = float("nan")

    bad = damaged(models, llamas[1], "nan", spoil)
    text = run(moe(llamas[0], bad, llamas[2]), 5, "-o", tmp_path / "out", command="build")
    assert "1 NaN" in text
    assert str(bad / WEIGHTS) in text
    assert "up_proj" in text
    assert not (tmp_path / "out").exists()
    with pytest.raises(BuildError, match="1 NaN"):
        moeforge.build(linear(llamas[0], bad), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_paths_that_do_not_exist(run, llamas, tmp_path):
    text = run(moe(llamas[0], llamas[1], "./nope"), 3)
    assert f"./nope does not exist (looked in {tmp_path})" in text.replace(
        f"{tmp_path} and {tmp_path}", str(tmp_path)
    )
    assert "it is not a Hub id" in text


def test_a_family_without_a_home_hears_why_each_target_was_rejected(run, models):
    bert = models("gpt2", 1, n_embd=64, n_layer=4, n_head=4)
    text = run(moe(bert, bert, bert, architecture="mixtral"), 4)
    assert "gpt2" in text
    assert "mixtral" in text
