"""Owns router-only training: the loss, the steps, and when to stop.

Knows models that transformers has loaded and documents of token ids; knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moeforge.errors import BuildError, Finding
from moeforge.recipe.tuning import Tuning
from moeforge.routing import Router, recording
from moeforge.tuning.active import active, active_experts
from moeforge.tuning.data import IGNORED, Batch, Documents, draws, in_order, together
from moeforge.tuning.memory import save_memory
from moeforge.tuning.objective import balance_loss, choices, predictions

if TYPE_CHECKING:
    from torch import Tensor, nn

_LOOKS = 10
"""Held-out measurements in a full run."""
_WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""
_RATE = 0.38
"""Default learning rate times hidden size: an Adam step moves each of H weights by up to the rate,
and a logit by up to H times that. At H = 128, on the quickstart's `fitted` mixture, 60 steps
brought held-out loss from 2.3035 to 2.3005 with 0.001, 2.2990 with 0.003, 2.2998 with 0.01."""
_CLIP = 1.0

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


def learning_rate(settings: Tuning, hidden: int) -> float:
    """Return the peak learning rate for routers that read `hidden` values."""
    return settings.learning_rate or _RATE / hidden


def torch_device(device: str) -> Any:
    """Return the device that accelerate finds, or the CPU where `device` says so."""
    from accelerate import Accelerator

    return Accelerator(cpu=device == "cpu").device


def _rate(step: int, steps: int) -> float:
    """Return the share of the peak rate for a step, from 0: linear up, half a cosine down."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


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

        training, settings = self._documents.training, self._settings
        weights = [router.weight for router in self._found]
        accelerator = Accelerator(cpu=self._device == "cpu")
        self._make_ready(accelerator.device)
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

    def _make_ready(self, device: Any) -> None:
        """Freeze all but the routers, move to the device, and see to the memory of a step."""
        self._model.requires_grad_(False)
        for router in self._found:
            router.weight.requires_grad_(True)
        self._model.to(device)
        longest = max(map(len, self._documents.training))
        save_memory(self._model, self._settings.batch * longest, self._while_training, device)

    def _gradient(self, batch: Batch, accelerator: Any) -> tuple[float, tuple[float, ...]]:
        """Add up the gradient of the loss on `batch`; return the loss and each expert's load."""
        import torch
        from torch.nn.functional import cross_entropy, kl_div

        settings, real = self._settings, (batch.labels_BT != IGNORED).flatten()
        with (
            active(self._model, self._per_token, self._while_training),
            recording(self._found) as seen,
        ):
            logits_TV, labels_T = predictions(self._model, batch)
            loss = torch.zeros((), device=logits_TV.device)
            if settings.teach < 1:
                loss = loss + (1 - settings.teach) * cross_entropy(logits_TV, labels_T)
            if settings.teach:
                assert self._teach is not None, "nobody teaches"
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
