"""Owns the recipe language: which keys there are, their types, and what each means.

Knows words, not models: whether layers exist or shapes agree is for `moeforge.planners`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from moeforge import catalog, tensors
from moeforge.errors import nearest
from moeforge.recipe.document import unknown
from moeforge.recipe.parameters import Condition, Parameters


def _wrong(message: str) -> PydanticCustomError:
    # Braces would be read as placeholders by pydantic's message templates.
    return PydanticCustomError("recipe", "{message}", {"message": message})


class Strict(BaseModel):
    """A mapping whose unknown keys are errors that name the nearest known key."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    not_yet: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _report_unknown_keys(cls, data: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, dict):
            raise _wrong(f"expected a mapping with {_keys(cls)}, got {data!r}")
        known = tuple(cls.model_fields)
        problems: list[InitErrorDetails] = []
        for key in data:
            if key in cls.not_yet:
                message = f'"{key}" is not supported by this version of moeforge'
            elif key not in known:
                hint = nearest(str(key), known) or f" Known here: {', '.join(known)}."
                message = f'unknown key "{key}"{hint}'
            else:
                continue
            problems.append({"type": _wrong(message), "loc": (key,), "input": None})
        result = None
        try:
            result = handler({key: value for key, value in data.items() if key in known})
        except ValidationError as error:
            problems.extend(_details(error))
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return result


def _keys(cls: type[BaseModel]) -> str:
    required = [name for name, field in cls.model_fields.items() if field.is_required()]
    return ", ".join(required or list(cls.model_fields)[:3])


def _details(error: ValidationError) -> list[InitErrorDetails]:
    """Turn pydantic's errors back into details, in the words of this project."""
    details: list[InitErrorDetails] = []
    for item in error.errors(include_url=False):
        message = item["msg"]
        if item["type"] == "too_short" and item["input"]:
            continue  # its items were dropped because they are wrong, and are reported themselves
        if item["type"] == "missing":
            message = "required, but missing"
        elif item["type"] != "recipe":
            message = f"{message}, got {item['input']!r}"
        details.append({"type": _wrong(message), "loc": item["loc"], "input": None})
    return details


# --- where a model may stand ---------------------------------------------------------------------


class Reference(Strict):
    """A checkpoint: a local folder or a repository on the Hugging Face Hub.

    Attributes:
        model: path, relative to the recipe or to the working directory, or a Hub id.
        revision: branch, tag or commit on the Hub.
        subfolder: folder inside the repository or path that holds config.json.

    """

    not_yet = ("lora", "override_architecture")

    model: str = Field(min_length=1)
    revision: str | None = None
    subfolder: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return "/".join(filter(None, (self.model, self.subfolder))) + revision


def _parse_model(value: Any) -> Any:
    """Turn `path-or-id[@revision]`, a mapping or an inline recipe into its model."""
    if isinstance(value, Strict):
        return value
    if isinstance(value, str):
        path, at, revision = value.partition("@")
        if "+" in value:
            raise _wrong(
                f'"{value}" names a LoRA adapter after "+", which this version of moeforge does '
                "not apply; merge the adapter into its base first"
            )
        if not path or "@" in revision or (at and not revision):
            raise _wrong(f'"{value}" is not of the form path-or-id[@revision]')
        return Reference(model=path, revision=revision or None)
    if isinstance(value, dict):
        if any(key in value for key in KINDS):
            inline = parse_kind(value)
            if isinstance(inline, MoeRecipe):
                raise _wrong("a mixture of experts cannot be an input of another recipe")
            return inline
        if "merge_method" in value:
            raise _wrong("an inline recipe needs one of: models, slices")
        return Reference.model_validate(value)
    raise _wrong(f"expected a model (path, Hub id or inline recipe), got {value!r}")


Model = Annotated[Any, BeforeValidator(_parse_model)]
"""A `Reference`, or an inline `MergeRecipe` or `StackRecipe`."""


# --- words from the shelves ----------------------------------------------------------------------


def _method(word: str) -> str:
    if word not in catalog.names("methods"):
        raise _wrong(unknown("merge method", word, catalog.names("methods")))
    return word


def _gate_mode(word: str) -> str:
    if word not in catalog.names("gates"):
        raise _wrong(unknown("gate mode", word, catalog.names("gates")))
    return word


def _architecture(word: str) -> str:
    families = catalog.names("families")
    if word != "auto" and not any(name.startswith(word.lower()) for name in families):
        raise _wrong(unknown("architecture", word, ("auto", *families)))
    return word


def _dtype(word: str) -> str:
    name = word.removeprefix("torch.")
    if name not in tensors.OUTPUT_NAMES:
        raise _wrong(unknown("dtype", word, tensors.OUTPUT_NAMES))
    return name


MethodName = Annotated[str, AfterValidator(_method)]
DTypeName = Annotated[str, AfterValidator(_dtype)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


# --- merges and stacks ---------------------------------------------------------------------------


class MergeInput(Strict):
    """One entry of `models`."""

    model: Model
    parameters: Parameters = Field(default_factory=dict)


class SliceSource(Strict):
    """One entry of a slice's `sources`; `layer_range` is [start, end), end exclusive."""

    model: Model
    layer_range: tuple[int, int]
    parameters: Parameters = Field(default_factory=dict)


class Slice(Strict):
    """A run of output layers, merged from equally long layer ranges of one or more models."""

    not_yet = ("residual_weight",)

    sources: tuple[SliceSource, ...] = Field(min_length=1)
    base_model: Model | None = None
    parameters: Parameters = Field(default_factory=dict)


class Evaluate(Strict):
    """Held-out texts that the build ends with: the loss of the result and of its parts on them.

    Attributes:
        texts: UTF-8 text files by label.
        compare: further models to measure.

    """

    texts: dict[str, str] = Field(min_length=1)
    compare: tuple[Model, ...] = ()


class Recipe(Strict):
    """What all kinds share.

    Attributes:
        dtype: dtype of the result; None keeps the inputs' own.
        evaluate: what to measure at the end of the build.

    """

    dtype: DTypeName | None = None
    evaluate: Evaluate | None = None


class MergeRecipe(Recipe):
    """A merge of whole models, tensor by tensor."""

    not_yet = ("modules", "tokenizer", "tokenizer_source", "chat_template")

    merge_method: MethodName
    models: tuple[MergeInput, ...] = Field(min_length=1)
    base_model: Model | None = None
    parameters: Parameters = Field(default_factory=dict)
    out_dtype: DTypeName | None = None


class StackRecipe(Recipe):
    """A stack of layer ranges ("frankenmerge")."""

    not_yet = ("modules", "tokenizer", "tokenizer_source", "chat_template")

    slices: tuple[Slice, ...] = Field(min_length=1)
    merge_method: MethodName = "passthrough"
    base_model: Model | None = None
    parameters: Parameters = Field(default_factory=dict)
    out_dtype: DTypeName | None = None


# --- mixtures of experts -------------------------------------------------------------------------


class Expert(Strict):
    """A model whose MLPs become one expert in every layer.

    Attributes:
        positive_prompts: texts that should reach this expert.
        negative_prompts: texts that should not.
        prompts_file: `.txt` (blank line between prompts) or `.jsonl` (`{"text": …}` or
            `{"messages": […]}` per line), added to `positive_prompts`.
        residual_scale: factor on the expert's down projection.

    """

    source_model: Model
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    prompts_file: str | None = None
    residual_scale: float = 1.0
    noise_scale: float = 0.0

    @model_validator(mode="after")
    def _no_noise(self) -> Expert:
        if self.noise_scale:
            raise _wrong("noise_scale other than 0 is not supported by this version of moeforge")
        return self


class MoeRecipe(Recipe):
    """A mixture of experts: everything but the MLPs from `base_model`, one MLP per expert."""

    not_yet = ("shared_experts", "layers", "gate_parameters")

    base_model: Model
    experts: tuple[Expert, ...] = Field(min_length=1)
    experts_per_token: int = Field(default=2, ge=1)
    architecture: Annotated[str, AfterValidator(_architecture)] = "auto"
    gate_mode: Annotated[str, AfterValidator(_gate_mode)] = "fitted"
    seed: Seed = 0

    @model_validator(mode="after")
    def _enough_experts(self) -> MoeRecipe:
        if self.experts_per_token > len(self.experts):
            raise _wrong(
                f"experts_per_token is {self.experts_per_token}, but there "
                f"{'is 1 expert' if len(self.experts) == 1 else f'are {len(self.experts)} experts'}"
                f"; list more experts or lower experts_per_token to {len(self.experts)}"
            )
        return self


KINDS: dict[str, type[Recipe]] = {
    "experts": MoeRecipe,
    "slices": StackRecipe,
    "models": MergeRecipe,
}
"""Which kind of recipe it is follows from its keys."""


def parse_kind(data: dict[str, Any]) -> Recipe:
    """Validate `data` as the kind of recipe that its keys say.

    Raises:
        ValidationError: with every mistake.

    """
    present = [key for key in KINDS if key in data]
    if len(present) != 1:
        # Guess the kind from a misspelt key, so that the message can name the right word.
        if not present:
            for key in data:
                if found := re.search(r'"(\w+)"', nearest(str(key), KINDS)):
                    return KINDS[found[1]].model_validate(data)
        got = f"got {' and '.join(present)}" if present else "got none of them"
        keys = ", ".join(KINDS)
        raise ValidationError.from_exception_data(
            "Recipe",
            [
                {
                    "type": _wrong(f"a recipe has exactly one of the keys {keys}; {got}"),
                    "loc": (),
                    "input": None,
                }
            ],
        )
    return KINDS[present[0]].model_validate(data)


def average(models: Sequence[Any]) -> MergeRecipe:
    """Return the recipe of the plain average of `models`."""
    distinct = [model for i, model in enumerate(models) if model not in models[:i]]
    inputs = tuple(MergeInput(model=model) for model in distinct)
    weight = (Condition(1.0),)
    return MergeRecipe(merge_method="linear", models=inputs, parameters={"weight": weight})
