"""Owns what a build finds out about its result: held-out losses, routing, and the card that tells.

Nothing here changes a tensor.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moeforge import targets, tuning
from moeforge.errors import Finding
from moeforge.output import cards
from moeforge.plans import Plan
from moeforge.prepare import Prepared
from moeforge.recipe import MoeRecipe, Prompt
from moeforge.tables import short_labels
from moeforge.tuning.tables import tuned_markdown

if TYPE_CHECKING:
    from torch import nn

    from moeforge.proof.heldout import HeldOut
    from moeforge.proof.route import Domain
    from moeforge.proof.route_report import RouteReport

Progress = Callable[[str, int, int], None]

_PIECE = 1000
"""Characters of held-out text that run as one prompt."""
_PIECES = 20
"""Such pieces at most: more tokens than are looked at, whatever the tokenizer."""
_COMMANDS = {
    "transformers4": "from_pretrained, as above",
    "vllm": "vllm serve {}",
    "llama.cpp": "python convert_hf_to_gguf.py {}",
    "mlx": "mlx_lm.generate --model {}",
}
"""How engines load a folder or a repository."""


@dataclass(frozen=True)
class Measured:
    """What was found out about a result.

    Attributes:
        heldout: losses on held-out text, if the recipe asks for them.
        routing: where a mixture sends the prompts that its routers were made from, or held-out
            text; None where there is no text to send, or no memory for the result.
    """

    heldout: HeldOut | None
    routing: RouteReport | None


def measure_and_tell(
    prepared: Prepared,
    plan: Plan,
    work: Path,
    target: Path,
    tuned: tuning.Tuned | None,
    progress: Progress,
    note: Callable[[Finding], None],
) -> Measured:
    """Measure the finished result in folder `work`, and write its card and heat map there.

    Args:
        prepared: the recipe, with the prompts that were used.
        plan: how the result was made.
        work: its folder, which nobody else sees yet.
        target: the folder that it will be, whose card may have text of the user's already.
        tuned: what training the routers came to, if they were.
        progress: told what is done.
        note: told what its routing gives cause for.

    Raises:
        BuildError: a held-out text is too short, the result cannot be run, or what is the user's
            in the card at `target` cannot be told.
    """
    name = target.name
    heldout, model = _heldout(prepared, plan, work, progress)
    routing = _routing(prepared, plan, work, name, model, progress, note)
    shown = ""
    if routing:
        from moeforge.proof.route_map import draw
        from moeforge.proof.route_summary import as_markdown

        draw(routing, work / cards.PICTURE)
        shown = as_markdown(routing, cards.PICTURE)
    facts = cards.gather(
        plan,
        prepared.loaded.recipe,
        name,
        work,
        engines=tuple(_engines(plan, name)),
        warnings=[note.what for note in prepared.notes() if note.warning],
    )
    tables = tuple(heldout.tables()) if heldout else ()
    said = tuned_markdown(tuned) if tuned else ""
    facts = replace(facts, tables=tables, routing=shown, tuned=said)
    cards.write(work, facts, cards.yours_alone(target))
    return Measured(heldout, routing)


def _engines(plan: Plan, name: str) -> Iterator[cards.Engine]:
    """Yield what is known of other engines that run language models."""
    if not str((plan.config.get("architectures") or [""])[0]).endswith("ForCausalLM"):
        return
    kind = str(plan.config.get("model_type"))
    for target, engine in targets.TARGETS.items():
        errors, notes = targets.report(plan, target)
        known = [finding.what for finding in (errors or notes)]
        if not errors and plan.experts and kind in targets.RUN[target].split():
            known[-1] = "mixtures of this architecture were run there: equal logits"
        command = "" if errors else _COMMANDS[target].format(shlex.quote(name))
        yield cards.Engine(engine, command, tuple(known))


def _heldout(
    prepared: Prepared, plan: Plan, work: Path, progress: Progress
) -> tuple[HeldOut | None, nn.Module | None]:
    """Return what the recipe wants to be measured, and the result where it is in memory then."""
    recipe = prepared.loaded.recipe
    if not recipe.evaluate:
        return None, None
    from moeforge.evaluate import evaluate_result

    texts = {label: prepared.loaded.find(text) for label, text in recipe.evaluate.items()}
    return evaluate_result(prepared.planner, recipe, plan, work, texts, progress)


def _routing(
    prepared: Prepared,
    plan: Plan,
    work: Path,
    name: str,
    model: nn.Module | None,
    progress: Progress,
    note: Callable[[Finding], None],
) -> RouteReport | None:
    recipe = prepared.loaded.recipe
    if not isinstance(recipe, MoeRecipe) or len(recipe.experts) < 2:
        return None  # a single expert gets everything
    assert plan.experts is not None
    labels = _distinct(short_labels(plan.experts.labels))
    domains = _domains(prepared, recipe, labels)
    if not domains:
        return None
    from moeforge.proof.route_summary import warnings
    from moeforge.proof.routing_of import short

    def told(done: int, total: int) -> None:
        progress("routing", done, total)

    found = short(work, domains, labels, name=name, model=model, progress=told)
    if isinstance(found, Finding):
        note(found)
        return None
    found = found.alike()
    for finding in warnings(found, fitted=recipe.gate_mode == "fitted"):
        note(finding)
    return found


def _distinct(labels: Sequence[str]) -> list[str]:
    """Return labels that all differ: a model that is several experts gets its numbers."""
    counts = Counter(labels)
    return [
        label if counts[label] == 1 else f"{label} ({number})"
        for number, label in enumerate(labels)
    ]


def _domains(prepared: Prepared, recipe: MoeRecipe, labels: Sequence[str]) -> list[Domain]:
    """Return the texts that the routers were made from, by expert; else the held-out texts."""
    from moeforge.proof.route import Domain

    used = [(whose, text) for whose, negative, text in prepared.prompts if not negative]
    if not used and recipe.tune:  # the gates read none, but training does
        used = [
            (number, text)
            for number, expert in enumerate(recipe.experts)
            for text in prepared.loaded.expert_prompts(expert)
        ]
    # Behind the experts are shared ones, which no router chooses; -1 are texts without an owner.
    by_expert = {number: [t for n, t in used if n == number] for number in range(-1, len(labels))}
    found = [
        Domain(labels[number], tuple(texts), (number,)) if number >= 0 else _loose(recipe, texts)
        for number, texts in by_expert.items()
        if texts
    ]
    if found:
        return found
    return [
        Domain(label, tuple(_pieces(prepared.loaded.find(text))))
        for label, text in recipe.evaluate.items()
    ]


def _loose(recipe: MoeRecipe, texts: Sequence[Prompt]) -> Domain:
    from moeforge.proof.route import Domain

    return Domain(Path(recipe.gate_parameters.data or "data").stem, tuple(texts))


def _pieces(path: Path) -> Iterator[Prompt]:
    """Yield the beginning of a held-out text in pieces."""
    from moeforge.proof.heldout import read_text

    text = read_text(path)[: _PIECE * _PIECES]
    for start in range(0, len(text), _PIECE):
        yield Prompt(text=text[start : start + _PIECE])
