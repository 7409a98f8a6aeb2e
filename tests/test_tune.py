"""Routers learn what they can learn, and nothing else changes.

The mixture is made so that the right router is known: expert `A` makes every token predict "A",
expert `B` makes it predict "B"; text of one kind is "pApApA…", of the other "qBqBqB…". So "p" must
go to the first and "q" to the second; at the start they go the other way round.
"""

import dataclasses
import hashlib
import json
import math
import random
import shutil

import pytest
import tiny
import torch
import yaml
from blake3 import blake3
from documented import hold
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import moeforge
from moeforge.cli import app
from moeforge.errors import BuildError, MoeforgeError, SourceError
from moeforge.output.lock import read_lock
from moeforge.output.locked import built
from moeforge.prepare import prepare
from moeforge.proof.heldout import load_output
from moeforge.recipe.tuning import problems
from moeforge.routing import Router, recording, routers
from moeforge.tuning import Tuning, data, memory, tune, tune_built, write
from moeforge.tuning.objective import balance_loss
from moeforge.tuning.tables import step_line, tuned_json, tuned_markdown, tuned_table, verdict
from moeforge.tuning.teachers import Lessons, open_teachers
from moeforge.tuning.train import Trainer, learning_rate

P, Q, A, B = ("pqAB".index(letter) for letter in "pqAB")
ONE, OWN = 0, {"p": 3, "q": 4}
"""Coordinates: all tokens have the first, "p" and "q" one of their own."""
ANSWER = {"A": 1, "B": 2}
"""Coordinates that experts write to, and the head reads."""
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"
FAST = {"steps": 40, "learning_rate": 0.05, "batch": 4}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def dense(folder, answer):
    """A llama of one layer, without attention, that predicts `answer` after every token."""
    shape = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**{**tiny.SHAPE, **shape}))
    word = {letter: tiny.tokenizer()(letter).input_ids[-1] for letter in "pqAB"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        embeddings[:, ONE] = 1
        for letter, place in OWN.items():
            embeddings[word[letter], place] = 1
        for letter, place in ANSWER.items():
            head[word[letter], place] = 1
        mlp = model.model.layers[0].mlp
        mlp.gate_proj.weight[0, ONE] = mlp.up_proj.weight[0, ONE] = 1
        mlp.down_proj.weight[ANSWER[answer], 0] = 1
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def set_router(folder, weight, name=ROUTER):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, name: weight.to(tensors[name].dtype)}, file, metadata={"format": "pt"})


def router(strength):
    """The router that sends "p" to A and "q" to B so strongly; wrong where it is negative."""
    weight = torch.zeros(2, tiny.HIDDEN)
    weight[0, OWN["p"]] = weight[1, OWN["q"]] = strength
    weight[1, OWN["p"]] = weight[0, OWN["q"]] = -strength
    return weight


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with experts `A` and `B`, texts, and mixtures `two` and `one` of them."""
    root = tmp_path_factory.mktemp("tune")
    for answer in "AB":
        dense(root / answer, answer)
    (root / "p.txt").write_text("pA" * 200, encoding="utf-8")
    (root / "q.txt").write_text("qB" * 200, encoding="utf-8")
    (root / "heldout.txt").write_text("pA" * 31 + "qB" * 31, encoding="utf-8")
    for name, per_token in (("two", 2), ("one", 1)):
        recipe = {
            "base_model": str(root / "A"),
            "experts": [{"source_model": str(root / answer)} for answer in "AB"],
            "experts_per_token": per_token,
            "architecture": "mixtral",
            "gate_mode": "random",
        }
        moeforge.build(recipe, root / name)
        set_router(root / name, router(-0.2))
    return root


def settings(root, **changes):
    texts = [str(root / name) for name in ("p.txt", "q.txt")]
    return Tuning(**{"text": texts, "window": 16, **FAST, **changes})


def loss(folder, text, window=16):
    """Mean cross entropy on `text`, window by window, from the definition."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tiny.tokenizer()(text, add_special_tokens=False).input_ids
    total, count = 0.0, 0
    for start in range(0, len(ids), window - 1):
        row = [256, *ids[start : start + window - 1]]
        with torch.no_grad():
            chances = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        total -= sum(float(chances[i, token]) for i, token in enumerate(row[1:]))
        count += len(row) - 1
    return total / count


def others(folder, changed):
    return {n: t for n, t in load_file(folder / "model.safetensors").items() if n not in changed}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- what is learned ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["two", "one"])
def test_the_right_router_is_found(made, tmp_path, name):
    right = tmp_path / "right"
    moeforge_copy(made / name, right)
    set_router(right, router(3.0))
    heldout = (made / "heldout.txt").read_text()
    wrong, best = loss(made / name, heldout), loss(right, heldout)
    assert best < wrong - 0.1, "the example has nothing to learn"
    tuned = tune(made / name, tmp_path / "out", settings(made, heldout=str(made / "heldout.txt")))
    assert tuned.start == pytest.approx(wrong, abs=1e-4)
    assert tuned.best == pytest.approx(loss(tmp_path / "out", heldout), abs=1e-4)
    assert tuned.best < wrong - 0.7 * (wrong - best)
    weight = load_file(tmp_path / "out" / "model.safetensors")[ROUTER]
    assert weight[0, OWN["p"]] > weight[1, OWN["p"]]
    assert weight[1, OWN["q"]] > weight[0, OWN["q"]]


def moeforge_copy(folder, target):
    target.mkdir()
    write.copy_checkpoint(folder, target)


def test_dense_experts_teach_what_they_know(made, tmp_path):
    names = [str(made / answer) for answer in "AB"]
    tuned = tune(made / "two", tmp_path / "out", settings(made, teach=1.0), teachers=names)
    documents = tuned.documents[0]
    assert tuned.teachers[names[0]] > 0 < tuned.teachers[names[1]]
    assert sum(tuned.teachers.values()) == documents
    assert tuned.best < tuned.start - 0.05
    weight = load_file(tmp_path / "out" / "model.safetensors")[ROUTER]
    assert weight[0, OWN["p"]] > weight[1, OWN["p"]]


def test_teachers_are_asked_for_the_documents_they_know(made):
    tokens = tiny.tokenizer()
    documents = [tuple(tokens(text).input_ids) for text in ("pApA", "qBqBqB", "pA")]
    teachers = open_teachers([str(made / answer) for answer in "AB"], made / "two")
    lessons = Lessons(teachers, dict(enumerate(documents)), tiny.VOCABULARY)
    assert {number: label[-1] for number, label in lessons.best.items()} == {0: "A", 1: "B", 2: "A"}
    batch = data.together(documents, [2, 1])
    expert = AutoModelForCausalLM.from_pretrained(made / "B", dtype=torch.float32)
    with torch.no_grad():
        said = expert(torch.tensor([documents[1]])).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(lessons(batch)[2:], said, atol=5e-3, rtol=0)


# --- what stays -----------------------------------------------------------------------------------
def test_only_routers_change(made, tmp_path):
    before = digest(made / "two" / "model.safetensors")
    tuned = tune(made / "two", tmp_path / "out", settings(made))
    assert tuned.step
    assert tuned.routers == (ROUTER,)
    one, two = (others(folder, {ROUTER}) for folder in (made / "two", tmp_path / "out"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    raw, now = ((f / "model.safetensors").read_bytes() for f in (made / "two", tmp_path / "out"))
    size = 2 * tiny.HIDDEN * 4
    differing = [i for i, (x, y) in enumerate(zip(raw, now, strict=True)) if x != y]
    assert differing[-1] - differing[0] < size
    assert digest(made / "two" / "model.safetensors") == before
    for item in (made / "two").iterdir():
        if item.name not in (
            "README.md",
            "moeforge.card.json",
            "moeforge.lock.json",
            "model.safetensors",
        ):
            assert (tmp_path / "out" / item.name).read_bytes() == item.read_bytes()
    old, new = (read_lock(f / "moeforge.lock.json") for f in (made / "two", tmp_path / "out"))
    assert new["built"] == {"model.safetensors": old["outputs"]["model.safetensors"]}
    assert built(new) == old["outputs"]
    said = new["outputs"]["model.safetensors"]
    assert said == {"size": len(now), "blake3": blake3(now).hexdigest()}
    assert "## Routers tuned" in (tmp_path / "out" / "README.md").read_text()


def test_the_fingerprint_sees_every_other_byte(made, tmp_path):
    moeforge_copy(made / "two", tmp_path / "copy")
    found = write.places(made / "two", routers(load_output(made / "two")))
    clean = write.fingerprint(made / "two", found)
    file, span = tmp_path / "copy" / "model.safetensors", found[0].span
    raw = bytearray(file.read_bytes())
    for place, same in (
        (span.offset - 1, False),
        (span.offset, True),
        (span.offset + span.nbytes - 1, True),
        (span.offset + span.nbytes, False),
        (len(raw) - 1, False),
    ):
        damaged = bytearray(raw)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        assert (write.fingerprint(tmp_path / "copy", found) == clean) is same, place


def test_the_same_seed_gives_the_same_bytes(made, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tune(made / "two", tmp_path / name, settings(made, steps=5), seed=seed)
    a, b, c = (digest(tmp_path / name / "model.safetensors") for name in "abc")
    assert a == b != c


def test_layers_computed_again_give_the_same_bytes(made, tmp_path, monkeypatch):
    tune(made / "two", tmp_path / "kept", settings(made, steps=5, balance=0.1))
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    tune(made / "two", tmp_path / "again", settings(made, steps=5, balance=0.1))
    kept, again = (digest(tmp_path / name / "model.safetensors") for name in ("kept", "again"))
    assert kept == again


def test_layers_are_computed_again_where_memory_is_short(models, monkeypatch):
    folder, device = models("mixtral", num_local_experts=4), torch.device("cpu")
    found = {}
    for name, free in (("kept", 1e12), ("again", 0)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        model = load_output(folder)
        model.requires_grad_(False)
        gates = routers(model)
        for gate in gates:
            gate.weight.requires_grad_(True)
        assert memory.save_memory(model, 32, 2, device) is (name == "again")
        with recording(gates) as seen:
            model(torch.arange(32)[None], use_cache=False).logits.logsumexp(-1).sum().backward()
        found[name] = [gate.weight.grad for gate in gates]
        assert all(len(seen[gate.layer]) == 1 + (name == "again") for gate in gates)
    assert all(torch.equal(*pair) for pair in zip(*found.values(), strict=True))
    assert all(float(gradient.abs().max()) > 0 for gradient in found["kept"])


def test_where_nothing_is_better_the_result_is_the_start(made, tmp_path):
    moeforge_copy(made / "two", tmp_path / "right")
    set_router(tmp_path / "right", router(3.0))
    tuned = tune(tmp_path / "right", tmp_path / "out", settings(made, learning_rate=1e6))
    assert (tuned.step, tuned.best) == (0, tuned.start)
    names = [tmp_path / name / "model.safetensors" for name in ("right", "out")]
    assert digest(names[0]) == digest(names[1])
    assert "as they were" in verdict(tuned)
    assert tuned.steps_done < FAST["steps"], "it went on after measurements that were no better"


def test_what_is_measured_is_what_is_stored(models, tmp_path):
    recipe = {
        "base_model": str(models("llama", dtype=torch.bfloat16)),
        "experts": [
            {"source_model": str(models("llama", s, dtype=torch.bfloat16))} for s in (1, 2)
        ],
        "gate_mode": "random",
    }
    moeforge.build(recipe, tmp_path / "mixture")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(random.Random(0).random()) for _ in range(60)))
    asked = Tuning(text=str(text), heldout=str(text), window=32, steps=6, learning_rate=0.01)
    tuned = tune(tmp_path / "mixture", tmp_path / "out", asked)
    assert tuned.step
    assert tuned.best == pytest.approx(loss(tmp_path / "out", text.read_text(), 32), abs=1e-4)


def test_a_selection_bias_stays_and_is_heeded(models, tmp_path):
    folder = models("glm4_moe", n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
                    n_group=1, topk_group=1, head_dim=16, moe_intermediate_size=32,
                    first_k_dense_replace=1, num_mtp_layers=0)  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text("any text will do, as long as it is long enough to be cut into pieces " * 5)
    asked = Tuning(text=str(text), window=16, steps=4, learning_rate=0.02, balance=0.01)
    tuned = tune(folder, tmp_path / "out", asked)
    assert len(tuned.routers) == 3
    one, two = others(folder, tuned.routers), others(tmp_path / "out", tuned.routers)
    assert any(name.endswith("e_score_correction_bias") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- where routers lie ----------------------------------------------------------------------------
SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("dense_type", "architecture"),
    [
        ("llama", "mixtral"),
        ("qwen2", "qwen2_moe"),
        ("qwen3_5_text", "qwen3_5_moe_text"),
        ("granite", "granitemoe"),
        ("olmo", "dbrx"),
        ("ernie4_5", "ernie4_5_moe"),
        ("hunyuan_v1_dense", "hunyuan_v1_moe"),
        ("lfm2", "lfm2_moe"),
        ("gemma4_text", "gemma4_text"),
        ("gpt2", "remote"),
    ],
)
def test_routers_lie_where_the_plan_put_them(models, tmp_path, dense_type, architecture):
    from zoo import ZOO

    config = dict(ZOO[dense_type])
    sources = [str(models(dense_type, seed, **config)) for seed in (0, 1, 2)]
    recipe = {
        "base_model": sources[0],
        "experts": [{"source_model": source} for source in sources[1:]],
        "architecture": architecture,
        "gate_mode": "random",
    }
    plan = moeforge.build(recipe, tmp_path / "mixture").plan
    found = routers(load_output(tmp_path / "mixture", code=architecture == "remote"))
    placed = write.places(tmp_path / "mixture", found)
    assert tuple(place.name for place in placed) == plan.experts.routers


def test_routers_of_types_that_are_not_on_the_shelf(models):
    folder = models("olmoe", **SMALL_EXPERTS)
    placed = write.places(folder, routers(load_output(folder)))
    assert [p.name for p in placed] == [f"model.layers.{i}.mlp.gate.weight" for i in range(4)]


def test_routers_that_cannot_be_told_apart_are_refused(models):
    folder = models("olmoe", **SMALL_EXPERTS)
    found = routers(load_output(folder))
    with torch.no_grad():
        found[2].weight.add_(1)
    with pytest.raises(BuildError, match=r"layers\.2\.mlp\.gate\.weight .* is no tensor in"):
        write.places(folder, found)


# --- refusals -------------------------------------------------------------------------------------
def refused(made, tmp_path, match, folder=None, kind=BuildError, **changes):
    asked = changes.pop("settings", None) or settings(made)
    with pytest.raises(kind, match=match):
        tune(folder or made / "two", tmp_path / "out", asked, **changes)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_what_cannot_be_tuned_is_refused(made, tmp_path, models):
    refused(made, tmp_path, "no routers", made / "A")
    refused(made, tmp_path, "not a model folder", made)
    no_tokenizer = models("mixtral", with_tokenizer=False)
    refused(made, tmp_path, "tokenizer", no_tokenizer, SourceError)
    refused(made, tmp_path, "no text to train on", settings=Tuning())
    refused(made, tmp_path, "cannot be read", settings=Tuning(text="nowhere.txt"))
    short = tmp_path / "short.txt"
    short.write_text("pA")
    refused(made, tmp_path, "one document", settings=Tuning(text=str(short)))
    refused(made, tmp_path, "active is 3; the mixture has 2", settings=settings(made, active=3))
    (tmp_path / "there").mkdir()
    with pytest.raises(BuildError, match="exists"):
        tune(made / "two", tmp_path / "there", settings(made))


def test_teachers_that_cannot_teach_are_refused(made, tmp_path, models):
    refused(made, tmp_path, "there are no teachers", settings=settings(made, teach=0.5))
    refused(made, tmp_path, "teach is 0", teachers=[str(made / "A")])
    teach = settings(made, teach=1.0)
    nowhere = {"settings": teach, "kind": MoeforgeError}
    refused(made, tmp_path, "does not exist", teachers=["./nowhere"], **nowhere)
    wider = models("llama", vocab_size=310, num_hidden_layers=1)
    refused(made, tmp_path, "predicts 310 tokens", teachers=[str(wider)], settings=teach)


def test_weights_in_bin_files_are_refused(made, tmp_path):
    moeforge_copy(made / "two", tmp_path / "pickled")
    file = tmp_path / "pickled" / "model.safetensors"
    torch.save(load_file(file), tmp_path / "pickled" / "pytorch_model.bin")
    file.unlink()
    refused(made, tmp_path, r"\.bin files", tmp_path / "pickled")


@pytest.mark.parametrize("at", [0, 3])
def test_who_stops_it_leaves_nothing_behind(made, tmp_path, at):
    before = digest(made / "two" / "model.safetensors")

    def stop(step):
        if step.number == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(made / "two", tmp_path / "out", settings(made), progress=stop)
    assert not list(tmp_path.iterdir())
    assert digest(made / "two" / "model.safetensors") == before


def test_a_damaged_mixture_is_refused(made, tmp_path):
    moeforge_copy(made / "two", tmp_path / "damaged")
    name = "model.norm.weight"
    set_router(tmp_path / "damaged", torch.full((tiny.HIDDEN,), math.nan), name)
    refused(made, tmp_path, "is nan before the first step", tmp_path / "damaged")


def test_a_recipe_says_what_is_wrong_before_the_build(tmp_path):
    asked = Tuning(text=["here.txt", "gone.txt"])
    (tmp_path / "here.txt").touch()
    (found,) = problems(asked, tmp_path.joinpath, has_prompts=False)
    assert ("gone.txt" in found.what, found.path) == (True, ("tune", "text"))
    (found,) = problems(Tuning(), tmp_path.joinpath, has_prompts=False)
    assert found.path == ("tune",)
    assert not problems(Tuning(), tmp_path.joinpath, has_prompts=True)


# --- the parts ------------------------------------------------------------------------------------
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("per_token", [1, 2])
def test_balance_loss_is_that_of_the_paper(sigmoid, per_token):
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    made = Router(0, "", torch.nn.Identity(), logits, None, sigmoid, per_token)
    share, mean = [0.0] * 4, [0.0] * 4
    for row in logits.tolist():
        raw = [1 / (1 + math.exp(-x)) if sigmoid else math.exp(x) for x in row]
        for expert in sorted(range(4), key=lambda e: -raw[e])[:per_token]:
            share[expert] += 1 / (50 * per_token)
        mean = [m + x / sum(raw) / 50 for m, x in zip(mean, raw, strict=True)]
    expected = 4 * sum(f * p for f, p in zip(share, mean, strict=True))
    assert float(balance_loss(made, logits)) == pytest.approx(expected, rel=1e-5)
    all_to_one = torch.tensor([[50.0, 0, 0, 0]]).repeat(9, 1)
    one = Router(0, "", torch.nn.Identity(), logits, None, False, 1)
    assert float(balance_loss(one, all_to_one)) == pytest.approx(4)


@pytest.mark.parametrize("balance", [0.0, 100.0])
def test_balance_is_paid_for(made, balance):
    """On text of A alone all scores go to A; with a balance loss they do not."""
    model = load_output(made / "two")
    found = routers(model)
    with torch.no_grad():
        found[0].weight.zero_()
    documents = data.of_text(tiny.tokenizer(), made / "p.txt", 16)
    stored = {found[0].name: torch.float32}
    asked = Tuning(**FAST, balance=balance, active=2)
    one = [dataclasses.replace(found[0], per_token=1)]
    model.model.layers[0].mlp.gate.top_k = 1
    seen = []
    Trainer(
        model, one, data.split(documents), asked, seed=0, stored=stored,
        progress=lambda step: seen.append(one[0].weight.detach().clone()),
    ).run()  # fmt: skip
    weights = seen[-1]
    # "p", as the router meets it: both of its coordinates, of the same size.
    difference = weights[0, [ONE, OWN["p"]]].sum() - weights[1, [ONE, OWN["p"]]].sum()
    assert difference > 0.5 if balance == 0 else abs(difference) < 0.5


def test_documents_are_cut_held_out_and_shuffled(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 7)  # 70 tokens in pieces of 7
    documents = data.of_text(tiny.tokenizer(), text, 8)
    assert len(documents) == 10
    assert all(document[0] == 256 and len(document) == 8 for document in documents)
    parts = data.split(documents)
    assert (len(parts.training), parts.heldout) == (9, (documents[9],))
    assert data.split(documents[:3]).heldout == (documents[2],)
    given = data.split(documents, documents[:2])
    assert (len(given.training), len(given.heldout)) == (10, 2)
    assert len(data.split(documents, documents * 50).heldout) == 128
    batches = data.draws(10, 4, seed=0)
    numbers = [number for _ in range(5) for number in next(batches)]
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert numbers[:10] != numbers[10:]


def test_padding_changes_nothing(models):
    model = load_output(models("mixtral", num_local_experts=4))
    documents = [(256, *range(20)), (256, 5, 6, 7)]
    both = data.together(documents, [0, 1])
    alone = data.together(documents, [1])
    assert both.labels_BT[1].tolist() == [5, 6, 7, *[data.IGNORED] * 18]
    with torch.no_grad():
        padded = model(both.ids_BT).logits[1, :4]
        torch.testing.assert_close(padded, model(alone.ids_BT).logits[0], atol=1e-5, rtol=0)


def test_the_rate_is_smaller_for_wider_models():
    assert learning_rate(Tuning(), 4096) == pytest.approx(learning_rate(Tuning(), 128) / 32)
    assert learning_rate(Tuning(learning_rate=0.5), 4096) == 0.5


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("teach", 1.5, "from 0 to 1"),
        ("balance", -1, "not negative"),
        ("learning_rate", 0, "above zero"),
        ("steps", 0, "at least 1"),
        ("stepz", 3, 'did you mean "steps"'),
        ("text", [""], "not empty"),
    ],
)
def test_settings_are_strict(key, value, said):
    with pytest.raises(ValidationError) as error:
        Tuning.model_validate({key: value})
    assert said in error.value.errors()[0]["msg"]


def test_a_tuning_tells_of_itself(made, tmp_path):
    steps = []
    tuned = tune(made / "two", tmp_path / "out", settings(made, steps=5), progress=steps.append)
    assert [step.number for step in steps] == list(range(6))
    assert all(sum(step.load) == pytest.approx(1) for step in steps)
    assert "load" in step_line(steps[1], 1.0)
    plain = json.loads(json.dumps(tuned_json(tuned)))
    hold("tune", plain)
    assert plain["improved"]
    assert plain["heldout"] == {"before": tuned.start, "after": tuned.best}
    assert tuned_table(tuned).row_count == 2
    assert f"{tuned.best:.4f}" in tuned_markdown(tuned)


# --- in a build -----------------------------------------------------------------------------------
def test_a_build_tunes_what_it_made(made, tmp_path):
    recipe = {
        "base_model": str(made / "A"),
        "experts": [
            {"source_model": str(made / answer), "positive_prompts": [text * 20, text * 30]}
            for answer, text in (("A", "pA"), ("B", "qB"))
        ],
        "gate_mode": "random",
    }
    plan = moeforge.build(recipe, tmp_path / "work").plan
    prepared = prepare(recipe, offline=True)
    assert tune_built(prepared, plan, tmp_path / "work") is None
    for teach in (0.0, 1.0):
        set_router(tmp_path / "work", router(-0.2))
        asked = Tuning(**FAST, window=16, teach=teach)
        wished = prepared.loaded.recipe.model_copy(update={"tune": asked})
        object.__setattr__(prepared.loaded, "recipe", wished)
        tuned = tune_built(prepared, plan, tmp_path / "work")
        assert tuned.folder == tmp_path / "work"
        assert len(tuned.labels) == 2
        assert tuned.best < tuned.start
        assert set(tuned.teachers.values()) <= set(range(1, 99))
    weight = load_file(tmp_path / "work" / "model.safetensors")[ROUTER]
    assert weight[0, OWN["p"]] > weight[1, OWN["p"]]


def test_the_command_says_in_json_what_training_came_to(made, tmp_path):
    wanted = {
        "base_model": str(made / "A"),
        "experts": [
            {"source_model": str(made / answer), "positive_prompts": [text * 20, text * 30]}
            for answer, text in (("A", "pA"), ("B", "qB"))
        ],
        "gate_mode": "random",
        "tune": {**FAST, "window": 16},
    }
    path = tmp_path / "wanted.yml"
    path.write_text(yaml.safe_dump(wanted))
    run = CliRunner().invoke(app, ["build", str(path), "-o", str(tmp_path / "out"), "--json"])
    assert run.exit_code == 0, run.output
    tuned = json.loads(run.stdout)["tuned"]
    hold("build", json.loads(run.stdout))
    assert tuned["heldout"]["after"] <= tuned["heldout"]["before"]
    assert 0 < tuned["steps"] <= FAST["steps"]


def test_a_link_to_a_private_file_is_not_copied(made, tmp_path):
    """What lies beside a strange mixture would be published with the tuned one."""
    folder = tmp_path / "strange"
    shutil.copytree(made / "two", folder)
    (tmp_path / "id_rsa").write_text("secret")
    (folder / "tokenizer.model").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(SourceError, match=r"is a link to .*id_rsa"):
        tune(folder, tmp_path / "out", settings(made, steps=1))
    assert not (tmp_path / "out").exists()
