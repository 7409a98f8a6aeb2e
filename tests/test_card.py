"""Model cards: what they say, that the Hub takes them, and that nothing of the user's is lost."""

import json
import shutil
from types import SimpleNamespace

import hub_cards
import huggingface_hub
import pytest
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from typer.testing import CliRunner

import moeforge
from moeforge.cli import app
from moeforge.markdown import block
from moeforge.output import cards
from moeforge.output.cards.facts import Parent
from moeforge.output.cards.gather import _roles, _taken
from moeforge.output.cards.kept import BEGIN, END
from moeforge.output.cards.licences import KINDS, together
from moeforge.output.cards.strangers import Said, read_card
from moeforge.recipe import load

COMMITS = {"acme/one": "1" * 40, "acme/two": "2" * 40, "acme/lora": "3" * 40}
ONE = "---\nlicense: mit\nlanguage: [en, de]\ndatasets:\n- acme/texts\n---\n# One\n"
TWO = "---\nlanguage:\n- en\n- no\nlicense: apache-2.0\ndatasets: squad\n---\n"
LORA = "---\nlicense: apache-2.0\nbase_model: acme/two\n---\n"
MINE = "Trained with love.\n\n## My heading\n\n    code | and <b>\n"


def run(*words, code=0):
    done = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done.output


def html(text):
    return MarkdownIt("commonmark").enable("table").render(text)


def body(folder):
    return ModelCard.load(folder / "README.md").text


def write_text(folder, text):
    card = folder / "README.md"
    said = card.read_text(encoding="utf-8")
    card.write_text(said.replace(f"{BEGIN}\n\n{END}", f"{BEGIN}\n{text}\n{END}"), encoding="utf-8")


@pytest.fixture(scope="module")
def hub(models, tmp_path_factory):
    """The Hub's cache with two models and an adapter, as huggingface_hub keeps them."""
    cache = tmp_path_factory.mktemp("cache")
    folders = {}
    for repo, commit in COMMITS.items():
        place = cache / f"models--{repo.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(commit)
        folders[repo] = place / "snapshots" / commit
    for seed, repo, card in ((1, "acme/one", ONE), (2, "acme/two", TWO)):
        shutil.copytree(models("llama", seed=seed), folders[repo])
        (folders[repo] / "README.md").write_text(card)
    lora = folders["acme/lora"]
    lora.mkdir(parents=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {name.format("A"): torch.ones(2, 64), name.format("B"): torch.ones(64, 2)},
        lora / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    (lora / "README.md").write_text(LORA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="module")
def stack(hub, tmp_path_factory):
    """A stack of layers of models of the Hub, one of them with an adapter."""
    folder = tmp_path_factory.mktemp("stack") / "tall"
    one, two = "acme/one", "acme/two+acme/lora"
    spans = [(one, [0, 3]), (one, [1, 2]), (two, [1, 3]), (one, [2, 4])]
    slices = [{"sources": [{"model": model, "layer_range": span}]} for model, span in spans]
    moeforge.build({"merge_method": "passthrough", "slices": slices}, folder, verify=False)
    return folder


@pytest.fixture(scope="module")
def mixture(models, tmp_path_factory):
    """A mixture whose recipe, prompts and parents' names are as awkward as can be."""
    root = tmp_path_factory.mktemp("mixture")
    shutil.copytree(models("llama", seed=1), root / "base")
    shutil.copytree(models("llama", seed=2), root / "a|b <script>*x*")
    shutil.copytree(models("llama", seed=3), root / "third")
    (root / "private.txt").write_text("a secret of somebody")
    recipe = {
        "base_model": "base",
        "experts": [
            {"source_model": "a|b <script>*x*", "positive_prompts": [f"one | `two`\n{END}\n```\n"]},
            {"source_model": "third", "prompts_file": "private.txt"},
        ],
        "gate_mode": "hidden",
        "dtype": "float32",
    }
    text = yaml.safe_dump(recipe, default_style="|")
    (root / "made.yml").write_text(text)
    moeforge.build(root / "made.yml", root / "made", verify=False)
    return root / "made"


@pytest.fixture
def made(mixture, tmp_path):
    return shutil.copytree(mixture, tmp_path / "made")


# --- what it says ---------------------------------------------------------------------------------


def test_front_matter_of_models_of_the_hub(stack):
    card = ModelCard.load(stack / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == ["acme/one", "acme/two", "acme/lora"]
    assert data["base_model_relation"] == "merge"
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en", "de", "no"]
    assert data["datasets"] == ["acme/texts", "squad"]
    assert data["tags"] == ["merge", "frankenmerge", "moeforge", "llama"]
    assert (data["pipeline_tag"], data["library_name"]) == ("text-generation", "transformers")
    for repo, roles, licence in (
        ("acme/one", "layers 0 to 2, 1, 2 to 3; config and tokenizer", "mit"),
        ("acme/two", "layers 1 to 2", "apache-2.0"),
        ("acme/lora", "LoRA adapter", "apache-2.0"),
    ):
        link = f"https://huggingface.co/{repo}/tree/{COMMITS[repo]}"
        row = f"| [{repo}]({link}) | {roles} | `{COMMITS[repo][:7]}` | `{licence}` |"
        assert row in card.text
    assert "most restrictive" in card.text
    assert "Not evaluated" in card.text


def test_the_hub_takes_the_cards(stack, mixture, monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        for folder in (stack, mixture):
            card = ModelCard.load(folder / "README.md")
            card.validate()
        card.data.license = "my-own"
        with pytest.raises(ValueError, match="license"):
            card.validate()
        assert len(server.asked("validate-yaml")) == 3


def test_a_mixture_tells_of_its_experts_and_no_name_is_markup(mixture):
    text, shown = body(mixture), html(body(mixture))
    assert "<script>" not in shown
    assert "<td><code>a|b &lt;script&gt;*x*</code></td>" in shown
    assert f"<code>one | `two` {END.replace('<', '&lt;').replace('>', '&gt;')} ```</code>" in shown
    assert "<td>expert 0</td>" in shown
    assert "private.txt" in text
    assert "a secret of somebody" not in text
    assert "gate mode `hidden`" in text
    assert shown.count("<pre>") == 2, "how to load, and the recipe"
    assert html(block("a\n```\n# b", "")).count("<pre>") == 1
    assert "<h1>" not in html(block("a\n```\n# b", ""))
    recipe = (mixture / "moeforge.yml").read_text()
    assert recipe.split(END)[0] in text
    assert "vllm serve made" in text
    assert "no chat template" in text


def test_method_and_parameters(llamas, tmp_path):
    parameters = {"density": 0.5, "weight": [0.2, 0.4]}
    folders = [shutil.copytree(f, tmp_path / name) for f, name in zip(llamas, "abc", strict=True)]
    for folder, template in zip(folders, ("{{ 1 }}", "{{ 2 }}", "{{ 1 }}"), strict=True):
        (folder / "chat_template.jinja").write_text(template)
    models = [{"model": str(f), "parameters": parameters} for f in folders[1:]]
    recipe = {"merge_method": "dare_ties", "base_model": str(folders[0]), "models": models}
    moeforge.build(recipe, tmp_path / "out", verify=False)
    text = body(tmp_path / "out")
    (chat,) = (line for line in text.splitlines() if line.startswith("Chat template:"))
    same, others = chat.split("Other parents were trained with another one")
    assert all(f"`{folder}`" in same for folder in (folders[0], folders[2]))
    assert others.startswith(f" (`{folders[1]}`):")
    assert "(https://arxiv.org/abs/2311.03099)" in text
    assert "`density: 0.5`" in text
    assert "`weight: 0.2 to 0.4`" in text
    assert "dare_ties" in ModelCard.load(tmp_path / "out" / "README.md").data.tags
    assert f"| `{folders[0]}` | base; config and tokenizer | local folder |" in text


def test_cards_of_surgery_say_which_experts_of_what(hub, tmp_path):
    """Made of a model of the Hub, then of each other: what is right of each kind, and no more."""
    one, moe = "acme/one", tmp_path / "moe"
    moeforge.upcycle(one, moe, experts=3, noise=0.01, verify=False)
    moeforge.extract(moe, tmp_path / "dense", expert=2, verify=False)
    moeforge.extract(moe, tmp_path / "mean", average=True, verify=False)
    moeforge.experts(moe, tmp_path / "fewer", keep=[2, 0], verify=False)
    each = {"model": str(moe), "keep": [[0, 1], [1, 2], [0, 2], [2, 1]]}
    moeforge.build({"regroup": each}, tmp_path / "other", verify=False)

    said = {folder.name: ModelCard.load(folder / "README.md") for folder in tmp_path.iterdir()}
    tags = {name: card.data.tags for name, card in said.items()}
    assert tags["moe"] == tags["fewer"] == tags["other"] == ["merge", "moe", "moeforge", "mixtral"]
    assert tags["dense"] == ["merge", "moeforge", "llama"]
    assert tags["mean"] == ["merge", "moeforge", "linear", "llama"]
    data = said["moe"].data.to_dict()
    assert (data["base_model"], data["license"]) == (["acme/one"], "mit")
    assert (data["language"], data["datasets"]) == (["en", "de"], ["acme/texts"])

    texts = {name: card.text for name, card in said.items()}
    copies = "A mixture of 3 experts that start as copies of one model (`MixtralForCausalLM`); each"
    assert copies in texts["moe"]
    assert "until it is trained, it is no better than that model" in texts["moe"]
    assert "| base; expert 0, 1, 2; config and tokenizer | `1111111` | `mit` |" in texts["moe"]
    for name, taken, first in (
        ("dense", "expert 2", "in place of the experts it has one MLP, expert 2. All else"),
        ("mean", "the average of its experts", "one MLP, the average of its experts. All else"),
        ("fewer", "experts 2, 0", "A mixture (`MixtralForCausalLM`) of experts 2, 0 of another"),
        ("other", "2 experts of each layer, which the recipe lists", "(`MixtralForCausalLM`) of 2"),
    ):
        assert first in texts[name]
        role = f"| `{moe}` | mixture: {taken}; config and tokenizer | local folder | `mit` |"
        assert role in texts[name]
        assert ("Its routers are not fitted" in texts[name]) == (name in ("fewer", "other"))
        assert ("is not what their mixture computes" in texts[name]) == (name == "mean")
        assert "copies of one model" not in texts[name]
    assert "active per token" not in texts["dense"]
    assert "linear" in texts["mean"]
    before = (tmp_path / "fewer" / "README.md").read_bytes()
    run("card", tmp_path / "fewer")
    assert (tmp_path / "fewer" / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ([5, *range(6)], "experts 5, 0, 1, 2, 3, 4, 5"),
        ([*range(8), 9], "experts 0 to 7, 9"),
        ([40, *range(32), 30, 7], "experts 40, 0 to 31, 30, 7"),
        ([*range(0, 128, 2)], "64 experts, which the recipe lists"),
    ],
)
def test_many_experts_are_told_of_as_runs(keep, said):
    assert _taken(load({"regroup": {"model": "moe", "keep": keep}}).recipe) == said


def test_a_parent_of_many_experts_says_so_shortly():
    experts = SimpleNamespace(base="a", labels=("b",) * 40 + ("a", "b"), shared=("b",))
    plan, source = SimpleNamespace(experts=experts, donor=None), SimpleNamespace(config={})
    roles = _roles(plan, None, "b", source, [])
    assert list(roles) == ["expert 0 to 39, 41", "shared expert 0"]
    experts.labels = ("a", "b") * 20
    assert next(_roles(plan, None, "b", source, [])) == "20 experts"


# --- licences -------------------------------------------------------------------------------------


def of(*words):
    split = (word.partition(":") for word in words)
    return [Parent(str(i), license=a, license_name=b) for i, (a, _, b) in enumerate(split)]


@pytest.mark.parametrize(
    ("words", "license", "why"),
    [
        ("mit mit", "mit", "as every parent is"),
        ("mit apache-2.0 cc0-1.0", "apache-2.0", "most restrictive"),
        ("mit llama3.1 apache-2.0", "llama3.1", "most restrictive"),
        ("apache-2.0 cc-by-nc-4.0", "cc-by-nc-4.0", "most restrictive"),
        ("mpl-2.0 gpl-3.0 mit", "gpl-3.0", "most restrictive"),
        ("gpl-3.0 agpl-3.0 lgpl-3.0", "agpl-3.0", "most restrictive"),
        ("other:own-1 other:own-1", "other", "as every parent is"),
        ("other:own-1 mit", "other", "most restrictive"),
        ("other:own-1 other:own-2", "", "several licences"),
        ("llama3 gemma", "", "several licences"),
        ("llama3 llama3.1", "", "several licences"),
        ("llama2 cc-by-nc-4.0", "", "several licences"),
        ("gpl-3.0 llama2", "", "conflict"),
        ("gpl-3.0 cc-by-nc-4.0", "", "conflict"),
        ("gpl-2.0 gpl-3.0", "", "conflict"),
        ("apache-2.0 gpl-2.0", "", "conflict"),
        ("mit cc-by-nc-nd-4.0", "", "does not allow modified versions"),
        ("mit other", "", "No definite licence is known of `1`"),
        ("unknown mit cc", "", "No definite licence is known of `0`, `2`"),
        (" mit", "", "No definite licence is known of `0`"),
    ],
)
def test_what_follows_from_several_licences(words, license, why):
    found = together(of(*words.split(" ")))
    assert found.license == license
    assert why in found.said
    assert found.name == ("own-1" if license == "other" else "")
    assert found == together(of(*reversed(words.split(" ")))) or "known of" in found.said


def test_the_licences_are_those_of_the_hub():
    assert set(KINDS) == set(hub_cards.LICENSES)


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (ONE, Said("mit", languages=("en", "de"), datasets=("acme/texts",))),
        (TWO, Said("apache-2.0", languages=("en", "no"), datasets=("squad",))),
        ("no front matter\nlicense: mit\n", Said()),
        ("---\r\nlicense: [MIT]\r\nlanguage: EN\r\n---\r\n", Said("mit", languages=("en",))),
        ("---\nlicense: [mit, gpl-3.0]\nlanguage: {a: b}\ndatasets: 7\n---\n", Said()),
        ("---\nlicense: !!python/object/apply:os.system [ls]\n---\n", Said()),
        ("---\nlicense: &a [*a]\n---\n", Said()),
        (f"---\nlicense: {'[' * 5000}\n---\n", Said()),
        ("---\nlicense: mit\n# never closed\n", Said("mit")),
        ("---\nlanguage: [en, '<b>', 'a b', 12, \"fr\\n# x\"]\n---\n", Said(languages=("en",))),
        ("---\ndatasets: [../../x, a/b/c, 'x\\ny', ok/it]\n---\n", Said(datasets=("ok/it",))),
        (
            "---\nlicense: other\nlicense_name: own-1\nlicense_link: LICENSE\n---\n",
            Said("other", "own-1", "https://huggingface.co/acme/one/blob/main/LICENSE"),
        ),
        (
            "---\nlicense: other\nlicense_name: '[x](y)'\nlicense_link: javascript:x\n---\n",
            Said("other"),
        ),
        ("---\nlicense: my own\n---\n", Said()),
        (
            "---\nmodel-index: {" + "a, " * 100_000 + "b}\nlicense: mit\n---\n",
            Said("mit"),
        ),
    ],
    ids=range(15),
)
def test_cards_of_strangers_are_data(card, said, tmp_path):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert read_card(tmp_path, "acme/one") == said
    assert not read_card(tmp_path / "README.md").license


# --- made again -----------------------------------------------------------------------------------


def test_a_card_is_made_again_without_the_parents(made):
    before = {file.name: file.read_bytes() for file in made.iterdir()}
    (made / "README.md").unlink()
    assert run("card", made).strip() == str(made / "README.md")
    assert {file.name: file.read_bytes() for file in made.iterdir()} == before
    data = json.loads(run("card", made, "--json"))
    assert data["metadata"]["tags"] == ["merge", "moe", "moeforge", "mixtral"]


def test_text_and_metadata_of_the_user_survive(made, tmp_path):
    write_text(made, MINE)
    card = ModelCard.load(made / "README.md")
    front = "license: mit\ntags:\n- mine\ndate: 2026-01-01\n"
    said = (made / "README.md").read_text().split("---\n", 2)[2]
    said = said.replace("\n", "\r\n")  # as an editor on Windows leaves it
    (made / "README.md").write_bytes(f"---\n{front}---\n{said}".encode())
    assert json.loads(run("card", made, "--json"))["metadata"]["date"] == "2026-01-01"
    once = (made / "README.md").read_bytes()
    run("card", made)
    assert (made / "README.md").read_bytes() == once
    text = once.decode()
    assert f"{BEGIN}\n{MINE}\n{END}\n" in text
    data = yaml.safe_load(text.split("---\n")[1])
    assert (data["license"], data["tags"]) == ("mit", ["mine"])
    assert "library_name" not in data, "the user removed it"
    assert card.data.library_name == "transformers"


def test_they_survive_another_build_and_a_tuning(mixture, made, tmp_path):
    write_text(made, MINE)
    recipe = mixture.parent / "made.yml"
    run("build", recipe, "-o", made, "--overwrite", "--no-verify")
    assert f"{BEGIN}\n{MINE}\n{END}\n" in (made / "README.md").read_text()
    (tmp_path / "text.txt").write_text("What is to be read here, and why? " * 20)
    options = ["--text", tmp_path / "text.txt", "--steps", 1, "--window", 32]
    run("tune", made, "-o", tmp_path / "tuned", *options)
    text = (tmp_path / "tuned" / "README.md").read_text()
    assert f"{BEGIN}\n{MINE}\n{END}\n" in text
    assert text.count("## Routers tuned") == 1
    assert "after that the routers were tuned" in text
    assert ("routing.png" in text) == (tmp_path / "tuned" / "routing.png").exists()
    before = text.encode()
    run("card", tmp_path / "tuned")
    assert (tmp_path / "tuned" / "README.md").read_bytes() == before


BROKEN = {
    "no begin": (BEGIN, "", "has lost the line"),
    "no end": (END, "", "has lost the line"),
    "neither": (f"{BEGIN}\n\n{END}", "", "has lost the line"),
    "doubled": (END, f"{END}\n{END}", "2 times"),
    "nested": (BEGIN, f"{BEGIN}\n{BEGIN}", "2 times"),
    "turned": (f"{BEGIN}\n\n{END}", f"{END}\n\n{BEGIN}", "before"),
    "elsewhere": ("## Parents", "## My parents", "changed outside the markers"),
    "front": ("library_name:", "library_name: [", "front matter cannot be used"),
    "alias": ("library_name: transformers", "library_name: &a [*a]", "has an alias"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_would_be_lost_is_not_overwritten(kind, mixture, made, monkeypatch):
    old, new, said = BROKEN[kind]
    card = made / "README.md"
    # Of the markers the recipe holds one too, which is none.
    card.write_text(card.read_text().replace(old, new, 1))
    before = {file.name: file.read_bytes() for file in made.iterdir()}
    assert said in run("card", made, code=5)
    if kind in ("neither", "elsewhere"):
        monkeypatch.setattr("moeforge.engine.run", None)  # it is said before anything is made
        words = ("build", mixture.parent / "made.yml", "-o", made, "--overwrite")
        assert said in run(*words, code=5)
        words = ("tune", made, "-o", made.parent / "tuned", "--text", made / "moeforge.yml")
        assert said in run(*words, code=5)
    assert {file.name: file.read_bytes() for file in made.iterdir()} == before


def test_folders_of_others_and_damaged_facts_are_refused(models, made, tmp_path):
    foreign = shutil.copytree(models("llama", seed=1), tmp_path / "foreign")
    (foreign / "README.md").write_text("# Mine\n")
    assert "has no moeforge.card.json" in run("card", foreign, code=3)
    assert (foreign / "README.md").read_text() == "# Mine\n"
    assert "is no folder" in run("card", tmp_path / "absent", code=3)
    facts = json.loads((made / cards.NAME).read_text())
    for damaged in (
        {**facts, "card": 2},
        {**facts, "facts": {**facts["facts"], "name": ["x"]}},
        {**facts, "facts": {**facts["facts"], "more": 1}},
        {**facts, "facts": {k: v for k, v in facts["facts"].items() if k != "name"}},
        [facts],
    ):
        (made / cards.NAME).write_text(json.dumps(damaged))
        assert "cannot be read" in run("card", made, code=3)


def test_a_card_is_there_whole_or_as_it_was(made, monkeypatch):
    write_text(made, MINE)
    before = {file.name: file.read_bytes() for file in made.iterdir()}
    monkeypatch.setattr("moeforge.output.cards.kept.sync", no_room)
    run("card", made, code=5)
    assert {file.name: file.read_bytes() for file in made.iterdir()} == before


def no_room(path):
    raise OSError(28, "No space left on device")


def test_facts_that_lag_behind_the_card_are_no_change(made):
    """As after a kill between the two files."""
    facts = json.loads((made / cards.NAME).read_text())
    (made / cards.NAME).write_text(json.dumps({**facts, "body": "0" * 64}))
    run("card", made)
    assert json.loads((made / cards.NAME).read_text()) == facts
