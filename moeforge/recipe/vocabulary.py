"""Owns the recipe's words on tokenizers: which vocabulary, which token from where, which template.

Knows words, not tokenizers: whether a model has a token is for `moeforge.planners.vocab`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from moeforge.recipe.strict import Strict, Written, or_empty, or_none, show, wrong


def _model(value: Any) -> Any:
    # The schema imports this module, because recipes have these keys.
    from moeforge.recipe.schema import parse_model

    return parse_model(value)


def _source(value: Any) -> Any:
    return value if value in ("union", "base") else _model(value)


def _optional_source(value: Any) -> Any:
    return None if value is None else _source(value)


def _token_source(value: Any) -> Any:
    if not isinstance(value, dict):
        return None if value is None else _model(value)
    kind = value.get("kind")
    if kind == "zero":
        return Zero.model_validate(value)
    if kind == "model_token":
        return ModelToken.model_validate(value)
    if "kind" in value:
        raise wrong(f"kind is zero or model_token, got {show(kind)}")
    if "token" in value or "token_id" in value:
        raise wrong("a token of another model also needs kind: model_token")
    return _model(value)


_MODEL = {"$ref": "#/definitions/model"}
_SOURCE = {"anyOf": [{"enum": ["union", "base"]}, _MODEL]}
_TOKEN_SOURCE = {
    "anyOf": [
        _MODEL,
        {"$ref": "#/definitions/Zero"},
        {"$ref": "#/definitions/ModelToken"},
        {"type": "null"},
    ]
}


class Zero(Strict):
    """A row of zeros.

    Attributes:
        kind: "zero".
    """

    kind: Literal["zero"]


class ModelToken(Strict):
    """The row of a token of a model; exactly one of `token` and `token_id` says which.

    Attributes:
        kind: "model_token".
        model: one of the models that are merged.
        token: a token of that model's tokenizer.
        token_id: a row of that model's embeddings.
    """

    kind: Literal["model_token"]
    model: Annotated[Any, BeforeValidator(_model), Written(_MODEL)]
    token: str | None = None
    token_id: int | None = Field(default=None, ge=0, validate_default=True)

    @field_validator("token_id")
    @classmethod
    def _exactly_one(cls, token_id: int | None, info: ValidationInfo) -> int | None:
        if "token" in info.data and (info.data["token"] is None) == (token_id is None):
            raise wrong("a model_token has exactly one of token and token_id")
        return token_id


class TokenSetting(Strict):
    """Where the row of a token comes from in models that lack it.

    Attributes:
        source: a model, `Zero`, a `ModelToken`, or None for the usual rule.
        force: use it also in place of the rows of models that have the token.
    """

    source: Annotated[Any, BeforeValidator(_token_source), Written(_TOKEN_SOURCE)] = None
    force: bool = False


class Tokenizer(Strict):
    """The tokenizer of the result.

    Attributes:
        source: "union" (the base's tokens, then what the other models add), "base", or a model.
        tokens: settings by token; tokens that the tokenizer does not have yet are added.
        pad_to_multiple_of: round the number of rows up to a multiple of this.
    """

    source: Annotated[Any, BeforeValidator(_source), Written(_SOURCE)] = "union"
    tokens: Annotated[dict[str, TokenSetting], BeforeValidator(or_empty)] = Field(
        default_factory=dict
    )
    pad_to_multiple_of: int | None = Field(default=None, ge=1)


class VocabularyKeys(Strict):
    """The keys on tokenizers that merges and stacks share.

    Attributes:
        tokenizer: the tokenizer of the result; None leaves the donor's as it is.
        tokenizer_source: short for `tokenizer: {source: …}`.
        chat_template: "auto", the name of a built-in template, or a template in Jinja.
    """

    tokenizer: Tokenizer | None = None
    tokenizer_source: Annotated[
        Any,
        BeforeValidator(_optional_source),
        Written({"anyOf": [*_SOURCE["anyOf"], {"type": "null"}]}),
    ] = None
    chat_template: Annotated[str | None, BeforeValidator(or_none)] = None

    @field_validator("tokenizer_source")
    @classmethod
    def _one_way(cls, source: Any, info: ValidationInfo) -> Any:
        if source is not None and info.data.get("tokenizer") is not None:
            raise wrong("tokenizer and tokenizer_source say the same; keep one of them")
        return source

    @property
    def vocabulary(self) -> Tokenizer | None:
        """What the recipe says of the tokenizer, in whichever way; None where it says nothing."""
        if self.tokenizer_source is not None:
            return Tokenizer(source=self.tokenizer_source)
        return self.tokenizer
