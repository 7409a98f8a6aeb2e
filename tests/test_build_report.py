"""What a build of a mixture says at its end of where tokens go: counted anew with transformers."""

import json
from pathlib import Path

import matplotlib
import pytest
import tiny
import torch
import yaml
from documented import hold
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moeforge
from moeforge.cli import app
from moeforge.proof import routing_of
from moeforge.proof.route_map import draw

TEXTS = (["def f(x):\n    return x + 1", "import os"], ["Der Fuchs springt."], ["le chat noir"])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe(models):
    """A maker of recipes of mixtures of three llamas with prompts."""
    folders = [models("llama", seed=seed) for seed in (1, 2, 3, 4)]

    def make(**more):
        experts = [
            {"source_model": str(folder), "positive_prompts": list(texts)}
            for folder, texts in zip(folders[1:], TEXTS, strict=True)
        ]
        return {"base_model": str(folders[0]), "experts": experts, **more}

    return make


@pytest.fixture
def text(tmp_path):
    """Held-out text of a few windows."""
    path = tmp_path / "text.txt"
    path.write_text("What is to be read here, and why? " * 60, encoding="utf-8")
    return str(path)


def counted(folder, domains, experts=3, per_token=2):
    """Shares of choices [layer][expert], the mean over domains, from hooks on routers."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    gates = [m for name, m in model.named_modules() if name.endswith((".gate", ".router"))]
    assert len(gates) == tiny.LAYERS
    seen = {}
    for gate in gates:
        gate.register_forward_hook(
            lambda module, given, output: seen.update(
                {module: output[0] if isinstance(output, tuple) else output}
            )
        )
    load = torch.zeros(len(gates), experts, dtype=torch.float64)
    for texts in domains:
        found = torch.zeros(len(gates), experts, dtype=torch.float64)
        for text in texts:
            ids = tiny.tokenizer()(text)["input_ids"]
            with torch.no_grad():
                model(torch.tensor([ids]), use_cache=False)
            for layer, gate in enumerate(gates):
                chosen = seen[gate].reshape(len(ids), -1)[1:].topk(per_token).indices  # without BOS
                found[layer] += torch.bincount(chosen.flatten(), minlength=experts)
        load += found / found.sum(-1, keepdim=True) / len(domains)
    return load


@pytest.mark.parametrize("architecture", ["mixtral", "remote"])
def test_the_report_counts_what_transformers_routes(architecture, recipe, tmp_path):
    report = moeforge.build(recipe(architecture=architecture), tmp_path / "out").routing
    expected = counted(tmp_path / "out", TEXTS)
    assert torch.allclose(torch.from_numpy(report.load_LE()), expected, atol=1e-6)
    assert report.mapping == "given"
    assert [domain.experts for domain in report.domains] == [(0,), (1,), (2,)]
    assert report.tokens == sum(len(text.encode()) for texts in TEXTS for text in texts)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "](routing.png)" in card
    for label, share in zip(report.experts, expected.mean(0), strict=True):
        assert f"\n| {label} | {share:.0%} |" in card
    assert card.index("## Where tokens go") < card.index("## How to load")
    assert (tmp_path / "out" / "routing.png").read_bytes()[:4] == b"\x89PNG"


def test_the_same_build_says_the_same(recipe, tmp_path, monkeypatch):
    files = []
    for name, colour in (("a", "white"), ("b", "pink")):
        monkeypatch.setitem(matplotlib.rcParams, "figure.facecolor", colour)  # a user's settings
        moeforge.build(recipe(), tmp_path / name / "out")
        folder = tmp_path / name / "out"
        files.append([(folder / file).read_bytes() for file in ("routing.png", "README.md")])
        assert matplotlib.rcParams["figure.facecolor"] == colour
    assert files[0] == files[1]


def test_every_domain_counts_the_same(recipe, tmp_path):
    wanted = recipe()
    wanted["experts"][0]["positive_prompts"] = ["import os\n" * 20, "x = 1\n" * 20]
    report = moeforge.build(wanted, tmp_path / "out").routing
    domains = [wanted["experts"][0]["positive_prompts"], *TEXTS[1:]]
    expected = counted(tmp_path / "out", domains)
    assert torch.allclose(torch.from_numpy(report.load_LE()), expected, atol=1e-6)
    assert report.domains[0].tokens > 10 * report.domains[1].tokens


def test_negative_prompts_are_not_sent_and_equal_models_keep_apart(recipe, tmp_path):
    wanted = recipe()
    wanted["experts"][1]["negative_prompts"] = ["import sys, os, re"]
    wanted["experts"][2]["source_model"] = wanted["experts"][1]["source_model"]
    report = moeforge.build(wanted, tmp_path / "out").routing
    first, second, third = report.experts
    assert second.removesuffix(" (1)") == third.removesuffix(" (2)") != first
    assert [domain.tokens for domain in report.domains] == [
        sum(len(text.encode()) for text in texts) for texts in TEXTS
    ]


def test_texts_without_an_owner_are_a_domain_of_their_own(recipe, tmp_path):
    (tmp_path / "mixed.txt").write_text("\n\n".join(text for texts in TEXTS for text in texts))
    parameters = {"labels": "loss", "data": str(tmp_path / "mixed.txt")}
    wanted = recipe(gate_parameters=parameters)
    for expert in wanted["experts"]:
        del expert["positive_prompts"]
    report = moeforge.build(wanted, tmp_path / "out").routing
    assert [domain.name for domain in report.domains] == ["mixed"]
    assert report.mapping == "best"
    assert "own tokens first" not in (tmp_path / "out" / "README.md").read_text()


# --- without prompts ------------------------------------------------------------------------------


def test_where_there_is_nothing_to_send_nothing_is_said(recipe, tmp_path):
    notes = []
    result = moeforge.build(recipe(gate_mode="random"), tmp_path / "out", note=notes.append)
    assert result.routing is None
    assert not (tmp_path / "out" / "routing.png").exists()
    assert "Where tokens go" not in (tmp_path / "out" / "README.md").read_text()
    assert not [note for note in notes if "tokens go" in note.what]


def test_gates_without_prompts_are_looked_at_on_held_out_text(recipe, text, tmp_path):
    wanted = recipe(gate_mode="random", evaluate={"english": text})
    report = moeforge.build(wanted, tmp_path / "out").routing
    assert [domain.name for domain in report.domains] == ["english"]
    # Pieces of 1000 bytes, cut to the context of 512 with BOS, until there are 1000 tokens.
    assert report.domains[0].tokens == 2 * 511
    assert report.mapping == "best"
    whole = Path(text).read_text(encoding="utf-8")
    expected = counted(tmp_path / "out", [[whole[:511], whole[1000:1511]]])
    assert torch.allclose(torch.from_numpy(report.load_LE()), expected, atol=1e-6)


@pytest.mark.parametrize("per_token", [1, 2])
def test_dead_and_dominating_experts_are_warned_of(per_token, recipe, text, tmp_path):
    """Routers of zeros send everything to the first experts."""
    notes = []
    wanted = recipe(gate_mode="zeros", experts_per_token=per_token, evaluate={"english": text})
    report = moeforge.build(wanted, tmp_path / "out", note=notes.append).routing
    said = [str(note) for note in notes if note.warning]
    load = report.load_LE()
    assert load[:, :per_token] == pytest.approx(1 / per_token)
    dead = [text for text in said if "is dead in every layer" in text]
    assert [report.experts[n] in text for n, text in zip((per_token, 2), dead, strict=False)]
    assert len(dead) == 3 - per_token
    dominating = [text for text in said if "is dominating in every layer" in text]
    assert len(dominating) == (per_token == 1)
    assert all("Take gate_mode: fitted" in text for text in said)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Expert {report.experts[2]} is dead in every layer" in card


def test_short_memory_is_said_and_changes_no_tensor(recipe, tmp_path, monkeypatch):
    notes = []
    moeforge.build(recipe(), tmp_path / "a")
    monkeypatch.setattr(routing_of, "free_memory", lambda: 1000)
    result = moeforge.build(recipe(), tmp_path / "b", note=notes.append)
    assert result.routing is None
    (said,) = [str(note) for note in notes if "was not measured" in str(note)]
    assert "moeforge route b --prompts" in said
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    assert not (tmp_path / "b" / "routing.png").exists()


# --- commands -------------------------------------------------------------------------------------


def run(*arguments):
    ran = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert ran.exit_code == 0, ran.output
    return ran.stdout


def test_build_shows_routing_and_fits(recipe, tmp_path):
    path = tmp_path / "mixture.yml"
    path.write_text(yaml.safe_dump(recipe(gate_parameters={"balance": 1})))
    data = json.loads(run("build", path, "-o", tmp_path / "json", "--json"))
    hold("build", data)
    expected = counted(tmp_path / "json", TEXTS)
    for layer, found in enumerate(data["routing"]["layers"]):
        assert found["load"] == pytest.approx(expected[layer].tolist(), abs=1e-5)
    assert [fit["layer"] for fit in data["fits"]] == list(range(tiny.LAYERS))
    short = run("build", path, "-o", tmp_path / "short")
    for share in expected.mean(0):
        assert f" {share:.0%} " in short
    assert "Fitted routers" not in short
    long = run("build", path, "-o", tmp_path / "long", "-v")
    assert "Fitted routers" in long
    assert f"{data['fits'][3]['temperature']:.3g} " in long
    first = data["routing"]["layers"][0]
    assert f"{first['load'][0]:.0%} / {first['weight'][0]:.0%}" in long


def test_tuned_routers_make_the_old_picture_untrue(recipe, text, tmp_path):
    moeforge.build(recipe(), tmp_path / "made")
    before = (tmp_path / "made" / "README.md").read_text()
    options = ["--window", 64, "--patience", 2, "--active", 3, "--steps", 3, "--held-out", text]
    command = ["tune", tmp_path / "made", "-o", tmp_path / "tuned", "--text", text, *options]
    data = json.loads(run(*command, "--json"))
    settings = data["settings"]
    assert (settings["window"], settings["patience"], settings["active"]) == (64, 2, 3)
    assert data["improved"]
    assert "routing.png" in before
    after = (tmp_path / "tuned" / "README.md").read_text()
    assert "Where tokens go" not in after
    assert not (tmp_path / "tuned" / "routing.png").exists()
    start, rest = before.split("## Where tokens go")
    told, tuned = after.split("## Routers tuned")
    assert told == start
    kept = rest.split("## ", 1)[1].split("## Recipe")[0]
    assert tuned.split("## ", 1)[1].startswith(kept)


def test_eval_takes_a_window(models, text):
    data = json.loads(run("eval", models("llama"), "--text", text, "--window", 32, "--json"))
    assert data["window"] == 32


def test_names_that_the_font_lacks_draw_in_silence(recipe, tmp_path, recwarn, capfd):
    from dataclasses import replace

    report = moeforge.build(recipe(), tmp_path / "out").routing
    capfd.readouterr()
    recwarn.clear()
    draw(replace(report, experts=("专家", "b", "c")), tmp_path / "picture.png")
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")
