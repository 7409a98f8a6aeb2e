"""Owns the model card: README.md with front matter that the Hub understands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeforge import methods
from moeforge.plans import ROUTERS, Merge, Plan, walk
from moeforge.sources import Source
from moeforge.version import __version__

_CODE = (
    "`trust_remote_code=True` runs {names} of this repository on your machine, with your rights. "
    "The mixture brings an architecture of its own: the classes of its family with a router and "
    "experts in place of MLPs. Read the file before you load the model, "
    "and give a commit as `revision=` when you load it from the Hub, so that what runs is what you "
    "read. Without the flag transformers refuses to load it; engines other than transformers do "
    "not know it."
)

_ROUTING = "## Where tokens go"
PICTURE = "routing.png"
"""The heat map beside the card, which shows it."""


@dataclass(frozen=True)
class Card:
    """What the card tells beyond the plan.

    Attributes:
        name: name of the model.
        recipe: the recipe as given.
        tables: Markdown tables of what was measured; may be empty.
        routing: where a mixture sends its tokens, in Markdown; may be empty.
    """

    name: str
    recipe: str
    tables: Sequence[str] = ()
    routing: str = ""


def _hub_id(source: Source) -> str | None:
    return getattr(source, "repo_id", None)


def _is_adapter(source: Source) -> bool:
    return "peft_type" in source.config


def _link(source: Source) -> str:
    repo = _hub_id(source)
    return f"[{repo}](https://huggingface.co/{repo})" if repo else f"`{source.key}`"


def _front_matter(plan: Plan) -> str:
    from huggingface_hub import ModelCardData

    kind = {"moe": ["moe"], "stack": ["frankenmerge"], "merge": []}[plan.kind]
    parents = [repo for source in plan.sources.values() if (repo := _hub_id(source))]
    data = ModelCardData(
        base_model=parents or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", *kind, "moeforge"],
    )
    # The Hub shows "merge" relations only where there are parents to relate to.
    extra = "\nbase_model_relation: merge" if parents else ""
    return f"---\n{data.to_yaml()}{extra}\n---"


def amount(count: int) -> str:
    """Return a number of parameters for people: 1.23 B, 851 M, 940 k."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _method_words(plan: Plan) -> str:
    words = {part.method for t in plan.tensors for part in walk(t.expr) if isinstance(part, Merge)}
    named = []
    for word in sorted(words - {"passthrough"}):
        method = methods.load(word)
        named.append(f"[{method.title}]({method.paper})" if method.paper else method.title)
    return ", ".join(named)


def _summary(plan: Plan) -> str:
    count = sum(key != ROUTERS and not _is_adapter(s) for key, s in plan.sources.items())
    merged = _method_words(plan)
    if plan.experts:
        e = plan.experts
        text = (
            f"A mixture of {len(e.labels)} experts ({plan.config['architectures'][0]}); each token "
            f"passes through {e.per_token} of them. Attention, norms and embeddings come from the "
            f"base; the router was initialised by `{e.gate_mode}`."
        )
    elif plan.kind == "stack":
        text = f"Layers of {count} model{'s' if count > 1 else ''}, stacked."
    else:
        text = f"A merge of {count} model{'s' if count > 1 else ''}."
    return text + (f" Merged by {merged}." if merged else "")


def _parents(plan: Plan) -> str:
    rows = ["| model | role |", "|---|---|"]
    for key, source in plan.sources.items():
        if key == ROUTERS:
            continue
        roles = ["base"] if plan.experts and key == plan.experts.base else []
        if plan.experts and key in plan.experts.labels:
            numbers = [str(i) for i, label in enumerate(plan.experts.labels) if label == key]
            roles.append(f"expert {', '.join(numbers)}")
        if source is plan.donor:
            roles.append("config and tokenizer")
        if _is_adapter(source):
            roles.append("LoRA adapter")
        rows.append(f"| {_link(source)} | {'; '.join(roles) or 'input'} |")
    return "\n".join(rows)


def render(plan: Plan, card: Card) -> str:
    """Return the text of README.md."""
    active = ""
    if plan.active_parameters != plan.parameters:
        active = f", {amount(plan.active_parameters)} active per token"
    dtype = plan.config.get("dtype", "")
    memory = f"{plan.nbytes / 1e9:.2f} GB" if plan.nbytes >= 1e7 else f"{plan.nbytes / 1e6:.2f} MB"
    parts = [
        _front_matter(plan),
        f"# {card.name}",
        _summary(plan),
        f"{amount(plan.parameters)} parameters{active}; {dtype} weights, {memory} in memory.",
        "## Parents",
        _parents(plan),
    ]
    if card.tables:
        parts += ["## Measured on held-out text", *card.tables]
    if card.routing:
        parts += [_ROUTING, card.routing]
    trust = ", trust_remote_code=True" if plan.code else ""
    parts += [
        "## How to load",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{card.name}", dtype="auto"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{card.name}"{trust})\n'
        "```",
        *([_CODE.format(names=" and ".join(f"`{name}`" for name in plan.code))] if trust else []),
        "## Recipe",
        f"Made with moeforge {__version__} (`moeforge build moeforge.yml`).",
        f"```yaml\n{card.recipe.rstrip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def forget_routing(folder: Path) -> None:
    """Remove from the card in `folder` where tokens go, and its heat map: the routers changed."""
    file = folder / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    start = text.find(f"{_ROUTING}\n")
    if start < 0:
        return
    end = text.find("\n## ", start) + 1 or len(text)
    file.write_text(text[:start] + text[end:], encoding="utf-8")
    (folder / PICTURE).unlink(missing_ok=True)
