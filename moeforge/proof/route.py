"""Owns running prompts through a mixture and counting which experts their tokens go to.

Leaves it to `route_watch` to see what routers decide; knows nothing of how counts are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.dense import max_positions
from moeforge.errors import BuildError, Finding
from moeforge.forward import quiet
from moeforge.gates import TokenizedPrompt
from moeforge.gates._tokenize import tokenize
from moeforge.proof.route_report import DomainCount, Mapping, RouteReport, Sample
from moeforge.proof.route_watch import Decided, Watch, on_shelf, watching
from moeforge.recipe import Prompt
from moeforge.routing import routers

if TYPE_CHECKING:
    import torch
    from torch import nn

SHOWN = 2
"""Prompts of each domain that are kept to be shown token by token."""
MOST_TOKENS = 200
"""Tokens shown of a prompt, at most."""
MOST_CELLS = 40_000
"""Tokens shown in all layers of all prompts, at most: a page of some 4 MB."""
_BATCH = 4096
"""Tokens that run side by side, at most, filled up; a longer prompt runs alone."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Domain:
    """Texts of one kind, and the experts that are right for it.

    Attributes:
        name: label.
        prompts: its texts.
        experts: numbers of the experts that are its own; empty where nobody says so.
    """

    name: str
    prompts: tuple[Prompt, ...]
    experts: tuple[int, ...] = ()


def experts_of(model: nn.Module) -> int:
    """Return how many experts each layer of a mixture has; the model may be without weights.

    Raises:
        BuildError: it is no mixture, or its layers differ.
    """
    found = routers(model)
    kind = str(model.config.model_type)  # type: ignore[union-attr]
    if not found:
        what = f"{kind} is not a mixture of experts that can be watched: it has no routers"
        raise BuildError(Finding(what, "Give a mixture of experts."))
    counts = {router.weight.shape[0] for router in found}
    if len(counts) > 1:
        several = ", ".join(map(str, sorted(counts)))
        raise BuildError(Finding(f"the layers of this {kind} have {several} experts: they differ"))
    return int(counts.pop())


def measure(
    model: nn.Module,
    tokenizer: Any,
    domains: Sequence[Domain],
    mapping: Mapping,
    labels: Sequence[str],
    *,
    name: str,
    device: str | torch.device = "cpu",
    most: int | None = None,
    progress: Progress = lambda done, total: None,
) -> RouteReport:
    """Run the prompts of every domain and count where their tokens go.

    Prompts of the types on the shelf run side by side, filled up on the right: nothing before
    depends on that, and it does not count, nor does BOS. Others run one by one, for attention
    that picks tokens by an index, such as deepseek_v32's, does depend on it.

    Args:
        model: a mixture in transformers.
        tokenizer: its tokenizer.
        domains: what is read; their `experts` are used unless `mapping` is "best".
        mapping: see `RouteReport`.
        labels: of the experts, E of them.
        name: of the model, for the report.
        device: where its input goes.
        most: tokens of each domain after which no further prompt of it is run.
        progress: told the prompts done and all of them.

    Raises:
        SourceError: a prompt has no tokens, or needs a chat template that is not there.
        BuildError: the model's routers cannot be watched, or compute NaN.
    """
    import torch

    context = max_positions(model.config.to_dict())  # type: ignore[union-attr,operator]
    read = [_tokenized(tokenizer, domain, context, most) for domain in domains]
    total, done, samples = sum(len(prompts) for prompts, _ in read), 0, []
    with watching(model) as watches, torch.inference_mode():
        side_by_side = _BATCH if on_shelf(model) else 0
        counts = _Counts(len(watches), len(domains), len(labels))
        shown = min(MOST_TOKENS, max(1, MOST_CELLS // (len(watches) * SHOWN * len(domains))))
        for d, (prompts, _) in enumerate(read):
            for batch in _batches(prompts, side_by_side):
                progress(done, total)
                for number, prompt, seen in _run(model, watches, prompts, batch, device):
                    counts.add(d, seen)
                    if number < SHOWN:
                        samples.append(_sample(domains[d].name, tokenizer, prompt, seen, shown))
                done += len(batch)
        progress(total, total)
    return RouteReport(
        model=name,
        model_type=str(model.config.model_type),  # type: ignore[union-attr]
        layers=tuple(watch.router.layer for watch in watches),
        experts=tuple(labels),
        per_token=counts.per_token,
        domains=tuple(
            DomainCount(
                domain.name,
                len(prompts),
                sum(len(p.ids) - p.first for p in prompts),
                cut,
                domain.experts,
            )
            for domain, (prompts, cut) in zip(domains, read, strict=True)
        ),
        mapping=mapping,
        choices_LDE=counts.choices_LDE,
        weights_LDE=counts.weights_LDE,
        firsts_LDE=counts.firsts_LDE,
        confidence_LD=counts.confidence_LD,
        entropy_LD=counts.entropy_LD,
        samples=tuple(samples),
    )


class _Counts:
    """Adds up what routers decide; see `RouteReport` for what is added up."""

    def __init__(self, layers: int, domains: int, experts: int) -> None:
        import numpy as np

        shape = (layers, domains, experts)
        self.choices_LDE, self.weights_LDE, self.firsts_LDE = (np.zeros(shape) for _ in range(3))
        self.confidence_LD, self.entropy_LD = np.zeros(shape[:2]), np.zeros(shape[:2])
        self.per_token = 0

    def add(self, d: int, seen: Sequence[Decided]) -> None:
        """Add a prompt of domain `d`: what was decided in each layer."""
        import torch

        size = self.choices_LDE.shape[-1]
        for layer, (chosen_TK, weights_TK, entropy_T) in enumerate(seen):
            flat = chosen_TK.flatten()
            weights_E = torch.bincount(flat, weights_TK.flatten(), minlength=size)
            self.choices_LDE[layer, d] += torch.bincount(flat, minlength=size).numpy()
            self.weights_LDE[layer, d] += weights_E.numpy()
            self.firsts_LDE[layer, d] += torch.bincount(chosen_TK[:, 0], minlength=size).numpy()
            self.confidence_LD[layer, d] += float(weights_TK[:, 0].sum())
            self.entropy_LD[layer, d] += float(entropy_T.sum())
        self.per_token = max(self.per_token, seen[0][0].shape[1])


def _batches(prompts: Sequence[TokenizedPrompt], size: int) -> Iterator[range]:
    """Yield runs of prompts that together have at most `size` tokens, filled up, or one prompt."""
    start = 0
    for end in range(1, len(prompts) + 1):
        longest = max(len(prompt.ids) for prompt in prompts[start : end + 1])
        if end == len(prompts) or longest * (end + 1 - start) > size:
            yield range(start, end)
            start = end


def _tokenized(
    tokenizer: Any, domain: Domain, context: int | None, most: int | None
) -> tuple[list[TokenizedPrompt], int]:
    """Return the prompts of a domain as token ids, and how many were cut to the context."""
    found, cut, count = [], 0, 0
    for text in domain.prompts:
        with quiet():  # it would warn that the text is longer than the model's context
            (prompt,) = tokenize(tokenizer, [(0, False, text)], None)
        ids = prompt.ids[:context]
        cut += len(ids) < len(prompt.ids)
        found.append(TokenizedPrompt(0, False, ids, prompt.first))
        count += len(ids) - prompt.first
        if most is not None and count >= most:
            break
    return found, cut


def _run(
    model: nn.Module,
    watches: Sequence[Watch],
    prompts: Sequence[TokenizedPrompt],
    batch: range,
    device: Any,
) -> list[tuple[int, TokenizedPrompt, list[Decided]]]:
    """Return number, prompt and what each layer decides for its tokens that count."""
    import torch

    longest = max(len(prompts[number].ids) for number in batch)
    ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, number in enumerate(batch):
        ids_BT[row, : len(prompts[number].ids)] = torch.tensor(prompts[number].ids)
    decoder: Any = model.base_model  # routers are in it; logits of all tokens would take memory
    decoder(input_ids=ids_BT.to(device), use_cache=False)
    decided = [watch.decided() for watch in watches]
    found = []
    for row, number in enumerate(batch):
        prompt = prompts[number]
        here = slice(row * longest + prompt.first, row * longest + len(prompt.ids))
        found.append((number, prompt, [(c[here], w[here], h[here]) for c, w, h in decided]))
    return found


def _sample(
    domain: str,
    tokenizer: Any,
    prompt: TokenizedPrompt,
    seen: Sequence[Decided],
    shown: int,
) -> Sample:
    import torch

    ids = prompt.ids[prompt.first :]
    return Sample(
        domain,
        pieces(tokenizer, ids[:shown]),
        len(ids),
        torch.stack([chosen[:shown] for chosen, _, _ in seen]).numpy(),
        torch.stack([weights[:shown] for _, weights, _ in seen]).numpy(),
    )


UNFINISHED = "·"
"""Stands for a token that is the beginning of a character; the last of its tokens shows it."""
_BEFORE = 6
"""Tokens before one that are decoded with it: some decoders drop the first token's space."""


def pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text that each token adds to those before it."""

    def text(start: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))

    found, whole = [], 0
    for end in range(1, len(ids) + 1):
        start = max(0, whole - _BEFORE)
        before, after = text(start, whole), text(start, end)
        if after.endswith("\N{REPLACEMENT CHARACTER}") and end < min(len(ids), whole + 4):
            found.append(UNFINISHED)
            continue
        found.append(after[len(before) :])
        whole = end
    return tuple(found)
