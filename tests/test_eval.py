"""Models side by side on text: against cross entropies computed here, one position at a time."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys

import pytest
import tiny
import torch
import zoo
from hub_server import HubServer
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as algorithms
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from moeforge import forge
from moeforge.errors import BuildError, SourceError
from moeforge.eval_tables import comparison_json, comparison_tables
from moeforge.proof import perplexity
from moeforge.proof.perplexity import compare

WINDOW = 32
TEXT = "Die Wörter, the other thing; and what they cost: 12 €. " * 3


def by_hand(folder, text, code=False, dtype=torch.float32):
    """Nats and number of tokens predicted: windows one after the other, no token left out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=code)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = start + ids
    nats, tokens = 0.0, 0
    for place in range(len(start) or 1, len(ids), WINDOW - 1):
        wanted = ids[place : place + WINDOW - 1]
        row = (start or ids[place - 1 : place]) + wanted
        with torch.no_grad():
            logits = model.eval()(torch.tensor([row])).logits[0].double()
        for position, token in enumerate(wanted):
            nats -= float(torch.log_softmax(logits[position], -1)[token])
        tokens += len(wanted)
    return nats, tokens


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(folders, *texts, **options):
    return compare(list(map(str, folders)), list(texts), window=WINDOW, **options)


def score(folder, text, **options):
    return run([folder], text, **options).models[0].scores[0]


def close_to(found, expected):
    assert [(s.tokens, s.nbytes) for s in found] == [(s.tokens, s.nbytes) for s in expected]
    assert [s.nats for s in found] == pytest.approx([s.nats for s in expected], rel=1e-6)


def shown(comparison):
    console = Console(width=200, record=True, file=io.StringIO())
    for part in comparison_tables(comparison):
        console.print(part)
    return console.export_text(styles=True)


def with_tokenizer(models, tmp_path, name, tokenizer, **config):
    folder = models.copy(models("llama", with_tokenizer=False, **config), str(tmp_path / name))
    tokenizer.save_pretrained(folder)
    return folder


def merging(*merges, **special):
    """A byte-level tokenizer that merges pairs."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*bytes_, *special.values(), *("".join(pair) for pair in merges)]
    raw = Tokenizer(algorithms.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def mixture(models, tmp_path, kind, architecture):
    folders = [models(kind, seed=seed, **zoo.ZOO.get(kind, {})) for seed in (1, 2, 3)]
    experts = [{"source_model": str(folder)} for folder in folders[1:]]
    recipe = {"base_model": str(folders[0]), "experts": experts, "gate_mode": "random"}
    forge.build({**recipe, "architecture": architecture}, tmp_path / "out")
    return tmp_path / "out"


# --- numbers -------------------------------------------------------------------------------------


def test_every_byte_is_predicted(llamas, text):
    found = score(llamas[0], text)
    nats, tokens = by_hand(llamas[0], TEXT)
    size = len(TEXT.encode())
    assert tokens == found.tokens == found.nbytes == size, "a token is a byte, BOS comes before"
    assert size % (WINDOW - 1), "the last window must be shorter for this test to say something"
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.loss == pytest.approx(nats / size, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / size), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / size / math.log(2), rel=1e-5)


@pytest.mark.parametrize(("first", "unpredicted"), [("D", 1), ("Ö", 2)])
def test_without_bos_all_but_the_first_token_is_predicted(
    models, tmp_path, text, first, unpredicted
):
    folder = with_tokenizer(models, tmp_path, "no-bos", merging())
    text.write_text(first + TEXT[1:], encoding="utf-8")
    found = score(folder, text)
    nats, tokens = by_hand(folder, first + TEXT[1:])
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.tokens == tokens == len((first + TEXT[1:]).encode()) - 1
    assert found.nbytes == len((first + TEXT[1:]).encode()) - unpredicted, "whole characters"


def test_means_count_every_text_the_same(llamas, tmp_path, text):
    short = tmp_path / "short.txt"
    short.write_text("hello", encoding="utf-8")
    told = []
    (found,) = run(llamas[:1], text, short, progress=lambda *what: told.append(what)).models
    parts = [by_hand(llamas[0], words) for words in (TEXT, "hello")]
    mean = sum(nats / tokens for nats, tokens in parts) / 2
    assert found.loss == pytest.approx(mean, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(mean / math.log(2), rel=1e-5)
    windows = math.ceil(len(TEXT.encode()) / (WINDOW - 1)) + 1
    assert told[0] == (str(llamas[0]), 0, windows)
    assert told[-1] == (str(llamas[0]), windows, windows)


def test_models_stand_in_the_order_given(llamas, text):
    comparison = run([llamas[1], llamas[0]], text)
    assert [each.model for each in comparison.models] == [str(llamas[1]), str(llamas[0])]
    for folder, each in zip((llamas[1], llamas[0]), comparison.models, strict=True):
        assert each.scores[0].nats == pytest.approx(by_hand(folder, TEXT)[0], rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "architecture"), [("llama", "mixtral"), ("gemma2", "remote"), ("gpt2", "remote")]
)
def test_mixtures_in_memory_and_streamed(models, tmp_path, text, kind, architecture):
    folder = mixture(models, tmp_path, kind, architecture)
    size = (folder / "model.safetensors").stat().st_size
    whole = run([folder], text)
    nats, _ = by_hand(folder, TEXT, code=architecture == "remote")
    assert whole.models[0].scores[0].nats == pytest.approx(nats, rel=1e-5)
    streamed = run([folder], text, memory=int(0.6 * size))
    assert (whole.models[0].streamed, streamed.models[0].streamed) == (False, True)
    close_to(streamed.models[0].scores, whole.models[0].scores)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_dense_models_streamed(models, text, kind, dtype):
    folder = models(kind, dtype=torch.bfloat16, shard_size="200KB", **zoo.ZOO.get(kind, {}))
    whole = run([folder], text, dtype=dtype).models[0]
    streamed = run([folder], text, dtype=dtype, memory=150_000).models[0]
    assert (whole.streamed, streamed.streamed) == (False, True)
    close_to(streamed.scores, whole.scores)
    assert streamed.dtype == whole.dtype == ("bfloat16" if dtype == "auto" else "float32")


def test_dtypes_are_the_stored_ones_unless_told(models, text):
    half, full = models("llama", dtype=torch.bfloat16), models("llama")
    stored = run([half, full], text)
    assert [each.dtype for each in stored.models] == ["bfloat16", "float32"]
    assert stored.models[0].scores[0].nats == pytest.approx(
        by_hand(half, TEXT, dtype=torch.bfloat16)[0], rel=1e-4
    )
    assert ["--dtype float32" in str(note) for note in stored.notes] == [True]
    wide = run([half, full], text, dtype="float32")
    assert [each.dtype for each in wide.models] == ["float32", "float32"]
    assert not wide.notes
    assert wide.models[0].scores[0].nats == pytest.approx(by_hand(half, TEXT)[0], rel=1e-5)


# --- tokenizers ----------------------------------------------------------------------------------


def test_other_tokens_compare_in_bits_per_byte_only(models, llamas, tmp_path, text):
    merged = merging(("t", "h"), ("th", "e"), bos_token="<s>")
    other = with_tokenizer(models, tmp_path, "merged", merged)
    comparison = run([llamas[0], other], text)
    assert not comparison.same_tokens
    first, second = (each.scores[0] for each in comparison.models)
    assert first.tokens > second.tokens
    assert first.nbytes == second.nbytes == len(TEXT.encode())
    nats, tokens = by_hand(other, TEXT)
    assert second.tokens == tokens
    assert second.bits_per_byte == pytest.approx(nats / math.log(2) / second.nbytes, rel=1e-5)
    loss, perplexities, bits = re.split(r"\n(?=Perplexity|Bits)", shown(comparison))
    for part in (loss, perplexities):
        assert "not comparable: the models' tokens differ" in part
        assert not re.search(r"\x1b\[1m[\d,.]+", part), "no ranking"
    assert "lower is better" in bits
    lowest = min(each.bits_per_byte for each in comparison.models)
    assert re.findall(r"\x1b\[1m([\d.]+)", bits) == [f"{lowest:.3f}"]


def test_a_tokenizer_with_more_tokens_may_cut_the_text_alike(models, llamas, tmp_path, text):
    more = tiny.tokenizer()
    more.add_tokens(["<|chat|>"])
    comparison = run([llamas[0], with_tokenizer(models, tmp_path, "more", more)], text)
    assert comparison.same_tokens
    lowest = min(each.loss for each in comparison.models)
    loss = shown(comparison).partition("Perplexity")[0]
    assert re.findall(r"\x1b\[1m([\d.]+)", loss) == [f"{lowest:.3f}"]


def test_without_bos_a_token_less_is_predicted(models, llamas, tmp_path, text):
    assert not run([llamas[0], with_tokenizer(models, tmp_path, "no", merging())], text).same_tokens


def test_unknown_text_is_said(models, tmp_path, text):
    known = {"<unk>": 0, "the": 1, "other": 2}
    raw = Tokenizer(algorithms.WordLevel(known, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    (note,) = run([with_tokenizer(models, tmp_path, "words", words)], text).notes
    assert note.warning
    assert "too low" in note.fix


def test_json_has_everything(llamas, text):
    comparison = run(llamas[:2], text)
    data = json.loads(json.dumps(comparison_json(comparison), allow_nan=False))
    assert (data["window"], data["same_tokens"], data["notes"]) == (WINDOW, True, [])
    for folder, each in zip(llamas, data["models"], strict=False):
        nats, tokens = by_hand(folder, TEXT)
        assert each["model"] == str(folder)
        assert (each["dtype"], each["streamed"]) == ("float32", False)
        found = each["texts"][str(text)]
        assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert (found["tokens"], found["bytes"]) == (tokens, len(TEXT.encode()))
        assert each["mean"] == {k: found[k] for k in ("loss", "perplexity", "bits_per_byte")}


# --- refused before a model is loaded ------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(perplexity, "loaded", load)


def refused(kind, folders, *texts, **options):
    with pytest.raises(kind) as caught:
        run(folders, *texts, **options)
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.usefixtures("unloaded")
def test_texts_that_cannot_be_used(llamas, tmp_path, text):
    latin, empty, absent = (tmp_path / name for name in ("latin.txt", "empty.txt", "absent.txt"))
    latin.write_bytes(TEXT.encode("latin-1", "replace"))
    empty.touch()
    said = refused(BuildError, llamas[:1], latin, empty, absent, text)
    place = TEXT.index("ö")
    assert f"{latin} is not UTF-8: byte {place} is 0xf6" in said
    assert f"{absent} cannot be read: No such file" in said
    assert f"{empty} is too short" in said


@pytest.mark.usefixtures("unloaded")
def test_models_that_cannot_be_used(models, tmp_path, text):
    classifier = models.copy(models("llama"), str(tmp_path / "classifier"))
    tiny.edit_config(classifier, architectures=["LlamaForSequenceClassification"])
    dumb = models("llama", with_tokenizer=False)
    t5 = models.copy(models("llama"), str(tmp_path / "t5"))
    tiny.edit_config(t5, model_type="t5", architectures=["T5ForConditionalGeneration"])
    few = models.copy(models("llama"), str(tmp_path / "few"))
    tiny.edit_config(few, vocab_size=200)
    short = models("llama", max_position_embeddings=16)
    said = refused(SourceError, [classifier, dumb, t5, few, short], text)
    assert f"{classifier} is a LlamaForSequenceClassification, not a causal" in said
    assert f"{dumb} has no tokenizer" in said
    assert f"{t5} is a t5 model" in said
    assert f"{few}: its tokenizer makes token" in said
    assert "it has 200 embedding rows" in said
    assert f"{short} takes at most 16 tokens, and windows have {WINDOW}" in said
    assert "Give --window 16." in said


@pytest.mark.usefixtures("unloaded")
def test_code_that_is_not_ours_does_not_run(models, tmp_path, text):
    folder = mixture(models, tmp_path, "gemma2", "remote")
    code = folder / "modeling_moeforge.py"
    marker = tmp_path / "it-ran"
    code.write_text(code.read_text() + f"\nopen({str(marker)!r}, 'w')\n")
    assert "give --trust-remote-code" in refused(SourceError, [folder], text)
    assert not marker.exists()


def test_code_that_is_trusted_runs(models, tmp_path, text):
    folder = mixture(models, tmp_path, "gemma2", "remote")
    expected = score(folder, text)
    code = folder / "modeling_moeforge.py"
    code.write_text(code.read_text() + "\n# changed\n")
    assert score(folder, text, trust_remote_code=True) == expected


# --- refused when loaded or run ------------------------------------------------------------------


def test_a_model_that_lacks_a_tensor(models, tmp_path, text):
    folder = models.copy(models("llama"), str(tmp_path / "gap"))
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert f"first {lost}" in refused(BuildError, [folder], text)


def test_a_tensor_that_nothing_uses_is_said(models, tmp_path, text):
    folder = models.copy(models("llama"), str(tmp_path / "more"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (note,) = run([folder], text).notes
    assert "q_norm" in note.what


def test_a_model_that_computes_nan(models, tmp_path, text):
    folder = models.copy(models("llama"), str(tmp_path / "nan"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "computes NaN" in refused(BuildError, [folder], text)


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_bert_that_looks_ahead(models, tmp_path, text, is_decoder):
    plain = {"num_key_value_heads": None, "architectures": ["BertLMHeadModel"]}
    made = models("bert", **plain, is_decoder=is_decoder)
    folder = models.copy(made, str(tmp_path / "bert"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("LayerNorm.weight"):
            tensor.fill_(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if is_decoder:
        assert score(folder, text).nats == pytest.approx(by_hand(folder, TEXT)[0], rel=1e-5)
    else:
        assert "sees the tokens" in refused(BuildError, [folder], text)


def test_a_model_from_the_hub(models, text, tmp_path):
    folder = models("llama")
    script = (
        "import json, sys; from pathlib import Path\n"
        "from moeforge.proof.perplexity import compare\n"
        "from moeforge.eval_tables import comparison_json\n"
        f"found = compare(['me/tiny'], [Path(sys.argv[1])], window={WINDOW})\n"
        "print(json.dumps(comparison_json(found)))"
    )
    with HubServer() as hub:
        hub.add("me/tiny", {file.name: file.read_bytes() for file in folder.iterdir()})
        command = [sys.executable, "-c", script, str(text)]
        ran = subprocess.run(
            command, env=hub.env(tmp_path / "home"), capture_output=True, text=True
        )
    assert ran.returncode == 0, ran.stderr
    (found,) = json.loads(ran.stdout)["models"]
    assert found["texts"][str(text)]["loss"] == pytest.approx(score(folder, text).loss, rel=1e-6)
