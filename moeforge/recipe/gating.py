"""Owns `gate_parameters`: what a recipe can ask of the gate mode `fitted`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from moeforge.recipe.document import unknown
from moeforge.recipe.strict import Strict, Written, show, wrong

METHODS = ("logistic", "ridge")
LABELS = ("owner", "loss")


def _word(kind: str, words: tuple[str, ...]) -> Any:
    def known(value: Any) -> Any:
        if value not in words:
            raise wrong(unknown(kind, str(value), words))
        return value

    return BeforeValidator(known)


def _balance(value: Any) -> Any:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and 0 <= value <= 1:
        return float(value)
    shares = value if isinstance(value, (list, tuple)) else ()
    numbers = [s for s in shares if isinstance(s, (int, float)) and not isinstance(s, bool)]
    if not shares or len(numbers) != len(shares) or not all(0 < s < 1e9 for s in numbers):
        what = "expected a number from 0 to 1, or a list with the wanted share of each expert"
        raise wrong(f"{what}, all above 0, got {show(value)}")
    return tuple(share / sum(numbers) for share in numbers)


_LOAD = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 1},
    ]
}


class GateParameters(Strict):
    """How the gate mode `fitted` fits.

    Attributes:
        method: "logistic", or "ridge", in closed form.
        regularization: λ, relative to the mean variance of the router's input; None lets prompts
            that the fit has not seen choose it.
        on_policy: fit on what the mixture itself computes, and not on what the base computes; None
            does so where the base is a recipe.
        labels: what says which expert is wanted: "owner", the one that a prompt is listed with, or
            "loss", those whose dense models predict the texts of `data` best.
        data: a prompts file for all experts together.
        balance: how much of the way to equal load of all experts to go, from 0 to 1, or the share
            of the load that each expert is to have.
    """

    method: Annotated[str, _word("method", METHODS), Written({"enum": [*METHODS]})] = "logistic"
    regularization: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    on_policy: bool | None = None
    labels: Annotated[str, _word("kind of labels", LABELS), Written({"enum": [*LABELS]})] = "owner"
    data: str | None = None
    balance: Annotated[Any, BeforeValidator(_balance), Written(_LOAD)] = 0.0

    @property
    def balanced(self) -> bool:
        """Whether the load is calibrated at all."""
        return bool(self.balance != 0.0)

    @model_validator(mode="after")
    def _data_goes_with_loss(self) -> GateParameters:
        if self.labels == "loss" and self.data is None:
            raise wrong("labels: loss needs data, a prompts file for all experts together")
        if self.labels == "owner" and self.data is not None:
            raise wrong("data has no owners; write labels: loss, or give experts prompts")
        return self

    def misfit(self, experts: int, per_token: int) -> str:
        """Return why the wanted load cannot be that of `experts` experts, or ""."""
        if not isinstance(self.balance, tuple):
            return ""
        if len(self.balance) != experts:
            return f"balance has {len(self.balance)} shares, the mixture {experts} experts"
        most = max(self.balance)
        if most * per_token > 1 + 1e-9:
            number = self.balance.index(most)
            return (
                f"balance wants {most:.0%} of the load for experts[{number}]; with "
                f"experts_per_token {per_token} it can have at most {1 / per_token:.0%}"
            )
        return ""
