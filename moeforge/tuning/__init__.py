"""Owns router tuning from end to end: documents, teachers, training, and the tuned checkpoint.

Only router weights change; that no other byte of the weights does is checked by hashes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.dense import max_positions
from moeforge.errors import BuildError, Finding
from moeforge.output import cards
from moeforge.output.locked import renew
from moeforge.output.staging import refuse_existing, staging
from moeforge.plans import Plan
from moeforge.prepare import Prepared
from moeforge.recipe import MoeRecipe
from moeforge.recipe.tuning import Tuning
from moeforge.sources.folder import read_json
from moeforge.tuning import data, write
from moeforge.tuning.result import Tuned
from moeforge.tuning.train import Outcome, Step, Trainer, learning_rate, torch_device

if TYPE_CHECKING:
    from torch import nn

    from moeforge.tuning.data import Document, Documents
    from moeforge.tuning.teachers import Load

Told = Callable[[Step], None]
Asked = Callable[[int, int], None]


@dataclass(frozen=True)
class _Wish:
    """What is wanted of a tuning, whoever asks."""

    settings: Tuning
    documents: Documents
    seed: int
    labels: tuple[str, ...]
    teachers: Mapping[str, Load]
    device: str
    code: bool


def tune(
    folder: str | Path,
    out: str | Path,
    settings: Tuning,
    *,
    seed: int = 0,
    teachers: Sequence[str] = (),
    device: str = "cpu",
    code: bool = False,
    overwrite: bool = False,
    offline: bool = False,
    progress: Told = lambda step: None,
    teaching: Asked = lambda done, total: None,
) -> Tuned:
    """Train the routers of a finished mixture, and write it with them to another folder.

    Args:
        folder: any mixture of experts that transformers loads, in safetensors.
        out: folder of the result; the weights of `folder` are copied, and the routers patched.
        settings: text and how to train; paths are looked up from the working directory.
        seed: the order of the documents follows from it; the same seed gives the same bytes.
        teachers: dense models of the same tokenizer, by folder or Hub id; needed for `teach`.
        device: "cpu", or anything else for what accelerate finds.
        code: run the program text that the mixture's config names.
        overwrite: replace an existing model folder.
        offline: use only what is in the local Hub cache.
        progress: told every step.
        teaching: told the teachers that were asked, and their number.

    Raises:
        MoeforgeError: with what is wrong; nothing was published.
    """
    from moeforge.gates._tokenize import load_tokenizer
    from moeforge.tuning.teachers import open_teachers

    began, source, target = time.perf_counter(), Path(folder), Path(out)
    refuse_existing(target, overwrite=overwrite)
    there, mine = cards.yours_alone(target), cards.yours_alone(source)
    mine = there if there.text.strip() else mine
    if not settings.text and not settings.prompts:
        raise BuildError(Finding("there is no text to train on", "Give --text or --prompts."))
    if bool(settings.teach) != bool(teachers):
        what = "teach is 0, but there are teachers" if teachers else "there are no teachers"
        fix = "Give both --teach above 0 and dense models to learn from, or neither."
        raise BuildError(Finding(what, fix))
    config = _config(source)
    window = _window(config, settings)
    documents = _documents(load_tokenizer(source), settings, window, Path, ())
    dense = open_teachers(teachers, source, offline=offline) if teachers else {}
    wish = _Wish(settings, documents, seed, (), dense, device, code)
    with staging(target, overwrite=overwrite) as work:
        made, places = _train(source, wish, progress, teaching)
        before = write.fingerprint(source, places)
        write.copy_checkpoint(source, work)
        tuned = _finish(work, target, wish, made, places, before, began)
        renew(work, {place.span.path.name for place in places})
        _tell_card(work, tuned, mine)
    return tuned


def tune_built(
    prepared: Prepared,
    plan: Plan,
    work: Path,
    *,
    device: str = "cpu",
    progress: Told = lambda step: None,
    teaching: Asked = lambda done, total: None,
    changing: Callable[[Iterable[str]], None] = lambda files: None,
) -> Tuned | None:
    """Train the routers of the mixture that a build has just made, in its place.

    Args:
        prepared: the recipe, planned.
        plan: how the mixture was made.
        work: its folder, which nobody else sees yet.
        device: as in `tune`.
        progress: told every step.
        teaching: told the teachers that were asked, and their number.
        changing: told the names of the files that are about to be written to.

    Returns:
        What came of it; None where the recipe does not ask for it.

    Raises:
        MoeforgeError: with what is wrong.
    """
    loaded, recipe = prepared.loaded, prepared.loaded.recipe
    if not isinstance(recipe, MoeRecipe) or recipe.tune is None:
        return None
    from moeforge.gates._tokenize import load_tokenizer
    from moeforge.tuning.teachers import load_model

    assert plan.experts is not None
    settings = recipe.tune
    began, window = time.perf_counter(), _window(plan.config, settings)
    prompts = [prompt for expert in recipe.experts for prompt in loaded.expert_prompts(expert)]
    documents = _documents(load_tokenizer(work), settings, window, loaded.find, prompts)
    dense: dict[str, Load] = {}
    for entry in recipe.experts if settings.teach else ():
        for name in entry.models:
            model = prepared.planner.model(name, ("tune",))
            assert model is not None, "it was planned before"
            dense[model.label] = load_model(model)
    code, labels = bool(plan.code), plan.experts.labels
    wish = _Wish(settings, documents, recipe.seed, labels, dense, device, code)
    made, places = _train(work, wish, progress, teaching)
    before = write.fingerprint(work, places)
    if made[0].step:
        changing({place.span.path.name for place in places})
    return _finish(work, work, wish, made, places, before, began)


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        what = f"{folder} is not a model folder: it has no config.json"
        raise BuildError(Finding(what, "Give the folder of a finished mixture of experts."))
    return read_json(folder / "config.json")


def _window(config: dict[str, Any], settings: Tuning) -> int:
    return min(settings.window, max_positions(config) or settings.window)


def _documents(
    tokenizer: Any,
    settings: Tuning,
    window: int,
    find: Callable[[str], Path],
    prompts: Sequence[Any],
) -> Documents:
    """Return what the settings say to train on; `prompts` where they name no file."""
    found: list[Document] = []
    for name in settings.text:
        found += data.of_text(tokenizer, find(name), window)
    for name in settings.prompts:
        found += data.of_prompt_file(tokenizer, find(name), window)
    if not settings.text and not settings.prompts:
        found = data.of_prompts(tokenizer, prompts, window)
    heldout: list[Document] = []
    for name in settings.heldout:
        heldout += data.of_text(tokenizer, find(name), window)
    return data.split(found, heldout)


def _train(
    folder: Path, wish: _Wish, progress: Told, teaching: Asked
) -> tuple[tuple[Outcome, Mapping[str, int], float], list[write.Place]]:
    """Train the routers of the checkpoint in `folder`, which is only read."""
    from moeforge.proof.heldout import load_output
    from moeforge.routing import routers

    settings, training = wish.settings, wish.documents.training
    model: nn.Module = load_output(folder, code=wish.code)
    try:
        found = routers(model)
    except ValueError as error:
        raise BuildError(Finding(f"{folder} cannot be tuned: {error}")) from error
    places = write.places(folder, found)
    teach, best = None, {}
    if wish.teachers:
        from moeforge.tuning.teachers import Lessons

        config: Any = model.config
        size = int(config.get_text_config().vocab_size)
        batches = islice(data.draws(len(training), settings.batch, wish.seed), settings.steps)
        wanted = {n: training[n] for n in sorted({n for batch in batches for n in batch})}
        teach = Lessons(wish.teachers, wanted, size, torch_device(wish.device), teaching)
        best = dict.fromkeys(wish.teachers, 0) | Counter(teach.best.values())
    outcome = Trainer(
        model,
        found,
        wish.documents,
        settings,
        seed=wish.seed,
        stored=write.stored_dtypes(places),
        device=wish.device,
        teach=teach,
        progress=progress,
    ).run()
    return (outcome, best, learning_rate(settings, found[0].weight.shape[1])), places


def _finish(
    work: Path,
    target: Path,
    wish: _Wish,
    made: tuple[Outcome, Mapping[str, int], float],
    places: Sequence[write.Place],
    before: Mapping[str, str],
    began: float,
) -> Tuned:
    """Patch the checkpoint in `work`, and see that nothing else changed.

    Raises:
        BuildError: something did.
    """
    outcome, teachers, rate = made
    if outcome.step:
        write.patch(work, places, outcome.weights)
    after = write.fingerprint(work, places)
    if after != before:
        changed = ", ".join(
            sorted(n for n in before.keys() | after if before.get(n) != after.get(n))
        )
        what = f"{changed} changed beside its routers while they were tuned"
        raise BuildError(Finding(what, "Is another program writing to it? Check the disk."))
    return Tuned(
        folder=target,
        labels=wish.labels,
        start=outcome.start,
        best=outcome.best,
        step=outcome.step,
        steps_done=len(outcome.history),
        load=outcome.load,
        documents=(len(wish.documents.training), len(wish.documents.heldout)),
        teachers=teachers,
        settings=wish.settings,
        seed=wish.seed,
        learning_rate=rate,
        routers=tuple(place.name for place in places),
        unchanged=before,
        history=tuple(outcome.history),
        seconds=time.perf_counter() - began,
    )


def _tell_card(folder: Path, tuned: Tuned, mine: cards.Yours) -> None:
    """Say in the copied model card what was done to the model since."""
    from moeforge.tuning.tables import tuned_markdown

    said, card = tuned_markdown(tuned), folder / cards.CARD
    if cards.has_facts(folder):

        def change(facts: cards.Facts) -> cards.Facts:
            routing = "" if tuned.step else facts.routing
            before = f"{facts.tuned}\n\n" if facts.tuned else ""
            return replace(facts, routing=routing, tuned=before + said, tuned_later=True)

        cards.retell(folder, change, mine)
    elif card.is_file():
        text = card.read_text(encoding="utf-8").rstrip("\n")
        card.write_text(f"{text}\n\n## Routers tuned\n\n{said}\n", encoding="utf-8")


__all__ = ["Tuned", "Tuning", "tune", "tune_built"]
