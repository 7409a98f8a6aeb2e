"""The documentation site: built strictly, from what the commands, recipes and methods are."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from mkdocs.exceptions import PluginError
from pages import ROOT
from typer.testing import CliRunner

from moeforge import catalog
from moeforge.cli import app
from moeforge.methods import REQUIRED
from moeforge.recipe.kinds import KINDS

SOURCES = sorted((ROOT / "docs").glob("*.md"))


def build(to, **changes):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(to), **changes)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the whole site; strict mode makes errors of all warnings."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(folder)
    return folder


def page(site, name):
    return (site / name / "index.html").read_text()


def test_every_page_has_one_place():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    places = [
        place for part in nav for pages in part.values() for p in pages for place in p.values()
    ]
    assert sorted(places) == sorted(source.name for source in SOURCES)


class Loaded(HTMLParser):
    """Everything that a browser fetches to show a page."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(given.get("src") or "")
        if tag == "link" and given.get("rel") != "canonical":
            self.found.append(given["href"])


def test_every_page_is_there_and_rendered(site):
    assert len(SOURCES) > 20
    for source in SOURCES:
        text = page(site, "" if source.stem == "index" else source.stem)
        body = text.partition("<article")[2].partition("</article>")[0]
        prose = re.sub(r"<pre.*?</pre>|<code.*?</code>", "", body, flags=re.DOTALL)
        # What Markdown did not understand stays as it was written.
        for odd in (r"<p>[^<]*\n[-*] ", r"<p>\|", "```", r"\*\*", "<!-- (generated|method)"):
            assert not re.search(odd, prose), f"{source.name}: {odd}"


def test_nothing_is_loaded_from_elsewhere(site):
    for source in site.rglob("*.html"):
        loaded = Loaded()
        loaded.feed(source.read_text())
        assert loaded.found
        assert not [place for place in loaded.found if re.match(r"(https?:)?//", place)], source
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style


def test_the_commands_are_all_there(site):
    text = page(site, "cli")
    listed = CliRunner().invoke(app, ["--help"]).output
    names = re.findall(r"^│ ([a-z]+) ", listed, re.MULTILINE)
    assert {"build", "check", "eval"} <= set(names)
    for name in names:
        usage = CliRunner().invoke(app, [name, "--help"]).output
        section = text.partition(f'id="moeforge-{name}')[2].partition("<h2")[0]
        assert section, name
        for flag in set(re.findall(r"(?<!\w)--[a-z][a-z-]+", usage)) - {"--help"}:
            assert f"<code>{flag}" in section, f"{name} {flag}"


def test_the_keys_are_all_there(site):
    text = page(site, "reference")
    for kind in KINDS.values():
        for key, field in kind.model_fields.items():
            row = re.search(rf"<tr>\s*<td><code>{key}</code></td>(.*?)</tr>", text, re.DOTALL)
            assert row, f"{kind.__name__}: {key}"
            assert not field.is_required() or "required" in text, key
    assert "<td><code>fitted</code></td>" in text, "a default"


def test_the_methods_are_all_there(site):
    text = page(site, "methods")
    for name in catalog.names("methods"):
        method = catalog.load("methods", name, "METHOD")
        section = text.partition(f'<h3 id="{name}">')[2].partition("<h3")[0].partition("<h2")[0]
        assert method.title in section, name
        assert method.paper in section, name
        assert f"pictures/methods/{name}.svg" in section, name
        assert 'class="language-text highlight"' in section, f"{name} has no formula"
        for word, param in method.params.items():
            if param.unused:
                continue
            row = re.search(rf"<td><code>{word}</code></td>(.*?)</tr>", section, re.DOTALL)
            assert row, f"{name}: {word}"
            if param.default is REQUIRED:
                assert "required" in row[1], f"{name}: {word}"
            elif param.kind is float and param.default is not None:
                assert float(re.search(r"<code>(.+?)</code>", row[1])[1]) == param.default


def test_the_pictures_are_the_same_every_time(site, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "hooks"))
    import method_examples
    import method_pictures

    for name, picture in method_pictures.pictures.__wrapped__().items():
        assert (site / "pictures" / "methods" / f"{name}.svg").read_text() == picture
        ElementTree.fromstring(picture)
    # They show what the methods do: an average, a majority, the middle of an arc.
    case = method_examples.Case
    models = ((0.0, 0.0), (3.0, 1.0), (1.0, -5.0))
    linear, ties, slerp = method_examples.merged(
        [
            case("linear", models, {"weight": 1.0}),
            case("ties", models, {"weight": 1.0}),
            case("slerp", ((1.0, 0.0), (0.0, 1.0)), {"t": 0.5}),
        ]
    )
    assert linear == pytest.approx((4 / 3, -4 / 3))
    assert ties == pytest.approx((2, -5))
    assert slerp == pytest.approx((0.5**0.5, 0.5**0.5))


LINKED = {"index.md": "# A\n\n[there](b.md#c)", "b.md": "# B\n\n## C"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"b.md": "# B"}, "no such anchor|does not contain an anchor"),
        ({"index.md": "# A\n\n[there](c.md)"}, "'c.md'"),
        ({"d.md": "# D"}, 'not included in the "nav"'),
        ({"b.md": "## C\n\n<!-- generated: riches -->"}, 'nobody generates "riches"'),
        ({"b.md": "## C\n\n<!-- method: magic -->"}, "magic"),
    ],
    ids=["nothing", "anchor", "link", "page without a place", "reference", "method"],
)
def test_what_is_wrong_stops_the_build(changed, said, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    (tmp_path / "docs").mkdir()
    for name, text in {**LINKED, **changed}.items():
        (tmp_path / "docs" / name).write_text(text)
    where = {"docs_dir": str(tmp_path / "docs"), "nav": ["index.md", "b.md"], "extra_css": []}
    if said is None:
        build(tmp_path / "site", **where)
        return
    with pytest.raises((SystemExit, PluginError)) as stopped:
        build(tmp_path / "site", **where)
    assert re.search(said, f"{caplog.text} {stopped.value}"), caplog.text
