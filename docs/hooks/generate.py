"""Owns the hook of the documentation site: what is generated takes the place of its mark.

A page says `<!-- generated: WORD -->` where a reference belongs and `<!-- method: WORD -->` where
what is known of a merge method does. Nothing that is generated is written into the repository.
"""

from __future__ import annotations

import re
from typing import Any

import command_reference
import method_pictures
import method_reference
import recipe_reference
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REFERENCES = {
    "commands": command_reference.commands,
    "recipe keys": recipe_reference.keys,
    "methods": method_reference.overview,
}
"""What makes each reference, as Markdown."""
_FILE_LINK = re.compile(r"\[([\w-]+\.md)\]\(\1(#[^)]*)?\)")
"""A link that says the name of its file, as is right where one reads files."""
_MARK = re.compile(r"^<!-- (generated|method): (.+) -->$", re.MULTILINE)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pictures of the merge methods."""
    for name, picture in method_pictures.pictures().items():
        place = f"{method_reference.PICTURES}/{name}.svg"
        files.append(File.generated(config, place, content=picture))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: Any, files: Files) -> str:
    """Put references in the place of their marks.

    Raises:
        PluginError: a mark asks for what nobody makes.
    """
    titles = _titles(config.nav)

    def titled(link: re.Match[str]) -> str:
        name, anchor = link.groups(default="")
        return f"[{titles.get(name, name)}]({name}{anchor})"

    def generated(mark: re.Match[str]) -> str:
        kind, word = mark.groups()
        if kind == "method":
            return method_reference.method(word)
        if word not in REFERENCES:
            known = ", ".join(REFERENCES)
            raise PluginError(f'{page.file.src_uri}: nobody generates "{word}"; known: {known}')
        return REFERENCES[word]()

    return _FILE_LINK.sub(titled, _MARK.sub(generated, markdown))


def _titles(nav: Any) -> dict[str, str]:
    """Return what the navigation calls each page."""
    if isinstance(nav, list):
        return {page: title for entry in nav for page, title in _titles(entry).items()}
    if isinstance(nav, dict):
        ((title, inner),) = nav.items()
        return {inner: title} if isinstance(inner, str) else _titles(inner)
    return {}
