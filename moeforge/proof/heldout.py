"""Owns measuring models on held-out text: loss per domain, and where a mixture's tokens go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeforge.errors import BuildError, Finding
from moeforge.forward import quiet
from moeforge.markdown import plain

if TYPE_CHECKING:
    from torch import Tensor, nn

WINDOW = 256
"""Tokens per window; each begins with BOS where the tokenizer has one."""
_BATCH = 16
"""Windows per forward pass."""


@dataclass(frozen=True)
class HeldOut:
    """What was measured.

    Attributes:
        domains: labels of the texts.
        tokens: predicted tokens per domain.
        losses: for each model, mean cross entropy in nats per token for each domain.
        experts: labels of a mixture's experts; empty for other models.
        routing: for each domain, the share of router weight that each expert gets, averaged over
            tokens and layers.
    """

    domains: tuple[str, ...]
    tokens: tuple[int, ...]
    losses: dict[str, tuple[float, ...]] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    routing: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def mean(self, model: str) -> float:
        """Return the loss of `model` averaged over domains."""
        return sum(self.losses[model]) / len(self.domains)

    def tables(self) -> list[str]:
        """Return the losses, and the routing if there is one, as Markdown tables."""
        lines = [
            f"| nats/token | {' | '.join(map(plain, self.domains))} | mean |",
            "|---|" + "---:|" * (len(self.domains) + 1),
        ]
        for model, losses in self.losses.items():
            cells = " | ".join(f"{loss:.3f}" for loss in (*losses, self.mean(model)))
            lines.append(f"| {plain(model)} | {cells} |")
        tables = ["\n".join(lines)]
        if self.routing:
            lines = [
                f"| share of router weight | {' | '.join(map(plain, self.experts))} |",
                "|---|" + "---:|" * len(self.experts),
            ]
            for domain, shares in self.routing.items():
                cells = " | ".join(f"{share:.0%}" for share in shares)
                lines.append(f"| {plain(domain)} | {cells} |")
            tables.append("\n".join(lines))
        return tables


def read_text(path: Path) -> str:
    """Return the text of `path`.

    Raises:
        BuildError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        what = f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}"
        raise BuildError(Finding(what, "Convert it, for instance with iconv.")) from None
    except OSError as error:
        raise BuildError(Finding(f"{path} cannot be read: {error.strerror or error}")) from None


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Return `text` as token ids, without BOS or EOS."""
    with quiet():  # it would warn that the text is longer than the model's context
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def cut(ids: Sequence[int], bos: int | None, window: int = WINDOW) -> list[list[int]]:
    """Cut token ids into rows of `window` that each predict all of their tokens but the first.

    The first is BOS; where there is none, it is the last token of the row before, so that only
    the first token of the text is predicted by none. The last row may be shorter; it has at least
    two tokens.
    """
    shift = bos is None
    return [
        [*([bos] if bos is not None else ids[start - 1 : start]), *ids[start : start + window - 1]]
        for start in range(shift, len(ids), window - 1)
    ]


def windows(tokenizer: Any, path: Path) -> Tensor:
    """Return the text of `path` as token ids [windows, tokens]; an incomplete last one is left out.

    Raises:
        BuildError: the text cannot be read, or is shorter than one window.
    """
    import torch

    ids = tokenize(tokenizer, read_text(path))
    rows = [row for row in cut(ids, tokenizer.bos_token_id) if len(row) == WINDOW]
    if not rows:
        size = WINDOW - (tokenizer.bos_token_id is not None)
        what = f"{path} has {len(ids)} tokens, fewer than a window of {size}"
        raise BuildError(Finding(what, "Give more held-out text."))
    return torch.tensor(rows)


def summed(model: nn.Module, ids_WT: Tensor) -> float:
    """Return the cross entropy of `model` on windows `ids_WT`, summed, in nats; one forward pass.

    Logits are widened to float32 one window at a time: of a large vocabulary they are the largest
    thing in memory.
    """
    import torch

    with torch.no_grad():
        logits_WTV = model(input_ids=ids_WT, use_cache=False).logits[:, -ids_WT.shape[1] :]
        return sum(
            float(
                torch.nn.functional.cross_entropy(
                    logits[:-1].float(), ids[1:].to(logits.device), reduction="sum"
                )
            )
            for logits, ids in zip(logits_WTV, ids_WT, strict=True)
        )


def loss(model: nn.Module, ids_WT: Tensor) -> float:
    """Return the mean cross entropy of `model` on windows `ids_WT`, in nats per predicted token."""
    batches = ids_WT.split(_BATCH)  # type: ignore[no-untyped-call]
    return sum(summed(model, batch) for batch in batches) / ids_WT[:, 1:].numel()


def load_output(folder: Path, *, code: bool = False) -> nn.Module:
    """Load a finished model as a user would, in float32.

    Args:
        folder: where it is.
        code: run the program text that its config names; for what the same build has written.

    Raises:
        BuildError: a tensor is missing, unexpected, or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, output_loading_info=True, trust_remote_code=code
        )
    wrong = {kind: names for kind, names in info.items() if names}
    if wrong:
        raise BuildError(Finding(f"transformers does not load the result as it is: {wrong}"))
    loaded: nn.Module = model
    return loaded


def routing(model: nn.Module, ids_WT: Tensor) -> tuple[float, ...]:
    """Return the share of router weight of each expert, averaged over tokens and layers.

    Args:
        model: a mixture of experts in transformers.
        ids_WT: windows of token ids; a leading BOS counts like any token.
    """
    import torch

    from moeforge.routing import recording, routers

    found = routers(model)
    total = torch.zeros(found[0].weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        for batch in ids_WT.split(_BATCH):  # type: ignore[no-untyped-call]
            with recording(found) as seen:
                model(input_ids=batch, use_cache=False)
            for router in found:
                for logits in seen[router.layer]:
                    total += router.shares(logits).sum(0).double()
    return tuple((total / total.sum()).tolist())


def measure(
    texts: Mapping[str, Path],
    tokenizer: Any,
    models: Mapping[str, Callable[[], nn.Module]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[HeldOut, dict[str, Tensor]]:
    """Measure every model on every text, one model in memory at a time.

    Args:
        texts: files by domain.
        tokenizer: the tokenizer of all the models.
        models: how to load each, by label.
        progress: called with models done and their number.

    Returns:
        The losses, and the windows of each domain.
    """
    batches = {domain: windows(tokenizer, path) for domain, path in texts.items()}
    tokens = tuple(ids[:, 1:].numel() for ids in batches.values())
    report = HeldOut(tuple(texts), tokens)
    for done, (label, load) in enumerate(models.items()):
        progress(done, len(models))
        model = load()
        report.losses[label] = tuple(loss(model, ids) for ids in batches.values())
    return report, batches
