"""Owns building again what a lock file tells of, and saying what came out otherwise, and why."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeforge import hashes, recipe
from moeforge.errors import Finding, SourceError
from moeforge.forge import Progress, Result, build
from moeforge.output.lock import (
    HASHED,
    NAME,
    describe,
    inputs,
    output_entry,
    read_lock,
    recipe_files,
    versions,
)
from moeforge.output.locked import built
from moeforge.prepare import prepare
from moeforge.shown import Shown
from moeforge.sources import Source


@dataclass(frozen=True, repr=False)
class Rebuilt(Shown):
    """A build made again.

    Attributes:
        result: the build.
        differing: output files whose bytes are others than the lock says, or that only one has.
        unsure: inputs of which the lock has no full hash, and that may have changed unseen.
        versions: packages whose version is another, with the one then and the one now.
    """

    result: Result
    differing: tuple[str, ...]
    unsure: tuple[str, ...]
    versions: Mapping[str, tuple[str | None, str | None]]

    @property
    def same(self) -> bool:
        """Whether every file has the bytes that the lock says."""
        return not self.differing


def rebuild(
    lock: str | Path,
    out: str | Path | None = None,
    *,
    root: str | Path = ".",
    threads: int | None = None,
    overwrite: bool = False,
    offline: bool = False,
    verify: bool = True,
    progress: Progress | bool = False,
    note: Callable[[Finding], None] = lambda finding: None,
) -> Rebuilt:
    """Build again what a lock file tells of, from the same inputs, and compare the bytes.

    Args:
        lock: a lock file, or the folder that it lies in.
        out: output folder; the name of the recipe in the working directory if None.
        root: folder that the recipe lay in: relative paths in it are looked up there, then in the
            working directory.
        threads: workers; one per core if None.
        overwrite: replace an existing model folder.
        offline: use only what is in the local Hub cache.
        verify: check the output before it is published.
        progress: as in `build`.
        note: told at once what is worth knowing.

    Raises:
        SourceError: it is no lock file, or inputs have changed; all of them are named, and nothing
            was built.
        MoeforgeError: what `build` raises.
    """
    path = Path(lock)
    path = path / NAME if path.is_dir() else path
    data = read_lock(path)
    loaded = _recipe(data, path, Path(root))
    changed = [*_absent(data["inputs"], loaded), *_changed_files(data["files"], loaded)]
    if any(finding.fix for finding in changed):  # nothing that is not there can be opened
        raise SourceError(*changed)
    plan = prepare(loaded, offline=offline).plan
    unsure: list[str] = []
    for source in inputs(plan):
        changed += _changed_inputs(source, data["inputs"].get(source.key), unsure)
    if changed:
        fix = "Bring them back as they were, or build the recipe anew."
        raise SourceError(*changed, Finding(f"{path} cannot be rebuilt from these inputs", fix))
    now = versions()
    others = {
        package: (data["versions"].get(package), now.get(package))
        for package in sorted(data["versions"].keys() | now.keys())
        if data["versions"].get(package) != now.get(package)
    }
    for package, (then, today) in others.items():
        note(Finding(f"{package} was {then}, and is {today} now: bytes may differ"))
    settings = data["settings"]
    result = build(
        loaded,
        out,
        device=settings["device"],
        shard_size=settings["shard_size"],
        threads=threads,
        overwrite=overwrite,
        offline=offline,
        verify=verify,
        progress=progress,
        note=note,
    )
    # What was tuned after the build is compared as the build had made it.
    new, wanted = read_lock(result.folder / NAME), built(data)
    made = new["outputs"]
    if new["lock"] != data["lock"]:  # one of before, which hashes otherwise
        kind = HASHED[data["lock"]]
        made = {name: output_entry(result.folder / name, kind) for name in made}
    names = sorted(made.keys() | wanted.keys())
    differing = tuple(name for name in names if made.get(name) != wanted.get(name))
    return Rebuilt(result, differing, tuple(unsure), others)


def _recipe(data: Mapping[str, Any], path: Path, root: Path) -> recipe.LoadedRecipe:
    """Return the recipe in a lock, with the commits that it was built from.

    Raises:
        SourceError: somebody has changed it.
    """
    text = data["recipe"].get("text")
    if not isinstance(text, str) or (
        hashlib.sha256(text.encode()).hexdigest() != data["recipe"].get("sha256")
    ):
        what = f"the recipe in {path} is not the one that was built: its SHA-256 is another"
        raise SourceError(Finding(what, "Build a changed recipe with `moeforge build`."))
    commits = {key: entry["commit"] for key, entry in data["inputs"].items() if entry.get("commit")}
    return replace(recipe.parse(text, root, data["name"]), commits=commits)


def _absent(wanted: Mapping[str, Any], loaded: recipe.LoadedRecipe) -> Iterator[Finding]:
    """Yield the inputs on this machine that are not where the recipe says."""
    for key, entry in wanted.items():
        if not entry.get("commit") and not loaded.find(key).exists():
            what = f"{key} is not there (looked in {loaded.folder} and .)"
            yield Finding(what, "--root names the folder that the recipe lay in.")


def _changed_files(wanted: Mapping[str, Any], loaded: recipe.LoadedRecipe) -> Iterator[Finding]:
    """Yield the files that the recipe names and that are not what they were."""
    found = recipe_files(loaded.document.data, loaded.find)
    for name, entry in wanted.items():
        if name not in found:
            what = f"{name}, which the recipe names, is not there (looked in {loaded.folder} and .)"
            yield Finding(what, "--root names the folder that the recipe lay in.")
        elif found[name] != entry:
            yield Finding(f"{name}, which the recipe names, has changed")


def _changed_inputs(
    source: Source, wanted: Mapping[str, Any] | None, unsure: list[str]
) -> Iterator[Finding]:
    """Yield what is not as it was in an input; add it to `unsure` if that cannot be known."""
    if wanted is None:
        yield Finding(f"{source.key} is not among the inputs of the lock file")
        return
    found = describe(source)
    for name in sorted(wanted["files"].keys() | found["files"].keys()):
        then, now = wanted["files"].get(name), found["files"].get(name)
        if then is None or now is None:
            yield Finding(f"{source.key}: {name} {'is new' if then is None else 'is missing'}")
            continue
        if then["size"] != now["size"]:
            yield Finding(f"{source.key}: {name} had {then['size']} bytes, it has {now['size']}")
        elif "sha256" in then:
            assert source.folder is not None, "inputs have folders"
            digest = now.get("sha256") or hashes.sha256(source.folder / name)
            if digest != then["sha256"]:
                yield Finding(f"{source.key}: {name} has changed: its SHA-256 is another")
        elif then.get("sample") != now.get("sample"):
            yield Finding(f"{source.key}: {name} has changed: a sample of its bytes is another")
        else:
            unsure.append(f"{source.key}: {name}")
