"""Owns the licences that the Hub knows, and what follows from several of them together.

Identifiers: https://huggingface.co/docs/hub/repositories-licenses, and the licence filter of
https://huggingface.co/models. A card says what parents' cards say; it is no legal advice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeforge.markdown import code
from moeforge.output.cards.facts import Parent

_PUBLIC = "cc0-1.0 unlicense pddl wtfpl"
_PERMISSIVE = (
    "isc mit zlib bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 ncsa postgresql "
    "apple-ascl cdla-permissive-1.0 cdla-permissive-2.0 openmdw-1.0 openmdw-1.1 ecl-2.0 afl-3.0 "
    "apache-2.0 etalab-2.0 odc-by cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0"
)
_WEAK = (
    "artistic-2.0 ms-pl ofl-1.1 lppl-1.3c mpl-2.0 epl-1.0 epl-2.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr "
    "cdla-sharing-1.0"
)
_COPYLEFT = (
    "cc-by-sa-3.0 cc-by-sa-4.0 odbl gfdl osl-3.0 eupl-1.1 eupl-1.2 gpl gpl-2.0 gpl-3.0 agpl-3.0"
)
_NONCOMMERCIAL = (
    "cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 "
    "fair-noncommercial-research-license apple-amlr h-research intel-research "
    "deepfloyd-if-license"
)
_TERMS = (
    "c-uda openrail openrail++ bigscience-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m creativeml-openrail-m gemma llama2 llama3 llama3.1 llama3.2 llama3.3 "
    "llama4 grok2-community"
)
_NO_DERIVATIVES = "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0"
_VAGUE = "cc unknown other"

_GROUPS = {
    "public domain": _PUBLIC,
    "permissive": _PERMISSIVE,
    "weak copyleft": _WEAK,
    "copyleft": _COPYLEFT,
    "non-commercial": _NONCOMMERCIAL,
    "terms of use": _TERMS,
    "no derivatives": _NO_DERIVATIVES,
    "vague": _VAGUE,
}
KINDS = {word: kind for kind, words in _GROUPS.items() for word in words.split()}
"""Kind of each licence, by identifier, from the least restrictive on."""

_FREE = ("public domain", "permissive")
_SHARE = ("weak copyleft", "copyleft")

_MAY_BECOME = {
    "lgpl-2.1": "gpl-2.0 gpl-3.0",
    "lgpl-3.0": "gpl-3.0 agpl-3.0",
    "mpl-2.0": "lgpl-2.1 lgpl-3.0 gpl-2.0 gpl-3.0 agpl-3.0",
    "gpl-3.0": "agpl-3.0",
    "cc-by-sa-3.0": "cc-by-sa-4.0",
    "cc-by-sa-4.0": "gpl-3.0",
    "cc-by-nc-4.0": "cc-by-nc-sa-4.0",
}
"""Licences that let works made from them be passed on under others, which these are."""
_CLASHES = ({"apache-2.0", "gpl-2.0"},)
"""Pairs of which the stricter one forbids what the other asks for."""


@dataclass(frozen=True)
class Verdict:
    """What can be said of the licence of the whole.

    Attributes:
        license: identifier for the front matter; empty where none would be right.
        name: its name, for `other`.
        link: where its text is, for `other`.
        said: the reason, in Markdown.
    """

    license: str
    name: str
    link: str
    said: str


def shown(parent: Parent) -> str:
    """Return the licence that a parent's card names, in Markdown."""
    if parent.license == "other" and parent.license_name:
        name = code(parent.license_name)
        return f"[{name}]({parent.license_link})" if parent.license_link else name
    return code(parent.license) if parent.license else "not known"


def together(parents: Sequence[Parent]) -> Verdict:
    """Return what follows from the licences of all `parents`."""
    known = [parent for parent in parents if _is_definite(parent)]
    if not known:
        what = "No parent's card names a licence" if len(parents) > 1 else "Its card names none"
        return _none(f"{what}, so none is named here. {_ASK}")
    unknown = [parent for parent in parents if not _is_definite(parent)]
    if unknown:
        who = ", ".join(code(parent.key) for parent in unknown)
        return _none(f"No definite licence is known of {who}, so none is named here. {_ASK}")
    if forbidding := [p for p in known if KINDS.get(p.license) == "no derivatives"]:
        named = " and ".join(sorted({shown(parent) for parent in forbidding}))
        return _none(
            f"{named} does not allow modified versions to be shared, and this model is one. Do not "
            "publish it without permission of the authors."
        )
    words = {(parent.license, parent.license_name) for parent in known}
    if len(words) == 1:
        links = {parent.license_link for parent in known}
        word, name = next(iter(words))
        link = next(iter(links)) if len(links) == 1 else ""
        what = "every parent is" if len(known) > 1 else "the model that it is made from is"
        return Verdict(word, name, link, f"{shown(known[0])}, as {what}.")
    return _of_several(known)


_ASK = (
    "Ask the authors, or look into their repositories, before you share it; then add `license:` "
    "to the front matter: it is kept."
)


def _none(said: str) -> Verdict:
    return Verdict("", "", "", said)


def _is_definite(parent: Parent) -> bool:
    if parent.license == "other":
        return bool(parent.license_name)
    return KINDS.get(parent.license, "vague") != "vague"


def _of_several(parents: Sequence[Parent]) -> Verdict:
    """Return what follows from licences that differ, none of which is unknown."""
    by_word = {(parent.license, parent.license_name): parent for parent in parents}
    bound = [p for word, p in by_word.items() if KINDS[word[0]] not in _FREE]
    listed = ", ".join(sorted(map(shown, by_word.values())))
    words = {word for word, _ in by_word}
    clash = next((pair for pair in _CLASHES if pair <= words), None)
    strictest = [p for p in bound if all(_yields(other, p) for other in bound)]
    if not bound:
        order = list(KINDS)
        strictest = [max(by_word.values(), key=lambda parent: order.index(parent.license))]
    if strictest and not clash:
        found = strictest[0]
        said = (
            f"{shown(found)}, the most restrictive of the parents' licences ({listed}). The "
            "notices that the others ask for must be kept too."
        )
        return Verdict(found.license, found.license_name, found.license_link, said)
    copyleft = [p for p in bound if KINDS[p.license] in _SHARE]
    if clash or copyleft:
        return _none(
            f"The parents' licences conflict ({listed}): a copyleft licence wants the whole to be "
            "under its own terms, which the others do not allow. None is named here; ask the "
            "authors before you share the model."
        )
    return _none(
        f"The parents have several licences ({listed}), and the terms of all of them apply at the "
        "same time. No single identifier says that, so none is named here: read them all before "
        "you use or share the model."
    )


def _yields(one: Parent, other: Parent) -> bool:
    """Say whether works made from `one` may be passed on under the licence of `other`."""
    same = (one.license, one.license_name) == (other.license, other.license_name)
    return same or other.license in _MAY_BECOME.get(one.license, "").split()
