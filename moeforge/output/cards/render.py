"""Owns the text of a card: facts as sentences and tables, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator

from moeforge.markdown import amount, block, code, plain, shortened, table
from moeforge.output.cards.facts import Facts, Mixture, Parent
from moeforge.output.cards.kept import BEGIN, END
from moeforge.output.cards.licences import shown, together
from moeforge.shown import show_size

_CODE = (
    "`trust_remote_code=True` runs {names} of this repository on your machine, with your rights. "
    "The mixture brings an architecture of its own: the classes of its family with a router and "
    "experts in place of MLPs. Read the file before you load the model, "
    "and give a commit as `revision=` when you load it from the Hub, so that what runs is what you "
    "read. Without the flag transformers refuses to load it; engines other than transformers do "
    "not know it."
)
_UNTRAINED = ("random", "uniform_random", "zeros")
_PROMPT = 60
"""Characters of a prompt that are shown."""
_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-text-to-text": "AutoModelForImageTextToText",
}


def body(facts: Facts, recipe: str) -> tuple[str, str]:
    """Return what stands before the user's text, and what stands after it.

    Args:
        facts: what is told.
        recipe: the recipe as given; empty where there is none.
    """
    above = "\n\n".join([f"# {plain(facts.name)}", _summary(facts), _size(facts)])
    return above, "\n\n".join(_sections(facts, recipe))


def card(front: str, parts: tuple[str, str], yours: str) -> str:
    """Return the whole card.

    Args:
        front: its front matter.
        parts: what `body` returned.
        yours: the user's text.
    """
    return "\n\n".join((front, parts[0], f"{BEGIN}\n{yours}\n{END}", parts[1])) + "\n"


def _sections(facts: Facts, recipe: str) -> Iterator[str]:
    yield "## Parents"
    yield _parents(facts)
    yield f"**Licence:** {together(facts.parents).said}"
    if facts.methods:
        yield "## Method"
        yield _methods(facts)
    if facts.mixture:
        yield "## Experts"
        yield from _experts(facts.mixture)
    if facts.tables:
        yield "## Measured on held-out text"
        yield "Loss in nats per token: lower is better."
        yield from facts.tables
    if facts.routing:
        yield "## Where tokens go"
        yield facts.routing
    if facts.tuned:
        yield "## Routers tuned"
        yield facts.tuned
    yield "## How to load"
    yield from _loading(facts)
    yield "## Limits"
    yield _limits(facts)
    yield "## Recipe"
    yield from _recipe(facts, recipe)


def _summary(facts: Facts) -> str:
    models = [parent for parent in facts.parents if "LoRA adapter" not in parent.roles]
    count = f"{len(models)} model{'s' * (len(models) != 1)}"
    merged = ", ".join(plain(method.title) for method in facts.methods)
    if facts.mixture:
        chosen = sum(not expert.shared for expert in facts.mixture.experts)
        what = "experts that start as copies of one model" if facts.mixture.copies else "experts"
        made = "" if facts.mixture.copies else f" made of {count}"
        text = (
            f"A mixture of {chosen} {what} ({code(facts.architecture)}){made}; each "
            f"token passes through {facts.mixture.per_token} of them. Attention, norms and "
            f"embeddings come from the base."
        )
    elif facts.kind == "stack":
        text = f"Layers of {count}, stacked ({code(facts.architecture)})."
    elif facts.kind == "extraction":
        text = (
            f"A dense model ({code(facts.architecture)}) out of a mixture of experts: in place of "
            f"the experts it has one MLP, {facts.taken}. All else is as in the mixture."
        )
    elif facts.kind == "regrouping":
        text = (
            f"A mixture ({code(facts.architecture)}) of {facts.taken} of another one, with their "
            "rows of its routers. All else is as there."
        )
    elif len(models) == 1:
        text = f"Made out of one model, as its recipe says ({code(facts.architecture)})."
    else:
        text = f"A merge of {count} ({code(facts.architecture)})."
    return text + (f" Merged by {merged}." if merged else "")


def _size(facts: Facts) -> str:
    active = (
        f", {amount(facts.active)} active per token" if facts.active != facts.parameters else ""
    )
    return (
        f"{amount(facts.parameters)} parameters{active}; {plain(facts.dtype)} weights, which take "
        f"{show_size(facts.nbytes)} of memory to load."
    )


def _parents(facts: Facts) -> str:
    rows = []
    for parent in facts.parents:
        role = plain("; ".join(parent.roles) or "input")
        commit = code(parent.commit[:7]) if parent.commit else "local folder"
        rows.append((_link(parent), role, commit, shown(parent)))
    return table(("model", "role", "revision", "licence"), rows)


def _link(parent: Parent) -> str:
    if not parent.repo:
        return code(parent.key)
    at = f"/tree/{parent.commit}" if parent.commit else ""
    return f"[{plain(parent.repo)}](https://huggingface.co/{parent.repo}{at})"


def _methods(facts: Facts) -> str:
    lines = []
    for method in facts.methods:
        name = f"[{plain(method.title)}]({method.paper})" if method.paper else plain(method.title)
        given = ", ".join(map(code, method.parameters))
        lines.append(f"- {name} ({code(method.word)}){f': {given}' if given else ''}")
    return "\n".join(lines)


def _experts(mixture: Mixture) -> Iterator[str]:
    rows, prompted = [], any(expert.prompts or expert.file for expert in mixture.experts)
    for number, expert in enumerate(mixture.experts):
        texts = [code(shortened(text, _PROMPT)) for text in expert.prompts]
        texts += [f"file {code(expert.file)}"] if expert.file else []
        label = "shared" if expert.shared else str(number)
        rows.append((label, code(expert.label), *([", ".join(texts)] if prompted else [])))
    head = ("expert", "model", *(["prompts that its router was made from"] if prompted else []))
    yield f"Router: gate mode `{mixture.gate_mode}`, {plain(mixture.gate)}."
    yield table(head, rows)


def _loading(facts: Facts) -> Iterator[str]:
    name, trust = json.dumps(facts.name, ensure_ascii=False), ""
    where = "this folder, or its owner/name on the Hub"
    if facts.sentences:
        text = (
            "from sentence_transformers import SentenceTransformer\n\n"
            f'model = SentenceTransformer({name})  # {where}\nvectors = model.encode(["a text"])'
        )
    else:
        trust = ", trust_remote_code=True" if facts.code else ""
        kind = _CLASSES.get(facts.pipeline, "AutoModel")
        words = f"{kind}, AutoTokenizer" if facts.tokenizer else kind
        text = (
            f"from transformers import {words}\n\nname = {name}  # {where}\n"
            f'model = {kind}.from_pretrained(name, dtype="auto"{trust})'
        )
        if facts.tokenizer:
            text += f"\ntokenizer = AutoTokenizer.from_pretrained(name{trust})"
    yield block(text, "python")
    if facts.code:
        yield _CODE.format(names=" and ".join(map(code, facts.code)))
    if facts.engines:
        rows = []
        for engine in facts.engines:
            how = code(engine.command) if engine.command else "not as it is"
            rows.append((plain(engine.name), how, plain("; ".join(engine.known))))
        yield table(("other software", "how", "what is known"), rows)
    if facts.tokenizer:
        yield _chat(facts)


def _chat(facts: Facts) -> str:
    if not facts.chat:
        return "It has no chat template: prompts go in as plain text."
    chat = facts.chat
    whose = f", that of {', '.join(map(code, chat.parents))}" if chat.parents else ""
    text = f"Chat template: {code(chat.file)}{whose or ', given by the recipe'}."
    if chat.others:
        others = ", ".join(map(code, chat.others))
        text += (
            f" Other parents were trained with another one ({others}): what they know may come out "
            "worse in this form."
        )
    return text


def _limits(facts: Facts) -> str:
    lines = []
    if not facts.tables:
        lines.append(
            "Not evaluated: nothing was measured when it was built. Whether it is better than its "
            "parents is not known."
        )
    else:
        before = ", before its routers were tuned" if facts.tuned_later else ""
        lines.append(f"Measured on the texts above{before}, and on nothing else.")
    if facts.mixture and facts.mixture.gate_mode in _UNTRAINED and not facts.tuned:
        lines.append(
            f"The router is not fitted to anything (`{facts.mixture.gate_mode}`): train it before "
            "use, for example with `moeforge tune`."
        )
    if facts.mixture and facts.mixture.copies and not facts.tuned:
        lines.append(
            "Its experts are copies of one model, but for noise if the recipe adds any: until it "
            "is trained, it is no better than that model and takes more memory."
        )
    if facts.kind == "regrouping" and not facts.tuned:
        lines.append(
            "Its routers are not fitted to what it has: tokens whose experts are gone go to those "
            "whose scores come next, and copies of one expert share its weight."
        )
    if facts.kind == "extraction" and facts.methods:
        lines.append(
            "The average of experts is not what their mixture computes, which weighs them anew for "
            "each token."
        )
    lines += map(plain, facts.warnings)
    lines.append(
        "What parents get wrong a merge can get wrong too. Bias, safety and factual errors of this "
        "model were not examined."
    )
    return "\n".join(f"- {line}" for line in lines)


def _recipe(facts: Facts, recipe: str) -> Iterator[str]:
    yield (
        f"Made with moeforge {plain(facts.version)}. With `moeforge.lock.json` and the same "
        "parents, `moeforge rebuild moeforge.lock.json` makes the same bytes, or says what has "
        f"changed{'; after that the routers were tuned' if facts.tuned_later else ''}."
    )
    if recipe:
        # A line of it that is a marker would be taken for one.
        yield block(recipe.replace(BEGIN, f"# {BEGIN}").replace(END, f"# {END}"), "yaml")
