"""Every check of a checkpoint finds what it is for; checkpoints without mistakes pass them all."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
import tiny
import torch
import zoo
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import moeforge
from moeforge.errors import BuildError
from moeforge.output.lock import NAME as LOCK
from moeforge.proof.verify import SKIPPED

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDINGS = "model.embed_tokens.weight"


def checks(folder, **options):
    return {check.name: check for check in moeforge.verify(folder, **options).checks}


def wrong(folder, name):
    """Findings of check `name`, which must fail, as one text."""
    check = checks(folder)[name]
    assert check.state == "failed", check
    return "\n".join(map(str, check.findings))


@pytest.fixture
def llama(models, tmp_path):
    """A llama in shards, to damage."""
    return models.copy(models("llama", shard_size="200kB"), f"damaged-{tmp_path.name}")


@pytest.fixture
def single(models, tmp_path):
    """A llama in one file, to damage."""
    return models.copy(models("llama"), f"damaged-{tmp_path.name}")


@pytest.fixture
def built(llamas, tmp_path):
    """A merge of moeforge, with a lock."""
    inputs = [{"model": str(folder), "parameters": {"weight": 1}} for folder in llamas]
    moeforge.build({"merge_method": "linear", "models": inputs}, tmp_path / "built")
    return tmp_path / "built"


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# --- files ---------------------------------------------------------------------------------------


def test_a_truncated_shard(llama):
    shard = sorted(llama.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    text = wrong(llama, "files")
    assert shard.name in text
    assert "was not downloaded whole" in text
    assert all(check.state == SKIPPED for name, check in checks(llama).items() if name != "files")


def test_an_index_that_names_an_absent_file(llama):
    shard = sorted(llama.glob("model-*"))[1]
    shard.unlink()
    assert shard.name in wrong(llama, "files")


def test_an_index_that_lists_other_tensors_or_bytes(llama):
    edit(llama / INDEX, lambda index: index["weight_map"].pop(EMBEDDINGS))
    assert f"{EMBEDDINGS}, which the index does not list" in wrong(llama, "files")


def test_an_index_with_another_size(llama):
    edit(llama / INDEX, lambda index: index["metadata"].update(total_size=7))
    assert "the index says 7 bytes" in wrong(llama, "files")


def test_weights_that_nothing_names(llama):
    shard = sorted(llama.glob("model-*"))[0]
    (llama / "model-00009-of-00009.safetensors").write_bytes(shard.read_bytes())
    assert "model-00009-of-00009.safetensors is named by no index" in wrong(llama, "files")


def test_two_sets_of_weights(llama, models):
    (llama / WEIGHTS).write_bytes((models("llama") / WEIGHTS).read_bytes())
    assert "transformers reads the first only" in wrong(llama, "files")


# --- values and hashes ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(single, dtype):
    def spoil(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[EMBEDDINGS][7, 3] = float("nan")
        tensors[EMBEDDINGS][8, :2] = -float("inf")

    change_tensors(single, spoil)
    size = tiny.VOCABULARY * tiny.HIDDEN
    expected = f"{EMBEDDINGS} in {WEIGHTS} has 1 NaN and 2 infinite of {size} values"
    assert expected in wrong(single, "values")


def test_a_flipped_bit_against_the_lock(built):
    assert checks(built)["lock"].state == "ok"
    raw = bytearray((built / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (built / WEIGHTS).write_bytes(raw)
    assert f"{WEIGHTS} is not what was built" in wrong(built, "lock")
    assert checks(built)["values"].state == "ok"


def test_files_of_the_lock_that_are_gone_or_longer(built):
    (built / "tokenizer_config.json").unlink()
    with (built / "moeforge.yml").open("a") as file:
        file.write("# mine\n")
    text = wrong(built, "lock")
    assert "tokenizer_config.json is in moeforge.lock.json, and is not here" in text
    assert "moeforge.yml has " in text


def test_a_lock_that_names_files_outside(built):
    edit(built / LOCK, lambda lock: lock["outputs"].update({"../x": {"size": 1, "blake3": ""}}))
    assert "'../x', which is outside the folder" in wrong(built, "lock")


def test_the_card_is_for_people_to_change(built):
    (built / "README.md").write_text("mine")
    assert moeforge.verify(built).ok


# --- what the config promises --------------------------------------------------------------------


def test_a_missing_tensor(single):
    change_tensors(single, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "misses 1 tensors, first model.layers.1.mlp.up_proj.weight" in wrong(single, "load")
    assert checks(single)["forward"].state == SKIPPED


def test_a_tensor_too_many(single):
    change_tensors(single, lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))
    assert "no place for 1 tensors, first model.extra.weight" in wrong(single, "load")


def test_another_shape(single):
    tiny.edit_config(single, intermediate_size=80)
    text = wrong(single, "load")
    assert "12 tensors have other shapes" in text
    assert "[64, 96] instead of [64, 80]" in text


def test_a_config_that_is_read_otherwise(single):
    tiny.edit_config(single, rope_theta=77.0, rope_parameters={"rope_theta": 10000.0})
    assert "rope_theta: 77.0, and transformers reads 10000.0" in wrong(single, "config")


def test_a_config_that_cannot_be_read(single):
    tiny.edit_config(single, num_attention_heads=5, num_key_value_heads=5)
    assert "transformers cannot read config.json" in wrong(single, "config")


def test_ids_that_no_token_has(single):
    tiny.edit_config(single, eos_token_id=[257, 300])
    edit(single / "generation_config.json", lambda config: config.update(pad_token_id=999))
    text = wrong(single, "special ids")
    assert "eos_token_id in config.json is 300, and there are only 300 tokens" in text
    assert "pad_token_id in generation_config.json is 999" in text


def test_an_id_below_zero_is_none(single):
    tiny.edit_config(single, pad_token_id=-1)
    assert checks(single)["special ids"].state == "ok"


def test_a_tokenizer_larger_than_the_embeddings(single):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(50)])
    tokenizer.save_pretrained(single)
    text = wrong(single, "tokenizer")
    assert "'<49>' has id 307, and the embeddings have 300 rows" in text


def test_a_tokenizer_that_is_damaged(single):
    (single / "tokenizer.json").write_text("{")
    assert "transformers cannot load the tokenizer" in wrong(single, "tokenizer")


def test_a_chat_template_that_is_not_jinja(single):
    (single / "chat_template.jinja").write_text("{% for message in messages %}")
    assert "the chat template is not Jinja: line 1" in wrong(single, "chat template")


def test_outputs_that_are_not_finite(single):
    """Every weight is finite; what the model makes of them is not."""

    def grow(tensors):
        tensors["model.norm.weight"].fill_(1e38)
        tensors["lm_head.weight"].fill_(1e30)

    change_tensors(single, grow)
    assert checks(single)["values"].state == "ok"
    assert "outputs for a text of 8 tokens are not finite" in wrong(single, "forward")


# --- what is not looked at -----------------------------------------------------------------------


def test_a_type_that_transformers_does_not_know(single):
    tiny.edit_config(single, model_type="llamalike", architectures=None)
    found = checks(single)
    assert found["load"].state == SKIPPED
    assert "does not know llamalike models" in found["load"].detail
    assert found["values"].state == "ok"


def test_code_of_others_is_not_run(single):
    tiny.edit_config(single, model_type="odd", auto_map={"AutoModelForCausalLM": "odd.Odd"})
    (single / "odd.py").write_text("raise SystemExit(3)")
    found = checks(single)
    assert found["forward"].state == SKIPPED
    assert "--trust-remote-code" in found["forward"].detail


def test_what_is_mapped_is_run_however_little_memory_is_free(single, monkeypatch):
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": 1000})
    assert checks(single)["forward"].state == "ok"
    assert checks(single, forward=False)["forward"].state == SKIPPED
    tiny.edit_config(single, intermediate_size=80)
    assert "other shapes" in wrong(single, "load")


def test_what_is_rearranged_on_loading_and_does_not_fit_is_not_run(models, monkeypatch, tmp_path):
    """Experts become one tensor in memory: they cannot stay in their file."""
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": 1000})
    folder = tmp_path / "mixture"
    shutil.copytree(models("mixtral", num_local_experts=4), folder)
    found = checks(folder)
    assert found["load"].state == "ok"
    assert found["forward"].state == SKIPPED
    assert f"`moeforge verify {folder} --forward`" in found["forward"].detail


def test_another_dtype_in_memory_is_no_mapping(single, monkeypatch):
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": 1000})
    tiny.edit_config(single, dtype="bfloat16", torch_dtype=None)
    assert checks(single)["forward"].state == SKIPPED


def test_a_forward_that_is_asked_for_is_streamed(models, monkeypatch):
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {"cpu": 500_000})
    check = checks(models("mixtral", num_local_experts=4), forward=True)["forward"]
    assert check.state == "ok"
    assert f"{8 * tiny.VOCABULARY} outputs" in check.detail


# --- checkpoints without mistakes ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "dbrx", "gemma2", "gpt2", "mamba"])
def test_checkpoints_of_others_are_fine(kind, models):
    found = checks(models(kind, **zoo.ZOO[kind]))
    assert {name for name, check in found.items() if check.state != "ok"} == {"lock"}


def test_an_encoder_is_fine(tmp_path):
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=60)
    config.num_attention_heads = 2
    BertModel(config).save_pretrained(tmp_path)
    found = checks(tmp_path)
    assert found["load"].state == "ok"
    assert "all finite" in found["forward"].detail


@pytest.mark.parametrize(
    ("base", "home"), [("llama", "mixtral"), ("qwen3", "qwen3_moe"), ("opt", "remote")]
)
def test_mixtures_are_fine(base, home, models, tmp_path):
    config = {**zoo.ZOO[base], "use_sliding_window": False} if base == "qwen3" else zoo.ZOO[base]
    folders = [models(base, seed=seed, **config) for seed in (1, 2)]
    experts = [{"source_model": str(folder)} for folder in folders]
    recipe = {"base_model": str(folders[0]), "experts": experts, "gate_mode": "random"}
    result = moeforge.build({**recipe, "architecture": home}, tmp_path / "out")
    assert {check.name for check in result.verified.checks if check.state != "ok"} == set()


# --- builds --------------------------------------------------------------------------------------


def test_what_fails_is_not_published(llamas, models, tmp_path):
    """The config of the first input asks for tensors that no input has."""
    broken = models.copy(llamas[0], "lacks-a-norm")
    change_tensors(broken, lambda tensors: tensors.update({"x.weight": torch.ones(3)}))
    spans = [{"model": str(broken), "layer_range": [0, 2]}]
    recipe = {"slices": [{"sources": spans}], "merge_method": "passthrough"}
    with pytest.raises(BuildError, match=r"x\.weight(.|\n)*Nothing was published"):
        moeforge.build(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    moeforge.build(recipe, tmp_path / "out", verify=False)
    assert "x.weight" in load_file(tmp_path / "out" / WEIGHTS)


def test_what_inputs_lack_is_told_and_not_refused(llamas, models, tmp_path):
    broken = [models.copy(folder, f"more-{n}") for n, folder in enumerate(llamas[:2])]
    for folder in broken:
        change_tensors(folder, lambda tensors: tensors.update({"x.weight": torch.ones(3)}))
    inputs = [{"model": str(folder), "parameters": {"weight": 1}} for folder in broken]
    notes = []
    recipe = {"merge_method": "linear", "models": inputs}
    assert moeforge.build(recipe, tmp_path / "out", note=notes.append).verified.ok
    (told,) = [str(note) for note in notes if note.warning]
    assert "no place for 1 tensors, first x.weight; so it is in its inputs" in told


def test_the_command_checks_in_a_process_of_its_own(single):
    raw = bytearray((single / WEIGHTS).read_bytes())
    raw[-4:] = struct.pack("<f", float("nan"))
    (single / WEIGHTS).write_bytes(raw)
    command = [sys.executable, "-m", "moeforge", "verify", str(single), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 5
    assert "has 1 NaN" in done.stderr
    data = json.loads(done.stdout)
    assert not data["ok"]
    states = {check["name"]: check["state"] for check in data["checks"]}
    assert (states["values"], states["load"], states["tokenizer"]) == ("failed", "ok", "ok")
