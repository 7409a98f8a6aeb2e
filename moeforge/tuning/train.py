"""Owns router-only training: the loss, the steps, and when to stop.

Knows models that transformers has loaded and documents of token ids; knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moeforge.errors import BuildError, Finding
from moeforge.recipe.tuning import Tuning
from moeforge.routing import Router, chosen, recording, scored
from moeforge.tuning.data import IGNORED, Batch, Documents, draws, in_order, together
from moeforge.tuning.memory import save_memory

if TYPE_CHECKING:
    from torch import Tensor, nn

_LOOKS = 10
"""Held-out measurements in a full run."""
_WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""
_RATE = 0.38
"""Default learning rate times hidden size: an Adam step moves each of H weights by up to the rate,
and a logit by up to H times that. At H = 128, on the quickstart's `fitted` mixture, 60 steps brought
held-out loss from 2.3035 to 2.3005 with 0.001, 2.2990 with 0.003 and 2.2998 with 0.01."""
_CLIP = 1.0
_ACTIVE = ("top_k", "per_token")
"""What transformers' router modules, and those of our own code, call the experts per token."""

Teach = Callable[[Batch], "Tensor"]
"""Gives log-probabilities [tokens, vocabulary] of the teachers for the labelled tokens of a batch,
in their order."""


@dataclass(frozen=True)
class Step:
    """What one step found.

    Attributes:
        number: from 1; 0 for the measurement before the first.
        steps: how many there will be at most.
        loss: what was minimised; NaN for number 0.
        heldout: mean cross entropy on the held-out documents in nats per token, where the step
            ended with a measurement.
        load: share of the tokens' choices that each expert got, averaged over layers.
    """

    number: int
    steps: int
    loss: float
    heldout: float | None
    load: tuple[float, ...]


@dataclass
class Outcome:
    """What training came to.

    Attributes:
        start: held-out loss before it, in nats per predicted token.
        best: the lowest measured; `start` where nothing was better.
        step: number of the step it was measured after; 0 for the start.
        weights: router weights there, by name in the model, in float32 but rounded to the dtypes
            they are stored in.
        load: share of each expert on the held-out documents, before and at the best.
        history: every step.
    """

    start: float
    best: float
    step: int
    weights: dict[str, Tensor]
    load: tuple[tuple[float, ...], tuple[float, ...]]
    history: list[Step] = field(default_factory=list)


def balance_loss(router: Router, logits_TE: Tensor) -> Tensor:
    """Return the load-balance loss of one layer, 1 where the load is even.

    E·Σ_e f_e·P_e with f_e the share of the choices that fall on expert e and P_e its mean score;
    scores of sigmoid routers are divided by their sum. Source: Fedus et al., "Switch
    Transformers", arXiv 2101.03961, equations 4 to 6, for more than one expert per token.
    """
    scores = scored(logits_TE, sigmoid=router.sigmoid)
    scores = scores / scores.sum(-1, keepdim=True)
    loss: Tensor = scores.shape[1] * (choices(router, logits_TE) * scores.mean(0)).sum()
    return loss


def choices(router: Router, logits_TE: Tensor) -> Tensor:
    """Return the share of the tokens' choices that falls on each expert, [E]."""
    scores = scored(logits_TE.detach(), sigmoid=router.sigmoid)
    places = chosen(scores, router.per_token, router.bias).flatten()
    return places.bincount(minlength=scores.shape[1]).float() / len(places)


def learning_rate(settings: Tuning, hidden: int) -> float:
    """Return the peak learning rate for routers that read `hidden` values."""
    return settings.learning_rate or _RATE / hidden


def torch_device(device: str) -> Any:
    """Return the device that accelerate finds, or the CPU where `device` says so."""
    from accelerate import Accelerator

    return Accelerator(cpu=device == "cpu").device


def active_experts(settings: Tuning, per_token: int, experts: int) -> int:
    """Return how many experts each token passes through while training.

    Raises:
        BuildError: the settings ask for fewer than the mixture has, or for more than there are.
    """
    if settings.active is None:
        return min(max(per_token, 2), experts)
    if not per_token <= settings.active <= experts:
        what = f"active is {settings.active}; the mixture has {experts} experts, {per_token} active"
        raise BuildError(Finding(what, f"Give a number from {per_token} to {experts}."))
    return settings.active


@contextmanager
def _active(model: nn.Module, before: int, now: int) -> Iterator[None]:
    """Let each token pass through `now` experts instead of `before`."""
    config: Any = model.config
    places: list[tuple[Any, str]] = [
        (module, name)
        for module in model.modules()
        for name in _ACTIVE
        if getattr(module, name, None) == before
    ]
    if getattr(config, "top_k_experts", None) == before:  # gemma4 reads its config at each call
        places.append((config, "top_k_experts"))
    if now != before and not places:
        what = f"{config.model_type} models do not say where their experts per token are set"
        raise BuildError(Finding(what, f"Leave out active, or give {before}."))
    for holder, name in places:
        setattr(holder, name, now)
    try:
        yield
    finally:
        for holder, name in places:
            setattr(holder, name, before)


def _rate(step: int, steps: int) -> float:
    """Return the share of the peak rate for a step, from 0: linear up, half a cosine down."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits [tokens, vocabulary] in float32 and labels [tokens] of the labelled tokens."""
    logits_BTV = model(input_ids=batch.ids_BT, use_cache=False).logits
    labelled = batch.labels_BT != IGNORED
    return logits_BTV[labelled].float(), batch.labels_BT[labelled]


class Trainer:
    """Trains the routers of one model.

    Args:
        model: a mixture in evaluation mode, in float32; its routers are changed.
        found: its routers.
        documents: what to train on.
        settings: how.
        seed: the order of the documents follows from it.
        stored: name of each router's weight -> torch dtype that it will be stored in.
        device: torch device.
        teach: the teachers' log-probabilities; None where `settings.teach` is 0.
        progress: told every step.

    Raises:
        BuildError: `settings.active` cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Sequence[Router],
        documents: Documents,
        settings: Tuning,
        *,
        seed: int,
        stored: Mapping[str, Any],
        device: str = "cpu",
        teach: Teach | None = None,
        progress: Callable[[Step], None] = lambda step: None,
    ) -> None:
        self._model, self._found, self._documents = model, list(found), documents
        self._settings, self._seed, self._stored = settings, seed, stored
        self._device, self._teach, self._progress = device, teach, progress
        experts, self._hidden = found[0].weight.shape
        self._per_token = found[0].per_token
        self._while_training = active_experts(settings, self._per_token, experts)

    def run(self) -> Outcome:
        """Train, and leave the best weights in the model.

        Raises:
            BuildError: the model computes NaN or infinity before the first step.
        """
        import torch
        from accelerate import Accelerator

        training = self._documents.training
        settings, weights = self._settings, [router.weight for router in self._found]
        for parameter in self._model.parameters():
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        accelerator = Accelerator(cpu=self._device == "cpu")
        self._model.to(accelerator.device)
        longest = max(map(len, training))
        tokens = settings.batch * longest
        save_memory(self._model, tokens, self._while_training, accelerator.device)
        rate = learning_rate(settings, self._hidden)
        optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        optimizer = accelerator.prepare(optimizer)
        outcome = self._first_look()
        batches = draws(len(training), settings.batch, self._seed)
        every, worse = max(1, settings.steps // _LOOKS), 0
        for number in range(1, settings.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = rate * _rate(number - 1, settings.steps)
            batch = together(training, next(batches)).to(accelerator.device)
            loss, load = self._gradient(batch, accelerator)
            accelerator.clip_grad_norm_(weights, _CLIP)
            optimizer.step()
            optimizer.zero_grad()
            look = number % every == 0 or number == settings.steps
            better = self._look(outcome, number) if look and math.isfinite(loss) else None
            heldout = better[1] if better else None
            step = Step(number, settings.steps, loss, heldout, load)
            outcome.history.append(step)
            self._progress(step)
            worse = worse if better is None else 0 if better[0] else worse + 1
            if worse == settings.patience or not math.isfinite(loss):
                break
        self._put(outcome.weights)
        return outcome

    def _gradient(self, batch: Batch, accelerator: Any) -> tuple[float, tuple[float, ...]]:
        """Add up the gradient of the loss on `batch`; return the loss and each expert's load."""
        import torch
        from torch.nn.functional import cross_entropy, kl_div

        settings, real = self._settings, (batch.labels_BT != IGNORED).flatten()
        with (
            _active(self._model, self._per_token, self._while_training),
            recording(self._found) as seen,
        ):
            logits_TV, labels_T = predictions(self._model, batch)
            loss = torch.zeros((), device=logits_TV.device)
            if settings.teach < 1:
                loss = loss + (1 - settings.teach) * cross_entropy(logits_TV, labels_T)
            if settings.teach and self._teach:
                taught_TV = self._teach(batch).to(logits_TV.device)
                matched = kl_div(
                    logits_TV.log_softmax(-1), taught_TV, reduction="batchmean", log_target=True
                )
                loss = loss + settings.teach * matched
            # A layer that is computed again for its gradient records a second time: take the first.
            met = [(router, seen[router.layer][0][real]) for router in self._found]
            if settings.balance:
                spread = [balance_loss(router, logits_TE) for router, logits_TE in met]
                loss = loss + settings.balance * torch.stack(spread).mean()
            accelerator.backward(loss)
        load = torch.stack([choices(router, logits_TE) for router, logits_TE in met]).mean(0)
        return float(loss.detach()), tuple(load.tolist())

    def _heldout(self) -> tuple[float, tuple[float, ...]]:
        """Return loss and load on the held-out documents, with weights as they would be stored."""
        import torch
        from torch.nn.functional import cross_entropy

        exact = {router.name: router.weight.detach().clone() for router in self._found}
        self._put(self.stored_weights())
        total, tokens = 0.0, 0
        load = torch.zeros(len(self._found), self._found[0].weight.shape[0], dtype=torch.float64)
        with torch.no_grad():
            for batch in in_order(self._documents.heldout, self._settings.batch):
                batch = batch.to(self._found[0].weight.device)
                with recording(self._found) as seen:
                    logits_TV, labels_T = predictions(self._model, batch)
                total += float(cross_entropy(logits_TV, labels_T, reduction="sum"))
                tokens += len(labels_T)
                real = (batch.labels_BT != IGNORED).flatten()
                for row, router in enumerate(self._found):
                    part = choices(router, seen[router.layer][0][real]) * len(labels_T)
                    load[row] += part.double().cpu()
        self._put(exact)
        return total / tokens, tuple((load.mean(0) / tokens).tolist())

    def _first_look(self) -> Outcome:
        start, load = self._heldout()
        if not math.isfinite(start):
            what = f"the mixture's loss on held-out text is {start} before the first step"
            raise BuildError(Finding(what, "Check the mixture; its weights may be damaged."))
        self._progress(Step(0, self._settings.steps, math.nan, start, load))
        return Outcome(start, start, 0, self.stored_weights(), (load, load))

    def _look(self, outcome: Outcome, number: int) -> tuple[bool, float]:
        """Measure, keep what is better than all before; return whether it is, and the loss."""
        heldout, load = self._heldout()
        better = heldout < outcome.best  # never true of NaN
        if better:
            outcome.best, outcome.step = heldout, number
            outcome.weights, outcome.load = self.stored_weights(), (outcome.load[0], load)
        return better, heldout

    def stored_weights(self) -> dict[str, Tensor]:
        """Return the routers' weights by name, rounded to the dtype that each is stored in."""
        return {
            router.name: router.weight.detach().to(self._stored[router.name], copy=True).float()
            for router in self._found
        }

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        import torch

        with torch.no_grad():
            for router in self._found:
                router.weight.copy_(weights[router.name])
