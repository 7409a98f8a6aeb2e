"""Tokenizers of merges: which tokens, which ids, which rows, which files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import moeforge
from moeforge import vocabulary
from moeforge.errors import PlanError, SourceError
from moeforge.planners.model import Findings, from_source
from moeforge.planners.vocab import is_vocabulary, mismatch, plan_vocabulary
from moeforge.plans import Gather, Read, RowTable
from moeforge.recipe import Reference
from moeforge.recipe.vocabulary import Tokenizer as Settings
from moeforge.recipe.vocabulary import VocabularyKeys
from moeforge.sources.folder import FolderSource
from moeforge.vocabulary import chat, read

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def words(*tokens, added=()):
    """A word-level tokenizer of `tokens`, or of a mapping of tokens to ids."""
    vocabulary = tokens[0] if isinstance(tokens[0], dict) else {t: i for i, t in enumerate(tokens)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    tokenizer.add_tokens(list(added))
    return tokenizer


@pytest.fixture
def checkpoint(models, tmp_path):
    """Make a llama with these rows and this tokenizer in a folder of this name."""

    def make(name, rows, tokenizer, seed=0, model_type="llama", **config):
        special = {"bos_token_id": None, "eos_token_id": None, "vocab_size": rows}
        made = models(model_type, seed, with_tokenizer=False, **{**special, **config})
        folder = models.copy(made, str(tmp_path / name))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    return make


class Planned:
    """A vocabulary planned for checkpoints in folders; the first is the base."""

    def __init__(self, folders, settings=None, template=None):
        self.folders = folders
        self.models = [from_source(FolderSource(f.name, f)) for f in folders]
        entries = [Reference(model=f.name) for f in folders]
        self.findings, self.notes = Findings(), Findings()
        self.vocabulary = plan_vocabulary(
            None if settings is None else Settings.model_validate(settings),
            template,
            list(zip(entries, self.models, strict=True)),
            self.models[0],
            lambda entry, path: from_source(
                FolderSource(str(entry), folders[0].parent / str(entry))
            ),
            (),
            self.findings,
            self.notes,
        )

    def said(self):
        return "\n".join(map(str, [*self.findings, *self.notes]))

    def tensors(self, name=EMBED, of=None):
        return self.vocabulary.align([(model, name) for model in of or self.models])

    def rows(self, name=EMBED, of=None):
        """The aligned tensors as arrays, by a reading of the tables that is only plain."""
        arrays = {f.name: load_file(f / "model.safetensors") for f in self.folders}

        def value(expr):
            if isinstance(expr, Read):
                return arrays[expr.source][expr.name].double().numpy()
            assert isinstance(expr, Gather)
            inputs, table, out = [value(i) for i in expr.inputs], expr.table, []
            for source, row in zip(table.source.tolist(), table.row.tolist(), strict=True):
                if source == RowTable.ZERO:
                    out.append(np.zeros_like(inputs[0][0]))
                elif source == RowTable.MEAN:
                    out.append(np.mean([inputs[i][j] for i, j in table.means[row]], axis=0))
                else:
                    out.append(inputs[source][row])
            mean = np.mean(out, axis=0)
            return np.array(out + [mean] * table.padding)

        planned = self.tensors(name, of)
        for tensor, array in zip(planned, made := [value(t.expr) for t in planned], strict=True):
            assert tensor.spec.shape == array.shape
        return made

    def weights(self, index, name=EMBED):
        return load_file(self.folders[index] / "model.safetensors")[name].double().numpy()

    def write(self, tmp_path):
        from moeforge.output.folder import copy_companions

        out = tmp_path / "out"
        out.mkdir()
        copy_companions(self.folders[0], out)
        self.vocabulary.change.write(out)
        return out


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=0)


# --- which tokens, which ids ---------------------------------------------------------------------


def test_union_keeps_the_bases_ids_and_appends_the_others_in_order(checkpoint, tmp_path):
    special = AddedToken("<x>", lstrip=True, single_word=True, normalized=False)
    plan = Planned(
        [
            checkpoint("a", 4, words("<unk>", "one", "two", "three")),
            checkpoint("b", 6, words("<unk>", "zeta", "one", "alpha", added=[special, "late"])),
            checkpoint("c", 4, words("<unk>", "early", "zeta", "three")),
        ],
        {"source": "union"},
    )
    out = plan.write(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    expected = ["<unk>", "one", "two", "three", "zeta", "alpha", "<x>", "late", "early"]
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(expected)}
    assert tokenizer("zeta three early")["input_ids"] == [4, 3, 8]
    x = tokenizer.added_tokens_decoder[6]
    assert (x.content, x.lstrip, x.rstrip, x.single_word, x.normalized, x.special) == (
        "<x>", True, False, True, False, False,
    )  # fmt: skip
    assert 4 not in tokenizer.added_tokens_decoder, "ordinary tokens stay ordinary"
    assert plan.vocabulary.size == len(expected)
    assert plan.vocabulary.config(plan.models[0].config)["vocab_size"] == len(expected)


def test_the_first_settings_of_an_added_token_hold_and_others_are_noted(checkpoint, tmp_path):
    folders = [
        checkpoint("a", 3, words("<unk>", "one", added=[AddedToken("<x>", rstrip=True)])),
        checkpoint("b", 4, words("<unk>", "one", "two", added=[AddedToken("<x>", lstrip=True)])),
    ]
    plan = Planned(folders, {})
    x = AutoTokenizer.from_pretrained(plan.write(tmp_path)).added_tokens_decoder[2]
    assert (x.lstrip, x.rstrip) == (False, True)
    assert "b matches '<x>' in text in another way" in plan.said()


def test_what_any_model_adds_is_an_added_token_of_a_union_but_base_stays(checkpoint, tmp_path):
    folders = [
        checkpoint("a", 3, words("<unk>", "<x>", "one")),
        checkpoint("b", 3, words("<unk>", "one", added=[AddedToken("<x>", special=True)])),
    ]
    tokenizer = AutoTokenizer.from_pretrained(Planned(folders, {}).write(tmp_path))
    assert tokenizer("<x>one")["input_ids"] == [1, 2]
    base = Planned(folders, {"source": "base", "tokens": {"<y>": {}}}).vocabulary.change.tokens
    assert set(base.added) == {"<unk>", "<y>"}


def test_unigram_tokenizers_get_added_tokens_only(checkpoint, tmp_path):
    def unigram(*pieces, added=()):
        raw = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
        tokenizer.add_tokens(list(added))
        return tokenizer

    folders = [
        checkpoint("a", 3, unigram("<unk>", "x", "y")),
        checkpoint("b", 4, unigram("<unk>", "x", "y", added=["<b>"]), seed=2),
    ]
    plan = Planned(folders, {})
    same(plan.rows(), [[*plan.weights(0), plan.weights(1)[3]], plan.weights(1)])
    tokenizer = AutoTokenizer.from_pretrained(plan.write(tmp_path))
    assert tokenizer("x<b>y")["input_ids"] == [1, 3, 2]
    folders[1] = checkpoint("c", 4, unigram("<unk>", "x", "y", "z"))
    assert "a has a Unigram tokenizer, which cannot get other tokens" in Planned(folders, {}).said()


def bpe(*merges, added=()):
    """The byte-level tokenizer of tests/tiny.py with these merges."""
    tokenizer = tiny.tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    for left, right in merges:
        data["model"]["vocab"][left + right] = len(data["model"]["vocab"])
        data["model"]["merges"].append([left, right])
    raw = Tokenizer.from_str(json.dumps(data))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    return tokenizer


def test_union_of_bpe_brings_the_merges_that_make_the_new_tokens(checkpoint, tmp_path):
    other = bpe(("a", "b"), ("c", "d"), ("ab", "cd"), added=["<|im_start|>"])
    plan = Planned(
        [checkpoint("a", 259, bpe(("a", "b"))), checkpoint("b", 262, other)], {"source": "union"}
    )
    tokenizer = AutoTokenizer.from_pretrained(plan.write(tmp_path))
    text = "<|im_start|>abcd cd ab"
    found = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert found == other.convert_ids_to_tokens(other(text)["input_ids"])
    assert found == ["<s>", "<|im_start|>", "abcd", "Ġ", "cd", "Ġ", "ab"]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_tokens_that_only_the_config_names_are_where_transformers_adds_them(checkpoint):
    folder = checkpoint("a", 300, tiny.tokenizer())
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.update(pad_token="<pad>", extra_special_tokens=["<x>", "<y>"])
    path.write_text(json.dumps(config))
    assert read(folder, "a").ids == AutoTokenizer.from_pretrained(folder).get_vocab()
    settings = {"special": True, "lstrip": True, "rstrip": False, "single_word": False}
    entries = {"258": {"content": "<q>", "normalized": False, **settings}}
    path.write_text(json.dumps({**config, "added_tokens_decoder": entries}))
    loaded = AutoTokenizer.from_pretrained(folder)
    found = read(folder, "a")
    assert found.ids == loaded.get_vocab()
    assert found.added["<q>"]["lstrip"] is loaded.added_tokens_decoder[258].lstrip is True


def test_ids_are_the_same_in_every_process(checkpoint, tmp_path):
    many = [f"w{i}" for i in range(40)]
    checkpoint("a", 3, words("<unk>", "one", "two"))
    checkpoint("b", 41, words("<unk>", *many))
    checkpoint("c", 43, words("<unk>", *reversed(many), added=["<p>", "<q>"]))
    script = (
        "import sys, pathlib\n"
        "from test_vocab import Planned\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "plan = Planned([root / name for name in 'abc'], {'tokens': {'new': {}, 'newer': {}}})\n"
        "import json; print(json.dumps(plan.vocabulary.change.tokens.backend))"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    other = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    plan = Planned([tmp_path / name for name in "abc"], {"tokens": {"new": {}, "newer": {}}})
    assert other == json.dumps(plan.vocabulary.change.tokens.backend) + "\n"
    assert '"newer": 46' in other


# --- which rows ----------------------------------------------------------------------------------


@pytest.fixture
def three(checkpoint):
    """a: base; b and c share tokens that it lacks."""
    return [
        checkpoint("a", 4, words("<unk>", "one", "two", "three"), seed=1),
        checkpoint("b", 5, words("<unk>", "five", "one", "six", "two"), seed=2),
        checkpoint("c", 4, words("five", "<unk>", "three", "seven"), seed=3),
    ]


def expected(plan, name, tokens, base=0, of=(0, 1, 2)):
    """The rows by a loop over models and tokens, with vocabularies as transformers reads them."""
    vocabularies = [AutoTokenizer.from_pretrained(f).get_vocab() for f in plan.folders]
    weights = [plan.weights(i, name) for i in range(len(plan.folders))]
    result = []
    for model in of:
        rows = []
        for token in tokens:
            having = [i for i in of if token in vocabularies[i]]
            if model in having:
                rows.append(weights[model][vocabularies[model][token]])
            elif base in having:
                rows.append(weights[base][vocabularies[base][token]])
            elif having:
                rows.append(sum(weights[i][vocabularies[i][token]] for i in having) / len(having))
            else:
                rows.append(np.zeros(weights[0].shape[1:]))
        result.append(np.array(rows))
    return result


UNION = ["<unk>", "one", "two", "three", "five", "six", "seven"]


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_union_rows(three, name):
    plan = Planned(three, {"source": "union"})
    same(plan.rows(name), expected(plan, name, UNION))


def test_union_rows_of_a_tensor_that_the_base_is_no_input_of(three):
    plan = Planned(three, {"source": "union"})
    found = plan.rows(HEAD, of=plan.models[1:])
    same(found, expected(plan, HEAD, UNION, of=(1, 2)))
    same(plan.rows(HEAD, of=plan.models[2:]), expected(plan, HEAD, UNION, of=(2,)))
    assert "no model here has the tokens 'one', 'two', 'six': c" in plan.said()


def test_base_rows_and_the_base_stays_a_plain_copy(three):
    plan = Planned(three, {"source": "base"})
    same(plan.rows(), expected(plan, EMBED, UNION[:4]))
    assert plan.tensors()[0] is plan.models[0].tensors[EMBED]
    layer = "model.layers.0.mlp.up_proj.weight"
    assert plan.tensors(layer) == [model.tensors[layer] for model in plan.models]
    only_own = plan.tensors(of=plan.models[2:])[0].expr
    assert only_own.inputs == (plan.models[2].tensors[EMBED].expr,)


def test_rows_with_the_tokenizer_of_a_model_and_of_one_outside(three, checkpoint):
    plan = Planned(three, {"source": "c"})
    same(plan.rows(), expected(plan, EMBED, ["five", "<unk>", "three", "seven"]))
    checkpoint("outside", 3, words("six", "<unk>", "new"))
    plan = Planned(three, {"source": "outside"})
    same(plan.rows(), expected(plan, EMBED, ["six", "<unk>", "new"]))
    assert "no model here has the tokens 'new'" in plan.said()


def test_biases_and_tied_heads_follow(checkpoint):
    shared = {"partial_rotary_factor": 0.5}
    folders = [
        checkpoint("a", 3, words("<unk>", "one", "two"), seed=1, model_type="phi", **shared),
        checkpoint("b", 3, words("two", "<unk>", "nine"), seed=2, model_type="phi", **shared),
    ]
    plan = Planned(folders, {})
    vocabulary_tensors = [n for n in plan.models[0].tensors if is_vocabulary(plan.models[0], n)]
    assert vocabulary_tensors == [EMBED, "lm_head.bias", HEAD]
    tokens = ["<unk>", "one", "two", "nine"]
    same(plan.rows("lm_head.bias"), expected(plan, "lm_head.bias", tokens, of=(0, 1)))


def test_positions_and_token_types_have_no_vocabulary(checkpoint):
    folder = checkpoint("g", 40, words("<unk>"), model_type="gpt2", n_positions=40, n_embd=64)
    model = from_source(FolderSource("g", folder))
    assert [n for n in model.tensors if is_vocabulary(model, n)] == ["transformer.wte.weight"]


def test_chosen_sources_and_force(three):
    settings = {
        "source": "base",
        "tokens": {
            "two": {"source": {"kind": "zero"}},
            "three": {"source": "c", "force": True},
            "six": {"source": "b"},
            "x": {"source": {"kind": "model_token", "model": "b", "token": "five"}},
            "y": {"source": {"kind": "model_token", "model": "c", "token_id": 2}, "force": True},
            "one": {"force": True},
        },
    }
    plan = Planned(three, settings)
    a, b, c = (plan.weights(i) for i in range(3))
    zero = np.zeros(a.shape[1])
    # <unk>, one (the base's for all), two (zeros in c), three (c's for all), six, x, y
    same(
        plan.rows(),
        [
            [a[0], a[1], a[2], c[2], b[3], b[1], c[2]],
            [b[0], a[1], b[4], c[2], b[3], b[1], c[2]],
            [c[1], a[1], zero, c[2], b[3], b[1], c[2]],
        ],
    )
    assert not plan.notes


def test_a_forced_row_of_the_same_number_is_still_another_models(checkpoint):
    tokenizer = words("<unk>", "one", "two")
    folders = [checkpoint(name, 3, tokenizer, seed) for seed, name in enumerate("ab")]
    plan = Planned(folders, {"tokens": {token: {"force": True} for token in tokenizer.get_vocab()}})
    same(plan.rows(), [plan.weights(0), plan.weights(0)])


def test_sources_that_cannot_be(three):
    tokens = {"six": {"source": "c"}}
    assert "c does not have a row for 'six'" in Planned(three, {"tokens": tokens}).said()
    tokens = {"x": {"source": {"kind": "model_token", "model": "b", "token_id": 5}}}
    assert "b does not have row 5; it has 5 rows" in Planned(three, {"tokens": tokens}).said()
    tokens = {"x": {"source": "elsewhere"}}
    plan = Planned(three, {"tokens": tokens})
    assert "elsewhere is not one of the models" in plan.said()
    assert plan.findings[0].path == ("tokenizer", "tokens", "x", "source")
    plan = Planned(three, {"tokens": {"six": {"source": "b"}}})
    plan.tensors(of=plan.models[2:])
    assert "b, which the token 'six' comes from, is no input" in plan.findings[0].what


# --- where mergekit 0.1.5 crashes ----------------------------------------------------------------


def test_a_token_without_a_row_counts_as_lacking(checkpoint, tmp_path):
    plan = Planned(
        [
            checkpoint("a", 3, words("<unk>", "one", "two", added=["<x>", "<lost>"])),
            checkpoint("b", 4, words("<unk>", "one", "two", added=["<x>"]), seed=2),
        ],
        {"source": "union"},
    )
    a, b = plan.weights(0), plan.weights(1)
    same(plan.rows(), [[*a, b[3]], b])
    assert "its 3 rows do not reach '<x>', '<lost>'" not in plan.said()
    assert "its 3 rows do not reach '<lost>'" in plan.said()
    vocabulary = AutoTokenizer.from_pretrained(plan.write(tmp_path)).get_vocab()
    assert vocabulary == {"<unk>": 0, "one": 1, "two": 2, "<x>": 3}


def test_base_and_a_new_token(three, tmp_path):
    plan = Planned(three, {"source": "base", "tokens": {"<new>": {"source": {"kind": "zero"}}}})
    wanted = expected(plan, EMBED, [*UNION[:4], "<new>"])
    same(plan.rows(), wanted)
    tokenizer = AutoTokenizer.from_pretrained(plan.write(tmp_path))
    assert tokenizer("one<new>two")["input_ids"] == [1, 4, 2]


def test_vocabularies_with_gaps(checkpoint, tmp_path):
    gappy = words({"<unk>": 0, "one": 2, "two": 5, "far": 9}, added=())
    plan = Planned(
        [checkpoint("a", 12, gappy, seed=1), checkpoint("b", 3, words("<unk>", "far", "new"), 2)],
        {"source": "union"},
    )
    a, b = plan.weights(0), plan.weights(1)
    assert plan.vocabulary.size == 11
    from_a = [*a[:10], b[2]]
    same(plan.rows(), [from_a, [b[0], *a[1:9], b[1], b[2]]])
    vocabulary = AutoTokenizer.from_pretrained(plan.write(tmp_path)).get_vocab()
    assert vocabulary == {"<unk>": 0, "one": 2, "two": 5, "far": 9, "new": 10}


# --- padding -------------------------------------------------------------------------------------


def test_padding_rows_go_with_a_note_or_stay(checkpoint):
    folders = [checkpoint("a", 320, tiny.tokenizer(), 1), checkpoint("b", 320, tiny.tokenizer(), 2)]
    plan = Planned(folders, {"source": "base"})
    assert plan.vocabulary.size == 258
    same(plan.rows(), [plan.weights(0)[:258], plan.weights(1)[:258]])
    note = str(plan.notes[0])
    assert "a has 320 rows, the tokenizer 258 tokens: 62 padding rows go" in note
    assert "pad_to_multiple_of: 64} keeps them" in note
    kept = Planned(folders, {"source": "base", "pad_to_multiple_of": 64})
    assert kept.tensors() == [model.tensors[EMBED] for model in kept.models]
    assert not kept.notes


def test_padding_beyond_all_rows_is_their_mean(three):
    plan = Planned(three, {"source": "base", "pad_to_multiple_of": 3})
    assert plan.vocabulary.size == 6
    wanted = expected(plan, EMBED, UNION[:4])
    same(plan.rows(), [[*rows, *[np.mean(rows, axis=0)] * 2] for rows in wanted])
    assert plan.vocabulary.config(plan.models[0].config)["vocab_size"] == 6


# --- what is refused, what is said ---------------------------------------------------------------


def test_a_mismatch_names_rows_and_choices(three):
    models = [from_source(FolderSource(f.name, f)) for f in three]
    what, fix = mismatch(models)
    assert what == "the vocabularies differ: a has 4 rows, b has 5 rows, c has 4 rows"
    assert "{source: base}" in fix
    assert "{source: union}" in fix
    assert "{source: c}" in fix
    assert mismatch([models[0], models[2]]) is None


def test_tokens_of_another_spelling_have_no_union(checkpoint):
    folders = [checkpoint("a", 258, tiny.tokenizer()), checkpoint("b", 3, words("<unk>", "one"))]
    plan = Planned(folders, {"source": "union"})
    assert plan.vocabulary is None
    assert "b has a WordLevel tokenizer, a a byte-level BPE one" in plan.said()
    assert Planned(folders, {"source": "base"}).vocabulary is not None


@pytest.mark.parametrize(
    "text",
    [
        '{\n  "added_tokens": [],\n  "model": {\n    "vocab": {"a": 0}\n  }\n}',
        '{\n  "a": 1,\n  "model": {\n    "vocab": {}\n  },\n  "a": 2\n}\n',
        '{\n  "model": {"vocab": {}}}',
        '{\n  "model": {},\n  "model": {"a": 1}}',
        '{"inner": {\n  "model": {"vocab": {}}}}',
        '[{\n  "model": {}}]',
        '{"model": {"vocab": {}}, "text": "\\n  \\"model\\": {"}',
        '{"text": "\n  "model": {}}',
        '{\n  "model": {"vocab": {"a": 0}}',
        '{,\n  "model": {"vocab": {}}}',
    ],
)
def test_tokenizers_are_read_as_json_is(text, tmp_path):
    """Whatever the place of the model, which is read once for files that have the same."""

    def result(read):
        try:
            return read()
        except ValueError as error:
            return str(error)

    expected = result(lambda: json.loads(text))
    assert result(lambda: vocabulary._loaded(text)) == expected


def test_fine_tunes_share_what_they_have_in_common(tmp_path):
    words("<unk>", *"abc").save_pretrained(tmp_path / "one")
    words("<unk>", *"abc", added=["<x>"]).save_pretrained(tmp_path / "more")
    one, more = (read(tmp_path / name, name) for name in ("one", "more"))
    assert one.backend["model"] is more.backend["model"]
    assert (one.ids, more.ids) == ({"<unk>": 0, "a": 1, "b": 2, "c": 3}, {**one.ids, "<x>": 4})


def test_tokenizers_that_cannot_be_used(checkpoint, tmp_path):
    good = checkpoint("a", 4, words("<unk>", "one"))
    none = checkpoint("none", 5, None)
    assert "none has no tokenizer.json" in Planned([good, none], {}).said()
    alike = checkpoint("alike", 4, None)
    plan = Planned([good, alike], {})
    assert not plan.findings
    assert "it is taken to have that of a" in plan.said()
    for damaged in (none, alike):
        (damaged / "tokenizer.json").write_text("{]")
    assert "alike: tokenizer.json cannot be read" in str(Planned([good, alike], {}).findings)
    with pytest.raises(SourceError, match=r"none: tokenizer\.json cannot be read"):
        read(none, "none")
    (none / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(SourceError, match="has no vocabulary"):
        read(none, "none")
    with pytest.raises(SourceError, match="has no tokenizer"):
        read(None, "memory")


def test_an_older_tokenizer_without_tokenizer_json(checkpoint):
    folder = checkpoint("gpt2", 260, None)
    vocabulary = json.loads(tiny.tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps({**vocabulary, "ab": 258, "<|endoftext|>": 259}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    found = read(folder, "gpt2")
    assert found.ids == AutoTokenizer.from_pretrained(folder).get_vocab()
    assert found.ids["ab"] == 258


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokenizer": {}, "tokenizer_source": "base"}, "keep one of them"),
        ({"tokenizer": {"sources": "base"}}, 'did you mean "source"'),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "at least 1"),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "one"}}}}}, "zero or model_token"),
        *(
            ({"tokenizer": {"tokens": {"x": {"source": source}}}}, message)
            for source, message in [
                ({"kind": "model_token", "model": "a"}, "exactly one of token and token_id"),
                (
                    {"kind": "model_token", "model": "a", "token": "x", "token_id": 1},
                    "exactly one of token and token_id",
                ),
                ({"kind": "model_token", "token": "x"}, "required, but missing"),
                ({"model": "a", "token": "x"}, "needs kind: model_token"),
                ({"kind": "zero", "model": "a"}, "unknown key"),
            ]
        ),
    ],
)
def test_mistakes_in_the_recipe(keys, message):
    with pytest.raises(ValidationError, match=message):
        VocabularyKeys.model_validate(keys)


def test_both_ways_to_name_a_source():
    assert VocabularyKeys.model_validate({}).vocabulary is None
    for source in ("union", "base"):
        keys = VocabularyKeys.model_validate({"tokenizer_source": source})
        assert keys.vocabulary == Settings(source=source)
    keys = VocabularyKeys.model_validate({"tokenizer": {"source": "path@main"}})
    assert keys.vocabulary.source == Reference(model="path", revision="main")
    assert VocabularyKeys.model_validate({"tokenizer": {}}).vocabulary.source == "union"


# --- files ---------------------------------------------------------------------------------------


def test_a_tokenizer_that_stays_is_copied_byte_for_byte(three, tmp_path):
    out = Planned(three, {"source": "base"}).write(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (three[0] / name).read_bytes()


def test_a_new_tokenizer_leaves_no_older_files_that_say_otherwise(three, tmp_path):
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer.model"):
        (three[0] / name).write_text("{}")
    (three[0] / "special_tokens_map.json").write_text('{"unk_token": "<unk>"}')
    out = Planned(three, {"source": "union"}).write(tmp_path)
    files = {file.name for file in out.iterdir()}
    kept = {"special_tokens_map.json", "generation_config.json"}
    assert files == {"tokenizer.json", "tokenizer_config.json", *kept}


def test_a_models_tokenizer_replaces_the_bases_files_and_special_ids_move(checkpoint, tmp_path):
    base = checkpoint("a", 5, words("<unk>", "<eos>", "one", "two", "<end>"), eos_token_id=[1, 4])
    (base / "generation_config.json").write_text('{"eos_token_id": 4, "pad_token_id": 1}')
    (base / "added_tokens.json").write_text('{"stale": 99}')
    (base / "merges.txt").write_text("stale")
    (base / "chat_template.jinja").write_text("stale")
    other = words("one", "<unk>", "two", "<eos>")
    other.eos_token = "<eos>"
    folders = [base, checkpoint("b", 4, other)]
    plan = Planned(folders, {"source": "b"})
    out = plan.write(tmp_path)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == other.get_vocab()
    files = {file.name for file in out.iterdir()}
    assert files == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    # <end> is not there: what ends a text in the new tokenizer stands in
    assert plan.vocabulary.config(plan.models[0].config)["eos_token_id"] == [3]
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 3, "pad_token_id": 3}
    assert "eos_token_id is [1, 4] in the config.json of a\n    It becomes [3]." in plan.said()
    assert "pad_token_id is 1 in the generation_config.json of a" in plan.said()


def test_special_tokens_that_move_take_the_post_processor_along(checkpoint, tmp_path):
    """The base's <s> has no row, another model's has: it comes back under another id."""
    base = bpe(("a", "b"))
    data = json.loads(base.backend_tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    vocabulary["ab"], vocabulary["<s>"] = vocabulary["<s>"], vocabulary["ab"]
    data["added_tokens"][0]["id"] = 258
    data["added_tokens"].sort(key=lambda entry: entry["id"])
    data["post_processor"]["special_tokens"]["<s>"]["ids"] = [258]
    raw = Tokenizer.from_str(json.dumps(data))
    base = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    folders = [checkpoint("a", 258, base), checkpoint("b", 261, bpe(("q", "r"), ("x", "y")))]
    assert base("ab")["input_ids"] == [258, 256]
    out = Planned(folders, {}).write(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    start = tokenizer.get_vocab()["<s>"]
    assert tokenizer("ab")["input_ids"] == [start, 256]
    assert Planned(folders, {"source": "base"}).vocabulary is None, "no text could start"


# --- chat templates ------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "alpaca": "### Instruction:\nHi\n\n### Response:\nYo</s>\n\n### Instruction:\nBye\n\n"
    "### Response:\n",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Yo[|endofturn|]\n[|user|]Bye\n"
    "[|assistant|]",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Hi [/INST] Yo</s>[INST] Bye [/INST]",
}


def test_every_built_in_template_has_an_expected_text():
    assert set(chat.names()) == set(RENDERED)


@pytest.mark.parametrize("name", RENDERED)
def test_built_in_templates(checkpoint, tmp_path, name):
    folder = checkpoint("a", 258, tiny.tokenizer())
    out = Planned([folder], template=name).write(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == RENDERED[name]
    in_config = json.loads((out / "tokenizer_config.json").read_text())["chat_template"]
    assert in_config == (out / "chat_template.jinja").read_text()
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_auto_takes_the_most_common_template(checkpoint, tmp_path):
    folders = [checkpoint(name, 258, tiny.tokenizer()) for name in "abcd"]
    (folders[1] / "chat_template.jinja").write_text("{{ 'B' }}\n")
    for folder, value in ((folders[2], "{{ 'C' }}"), (folders[3], " {{ 'C' }} ")):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": value}))
    out = Planned(folders, template="auto").write(tmp_path)
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(CHAT, tokenize=False) == "C"
    first = Planned(folders[:3], template="auto").vocabulary.change.chat_template
    assert first == "{{ 'B' }}", "the first of equally common ones"
    assert Planned(folders[:1], template="auto").vocabulary is None


def test_literal_templates_are_checked_at_once(checkpoint):
    folder = checkpoint("a", 258, tiny.tokenizer())
    assert Planned([folder], template="{{ x }}").vocabulary.change.chat_template == "{{ x }}"
    for template, message in [
        ("{% for m in messages %}", "not valid Jinja: line 1"),
        ("chatlm", 'chat_template "chatlm" is neither'),
    ]:
        plan = Planned([folder], template=template)
        assert plan.vocabulary is None
        assert message in plan.said()
        assert plan.findings[0].path == ("chat_template",)
    generation = "{% generation %}{{ x }}{% endgeneration %}"
    assert Planned([folder], template=generation).vocabulary is not None


def test_a_template_needs_a_tokenizer(checkpoint):
    plan = Planned([checkpoint("a", 4, None)], template="chatml")
    assert "chat_template needs a tokenizer, and a has none" in plan.said()


def test_a_template_and_a_tokenizer_together(three, tmp_path):
    out = Planned(three, {"source": "union"}, "chatml").write(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == chat.built_in("chatml")
    assert len(tokenizer.get_vocab()) == len(UNION)


# --- whole builds --------------------------------------------------------------------------------


def built(recipe, tmp_path):
    """Build; return the tensors, the tokenizer and the config of the output, which must load."""
    out = tmp_path / "built"
    moeforge.build(recipe, out, overwrite=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([sorted(tokenizer.get_vocab().values())])
    assert torch.isfinite(model(ids).logits).all()
    assert model(ids).logits.shape[-1] == model.config.vocab_size
    tensors = {n: t.double().numpy() for n, t in load_file(out / "model.safetensors").items()}
    return tensors, tokenizer, json.loads((out / "config.json").read_text())


def linear(folders, weights, **keys):
    inputs = [
        {"model": str(f), "parameters": {"weight": w}}
        for f, w in zip(folders, weights, strict=True)
    ]
    base = {"base_model": str(folders[0])}
    return {"merge_method": "linear", "models": inputs, **base, "dtype": "float64", **keys}


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_build_a_union(three, tmp_path):
    weights = (0.5, 0.3, 0.2)
    recipe = linear(three, weights, tokenizer={"source": "union", "pad_to_multiple_of": 4})
    tensors, tokenizer, config = built(recipe, tmp_path)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(UNION)}
    assert config["vocab_size"] == 8
    plan = Planned(three, {})
    for name in (EMBED, HEAD):
        aligned = [[*rows, rows.mean(axis=0)] for rows in expected(plan, name, UNION)]
        close(tensors[name], sum(w * np.array(a) for w, a in zip(weights, aligned, strict=True)))
    layer = "model.layers.1.mlp.up_proj.weight"
    close(tensors[layer], sum(w * plan.weights(i, layer) for i, w in enumerate(weights)))


def test_build_with_the_short_key_and_a_template(three, tmp_path):
    recipe = linear(three, (1, 0, 0), tokenizer_source="base", chat_template="llama3")
    tensors, tokenizer, _ = built(recipe, tmp_path)
    plan = Planned(three, {})
    close(tensors[EMBED], plan.weights(0))
    assert tokenizer.chat_template == chat.built_in("llama3")


def test_build_a_stack_of_two_vocabularies(three, tmp_path):
    slices = [
        {"sources": [{"model": str(three[0]), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(three[1]), "layer_range": [1, 4]}]},
    ]
    recipe = {"slices": slices, "tokenizer": {"source": "union"}}
    tensors, tokenizer, config = built(recipe, tmp_path)
    tokens = ["<unk>", "one", "two", "three", "five", "six"]
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(tokens)}
    assert (config["vocab_size"], config["num_hidden_layers"]) == (6, 5)
    plan = Planned(three[:2], {})
    close(tensors[EMBED], expected(plan, EMBED, tokens, of=(0,))[0])
    close(tensors[HEAD], expected(plan, HEAD, tokens, of=(1,))[0])


def test_build_of_a_recipe_in_a_recipe_with_vocabularies_of_their_own(three, tmp_path):
    inner = linear(three[:2], (0.5, 0.5), tokenizer={"source": "union"}, chat_template="chatml")
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": inner, "parameters": {"weight": 0.5}},
            {"model": str(three[2]), "parameters": {"weight": 0.5}},
        ],
        "dtype": "float64",
        "tokenizer": {"source": "union"},
    }
    tensors, tokenizer, _ = built(recipe, tmp_path)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(UNION)}
    assert tokenizer.chat_template == chat.built_in("chatml")
    plan = Planned(three, {})
    first = sum(expected(plan, EMBED, UNION[:6], of=(0, 1))) / 2
    c = plan.weights(2)  # five, <unk>, three, seven
    one = [*first, c[3]]
    other = [c[1], first[1], first[2], c[2], c[0], first[5], c[3]]
    close(tensors[EMBED], (np.array(one) + np.array(other)) / 2)
    alone = {**recipe, "models": recipe["models"][:1]}
    del alone["tokenizer"]
    _, tokenizer, config = built(alone, tmp_path)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(UNION[:6])}
    assert config["vocab_size"] == 6


def test_build_of_tied_and_untied_models(checkpoint, tmp_path):
    tied = checkpoint("a", 3, words("<unk>", "one", "two"), 1, tie_word_embeddings=True)
    own = checkpoint("b", 3, words("two", "<unk>", "nine"), 2)
    folders, tokens = [tied, own], ["<unk>", "one", "two", "nine"]
    tensors, _, config = built(linear(folders, (0.5, 0.5), tokenizer={}), tmp_path)
    assert config["tie_word_embeddings"] is False
    a, b = load_file(tied / "model.safetensors")[EMBED], load_file(own / "model.safetensors")[HEAD]
    a, b = a.double().numpy(), b.double().numpy()
    assert len(tensors[HEAD]) == len(tokens)
    close(tensors[HEAD], [(a[0] + b[1]) / 2, a[1], (a[2] + b[0]) / 2, b[2]])


def test_build_without_a_choice_says_which_there_are(three, tmp_path):
    with pytest.raises(PlanError) as caught:
        moeforge.build(linear(three, (1, 1, 1)), tmp_path / "out")
    said = str(caught.value)
    assert f"{three[0]} has 4 rows, {three[1]} has 5 rows" in said
    assert "tokenizer: {source: base}" in said


def test_build_with_only_a_template_copies_everything_else(checkpoint, tmp_path):
    folder = checkpoint("a", 300, tiny.tokenizer())
    out = tmp_path / "out"
    recipe = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    moeforge.build({**recipe, "chat_template": "{{ messages[0].content }}"}, out)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert (out / "model.safetensors").stat().st_size > 300 * tiny.HIDDEN
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "Hi"
    with pytest.raises(PlanError, match="not valid Jinja"):
        moeforge.build({**recipe, "chat_template": "{% if %}"}, out, overwrite=True)
