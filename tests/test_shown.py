"""Results that show themselves, and progress for Python callers."""

import io
import re
import sys
from html import unescape

import pytest
from IPython.core.formatters import DisplayFormatter
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import moeforge
from moeforge import bars


@pytest.fixture(scope="module")
def soup(models, tmp_path_factory):
    """Two models, and a build of them with everything that it noted."""
    one, two = (str(models("llama", seed=seed, num_hidden_layers=2)) for seed in (1, 2))
    recipe = {"merge_method": "linear", "models": [{"model": m} for m in (one, two)]}
    recipe["parameters"] = {"weight": 1}
    out = tmp_path_factory.mktemp("shown") / "soup"
    told = []
    result = moeforge.build(recipe, out, verify=False, note=told.append)
    assert list(result.notes) == told
    return one, two, recipe, result


def shown(thing):
    """What a notebook shows of it, as text."""
    formats, _ = DisplayFormatter().format(thing)
    assert repr(thing) == formats["text/plain"]
    return unescape(re.sub("<.*?>", "", formats["text/html"]))


def test_results_have_a_line_and_tables(soup):
    one, two, recipe, result = soup
    plan, report = moeforge.plan(recipe), moeforge.check(recipe)
    parameters = sum(tensor.spec.numel for tensor in plan.tensors)
    for thing, words, line in (
        (plan, [one, two], f"{round(parameters / 1000)} k parameters"),
        (report, ["memory", "disk", "fine"], "fine"),
        (result, [f"{result.folder}: LlamaForCausalLM"], f"made in {result.seconds:.1f} s"),
        (moeforge.diff(one, two), ["cosine", "outside"], f"{len(plan.tensors)} tensors differ"),
        (moeforge.diff(one, one), ["byte for byte"], "the same"),
        (moeforge.verify(one, forward=False), ["special ids", "ok"], f"{one}: ok"),
    ):
        assert line in repr(thing)
        assert repr(thing).startswith(f"<{type(thing).__name__} ")
        assert len(repr(thing).splitlines()) == 1
        for word in words:
            assert word in shown(thing), word


def test_what_is_wrong_is_shown(soup):
    report = moeforge.check({"merge_method": "[red]x", "models": []})
    assert "[red]x" in shown(report)
    assert "wrong: " in repr(report)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_a_terminal_is_a_line_for_each_phase(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = bars.watched(True)
    for done in (0, 50, 100, 100):
        progress("tensors", done, 100)
    progress("verify", 0, 0)
    lines = screen.getvalue().split("\n")
    assert [line.split("\r")[-1].split() for line in lines[:2]] == [
        ["tensors", "#" * 30, "100%"],
        ["verify", "#" * 30, "100%"],
    ]
    assert "\x1b" not in screen.getvalue()


def test_progress_into_a_file_is_none(capsys, soup):
    one, *_ = soup
    moeforge.diff(one, one, progress=True)
    assert capsys.readouterr() == ("", "")


def test_progress_in_a_notebook_is_one_display_that_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shell = InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    try:
        shell.kernel = object()
        published = []
        monkeypatch.setattr(shell.display_pub, "publish", lambda *a, **k: published.append(k))
        told = bars.counted(True, "verify")
        told(0, 10)
        told(10, 10)
    finally:
        InteractiveShell.clear_instance()
    assert [each.get("update", False) for each in published] == [False, True]
    assert len({each["transient"]["display_id"] for each in published}) == 1
    assert "100%" in published[1]["data"]["text/html"]


def test_a_function_is_told_itself():
    told = []
    assert bars.watched(told.append) == told.append
    assert bars.counted(told.append, "x") == told.append
    bars.watched(False)("tensors", 1, 2)
