"""The text of the quickstart models: four domains, split by file, nothing downloaded.

* python: the standard library of the running CPython, without its tests (PSF-2.0);
* c: the C headers of the running CPython (PSF-2.0) and of OpenSSL 3 (Apache-2.0), from Debian's
  ``libssl-dev``;
* german, french: the manual pages of Debian's ``manpages-de`` and ``manpages-fr`` (GPL-3+, see
  PROVENANCE.md), rendered to plain text by ``man``.

Every file goes either to training or to the held-out side, never to both, and a paragraph that
already occurred in its domain is dropped.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

DOMAINS = ("python", "c", "german", "french")
SEED = 20240607
MAX_DOMAIN_BYTES = 4_000_000
HELDOUT_FILES, HELDOUT_BYTES = 10, 30_000
PROMPTS, PROMPT_CHARS = 64, (300, 400)


class Text(NamedTuple):
    """One source file: where it is from and what it says."""

    name: str
    text: str


def render_man(path: Path) -> str:
    """Render a manual page as plain text, without page header and footer, indent or hyphens."""
    command = ["man", "--no-hyphenation", "--no-justification", "-E", "UTF-8", "-l", str(path)]
    env = {**os.environ, "MANWIDTH": "90", "LC_ALL": "C.UTF-8"}
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False).stdout
    text, skip = [], False
    for line in out.splitlines()[1:-1]:
        if line[:1].strip():  # a section heading: leave out the ones that repeat in every page
            words = r"ÜBERSETZUNG|TRADUCTION|[KC]OLOPHON|COPYRIGHT|LIZENZ|LICENCE|SIGNALER|FEHLER M"
            skip = re.match(words, line) is not None
        if not skip:
            text.append(line.strip())
    return "\n".join(text)


def read_code(path: Path) -> str:
    """Read a source file without the comment blocks that state its copyright or licence."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    notice = re.compile(r"copyright|licen[sc]e", re.IGNORECASE)
    blocks = r"/\*.*?\*/\n?" if path.suffix == ".h" else r"(?:^[ \t]*#[^\n]*\n)+"
    flags = re.DOTALL | re.MULTILINE
    return re.sub(blocks, lambda m: "" if notice.search(m[0]) else m[0], text, flags=flags)


def sources(domain: str) -> tuple[list[Path], Callable[[Path], str]]:
    """Return the files of a domain and how to read one of them."""
    if domain == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages"}
        skip |= {"ensurepip", "turtledemo", "__phello__"}
        build = ("_sysconfigdata", "config-")  # written when this CPython was built
        relative = [p.relative_to(root) for p in root.rglob("*.py")]
        kept = [p for p in relative if not skip & set(p.parts) and not p.parts[0].startswith(build)]
        return [root / p for p in kept], read_code
    if domain == "c":
        roots = [Path(sysconfig.get_paths()["include"]), Path("/usr/include/openssl")]
        return [p for root in roots for p in root.rglob("*.h")], read_code
    pages = Path("/usr/share/man", {"german": "de", "french": "fr"}[domain]).glob("man*/*.gz")
    names = subprocess.run(
        ["dpkg", "-L", {"german": "manpages-de", "french": "manpages-fr"}[domain]],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [p for p in pages if str(p) in set(names) and not p.is_symlink()], render_man


def short_name(domain: str, path: Path) -> str:
    """Return the name of a source file without the folders that differ between machines."""
    if domain == "python":
        return str(path.relative_to(sysconfig.get_paths()["stdlib"]))
    top = path.parts.index("include" if domain == "c" else "man")
    return "/".join(path.parts[top + 1 :])


def collect(domain: str) -> tuple[list[Text], list[Text]]:
    """Return the training files and the held-out files of one domain, as text."""
    files, read = sources(domain)
    if not files:
        sys.exit(f"no files found for {domain}: see the docstring for the packages needed")
    rng = random.Random(f"{SEED} {domain}")
    rng.shuffle(ordered := sorted(files))
    with ThreadPoolExecutor(2) as pool:
        raw = list(pool.map(read, ordered))
    seen: set[str] = set()
    texts: list[Text] = []
    total = 0
    for path, text in zip(ordered, raw, strict=True):
        kept = []
        for paragraph in re.split(r"\n\s*\n", text.expandtabs(8)):
            key = " ".join(paragraph.split())
            if not key or (len(key) > 60 and key in seen):
                continue
            seen.add(key)
            kept.append("\n".join(line.rstrip() for line in paragraph.strip("\n").split("\n")))
        joined = "\n\n".join(kept)
        if len(joined) > 1000 and total < MAX_DOMAIN_BYTES:
            texts.append(Text(short_name(domain, path), joined + "\n"))
            total += len(joined.encode())
    cut = len(texts) // 10
    return texts[cut:], texts[:cut]


def excerpt(text: str, low: int, high: int, rng: random.Random) -> str | None:
    """Cut ``low`` to ``high`` characters from a random paragraph start to a line or word end."""
    starts = [0] + [m.end() for m in re.finditer(r"\n\n(?=\S)", text)]
    starts = [s for s in starts if len(text) - s > low]
    if not starts:
        return None
    start = rng.choice(starts)
    piece = text[start : start + high]
    ends = [m.start() for m in re.finditer(r"\n", piece) if m.start() >= low]
    ends = ends or [m.start() for m in re.finditer(r"\s", piece) if m.start() >= low]
    return piece[: ends[-1]].rstrip() if ends else None


def write_texts(
    domain: str, train: list[Text], held: list[Text], out: Path
) -> dict[str, list[str]]:
    """Write the prompts (training side) and the held-out excerpts; returns their source files."""
    rng = random.Random(f"{SEED} prompts {domain}")
    prompts: dict[str, str] = {}
    while len(prompts) < PROMPTS:
        for name, text in rng.sample(train, len(train)):
            piece = excerpt(text, *PROMPT_CHARS, rng)
            if piece and piece not in prompts and len(prompts) < PROMPTS:
                prompts[piece] = name
    lines = [json.dumps({"text": p}, ensure_ascii=False) + "\n" for p in prompts]
    (out / "prompts" / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")
    share = HELDOUT_BYTES // HELDOUT_FILES
    pieces = [
        (excerpt(text, share // 2, share, rng), name) for name, text in rng.sample(held, len(held))
    ]
    chosen = [(p, name) for p, name in pieces if p][:HELDOUT_FILES]
    joined = "\n\n".join(p for p, _ in chosen) + "\n"
    (out / "heldout" / f"{domain}.txt").write_text(joined, encoding="utf-8")
    return {"prompts": list(prompts.values()), "heldout": [name for _, name in chosen]}
