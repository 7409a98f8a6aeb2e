"""Owns the recipe language: which keys there are, their types, and what each means.

Knows words, not models: whether layers exist or shapes agree is for `moeforge.planners`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from moeforge import catalog, tensors
from moeforge.errors import closest
from moeforge.recipe.document import unknown
from moeforge.recipe.parameters import Condition, Parameters
from moeforge.recipe.strict import Strict, or_empty, or_none, show, wrong
from moeforge.recipe.vocabulary import VocabularyKeys

# --- where a model may stand ---------------------------------------------------------------------


class Adapter(Strict):
    """A LoRA adapter: a local folder or a repository on the Hugging Face Hub.

    Attributes:
        model: path, relative to the recipe or to the working directory, or a Hub id.
        revision: branch, tag or commit on the Hub.
    """

    model: str = Field(min_length=1)
    revision: str | None = None

    def __str__(self) -> str:
        return self.model + (f"@{self.revision}" if self.revision else "")


def _parse_adapter(value: Any) -> Any:
    if isinstance(value, dict) and "path" in value and "model" not in value:
        value = {**value, "model": value["path"]}  # as mergekit calls it
        del value["path"]
    return _path_and_revision(value) if isinstance(value, str) else value


class Reference(Strict):
    """A checkpoint: a local folder or a repository on the Hugging Face Hub.

    Attributes:
        model: path, relative to the recipe or to the working directory, or a Hub id; where there is
            an adapter, it may also be an inline recipe.
        revision: branch, tag or commit on the Hub.
        subfolder: folder inside the repository or path that holds config.json.
        lora: adapter that is applied to it.
        override_architecture: what config.json's `architectures` is taken to say.
    """

    model: Any
    revision: str | None = None
    subfolder: str | None = None
    lora: Annotated[Adapter | None, BeforeValidator(_parse_adapter)] = None
    override_architecture: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _spelling(cls, data: Any) -> Any:
        """Take apart `{model: path@revision}` and `{model: {path, revision}}`, as mergekit does."""
        inner = data.get("model") if isinstance(data, dict) else None
        if isinstance(inner, str) and "@" in inner and not data.get("revision"):
            return {**data, **_path_and_revision(inner)}
        if isinstance(inner, dict) and set(inner) <= {"path", "revision"} and "path" in inner:
            if data.get("revision") and inner.get("revision"):
                raise wrong("the revision is given twice")
            revision = inner.get("revision") or data.get("revision")
            return {**data, "model": inner["path"], "revision": revision}
        return data

    @field_validator("model")
    @classmethod
    def _text_or_recipe(cls, value: Any) -> Any:
        if isinstance(value, str) and value:
            return value
        if isinstance(value, dict):
            inline = _parse_model(value)
            if isinstance(inline, Recipe):
                return inline
        if isinstance(value, Recipe):
            return value
        raise wrong(f"expected a path or Hub id, got {show(value)}")

    @model_validator(mode="after")
    def _recipe_has_no_place(self) -> Reference:
        if isinstance(self.model, Recipe) and (self.revision or self.subfolder):
            raise wrong("an inline recipe has no revision and no subfolder")
        return self

    def __str__(self) -> str:
        if isinstance(self.model, Recipe):
            return f"inline recipe+{self.lora}" if self.lora else "inline recipe"
        revision = f"@{self.revision}" if self.revision else ""
        path = "/".join(filter(None, (self.model, self.subfolder))) + revision
        return f"{path}+{self.lora}" if self.lora else path


def _path_and_revision(text: str) -> dict[str, Any]:
    path, at, revision = text.partition("@")
    if not path or "@" in revision or (at and not revision):
        raise wrong(f'"{text}" is not of the form path-or-id[@revision]')
    return {"model": path, "revision": revision or None}


def _parse_model(value: Any) -> Any:
    """Turn `path-or-id[@revision][+lora[@revision]]`, a mapping or a recipe into its model."""
    if isinstance(value, Strict):
        return value
    if isinstance(value, str):
        text, plus, lora = value.partition("+")
        if plus and (not lora or "+" in lora):
            raise wrong(
                f'"{value}" is not of the form model+adapter; a path with a plus in it is written '
                "{model: path}"
            )
        adapter = Adapter(**_path_and_revision(lora)) if plus else None
        return Reference(**_path_and_revision(text), lora=adapter)
    if isinstance(value, dict):
        if "merge_method" in value or any(key in value for key in KINDS):
            inline = parse_kind(value)
            if isinstance(inline, MoeRecipe):
                raise wrong("a mixture of experts cannot be an input of another recipe")
            return inline
        return Reference.model_validate(value)
    raise wrong(f"expected a model (path, Hub id or inline recipe), got {show(value)}")


Model = Annotated[Any, BeforeValidator(_parse_model)]
"""A `Reference`, or an inline `MergeRecipe`, `StackRecipe` or `ModulesRecipe`."""


# --- words from the shelves ----------------------------------------------------------------------


def _method(word: str) -> str:
    if word not in catalog.names("methods"):
        raise wrong(unknown("merge method", word, catalog.names("methods")))
    return word


def _gate_mode(word: str) -> str:
    if word not in catalog.names("gates"):
        raise wrong(unknown("gate mode", word, catalog.names("gates")))
    return word


def _architecture(word: str) -> str:
    families = catalog.names("families")
    known = word and any(name.startswith(word.lower()) for name in families)
    if word != "auto" and not known:
        raise wrong(unknown("architecture", word, ("auto", *families)))
    return word


def _dtype(word: str | None) -> str | None:
    if word is None:
        return None
    name = word.removeprefix("torch.")
    if name not in tensors.OUTPUT_NAMES:
        raise wrong(unknown("dtype", word, tensors.OUTPUT_NAMES))
    return name


def _range(value: Any) -> Any:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise wrong(f"expected [start, end], the end exclusive, got {show(value)}")
    return value


def _or_no_entries(value: Any) -> Any:
    return () if value is None else value


MethodName = Annotated[str, AfterValidator(_method)]
DTypeName = Annotated[str | None, BeforeValidator(or_none), AfterValidator(_dtype)]
"""A dtype of torch, with or without "torch."; None where a recipe says nothing."""
LayerRange = Annotated[tuple[int, int], BeforeValidator(_range)]
Text = Annotated[str, Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Settings = Annotated[Parameters, BeforeValidator(or_empty)]


# --- merges and stacks ---------------------------------------------------------------------------


class MergeInput(Strict):
    """One entry of `models`."""

    model: Model
    parameters: Settings = Field(default_factory=dict)


class SliceSource(Strict):
    """One entry of a slice's `sources`; `layer_range` is [start, end), end exclusive."""

    model: Model
    layer_range: LayerRange
    parameters: Settings = Field(default_factory=dict)


class Slice(Strict):
    """A run of output layers, merged from equally long layer ranges of one or more models.

    Attributes:
        residual_weight: accepted because mergekit does, and without effect there too.
    """

    residual_weight: float | None = None
    sources: tuple[SliceSource, ...] = Field(min_length=1)
    base_model: Model | None = None
    parameters: Settings = Field(default_factory=dict)


class Recipe(Strict):
    """What all kinds share.

    Attributes:
        dtype: dtype of the result; None keeps the inputs' own.
        evaluate: held-out UTF-8 text files by label; the build ends with the loss of the result
            and of what it was made of on them.
    """

    dtype: DTypeName = None
    evaluate: dict[str, str] = Field(default_factory=dict)


class Combination(Recipe, VocabularyKeys):
    """What merges and stacks share.

    Attributes:
        seed: what random masks follow from. An inline recipe without one has its own masks all the
            same: they follow from the outer recipe's seed and its place there.
    """

    base_model: Model | None = None
    parameters: Settings = Field(default_factory=dict)
    out_dtype: DTypeName = None
    seed: Seed | None = None


class MergeRecipe(Combination):
    """A merge of whole models, tensor by tensor."""

    merge_method: MethodName
    models: tuple[MergeInput, ...] = Field(min_length=1)


class StackRecipe(Combination):
    """A stack of layer ranges ("frankenmerge")."""

    slices: tuple[Slice, ...] = Field(min_length=1)
    merge_method: MethodName = "passthrough"


class Module(Strict):
    """What one module of a model of several is made of: `models` or `slices`."""

    models: Annotated[tuple[MergeInput, ...], BeforeValidator(_or_no_entries)] = ()
    slices: Annotated[tuple[Slice, ...], BeforeValidator(_or_no_entries)] = ()
    parameters: Settings = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of_them(self) -> Module:
        if bool(self.models) == bool(self.slices):
            raise wrong("a module has either models or slices")
        return self


class ModulesRecipe(Combination):
    """A merge that says for each module (text decoder, vision tower, …) how it is made."""

    merge_method: MethodName
    modules: dict[str, Module] = Field(min_length=1)


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
    positive_prompts: tuple[Text, ...] = ()
    negative_prompts: tuple[Text, ...] = ()
    prompts_file: str | None = None
    residual_scale: Finite = 1.0
    noise_scale: Finite = 0.0

    @field_validator("noise_scale")
    @classmethod
    def _no_noise(cls, scale: float) -> float:
        if scale:
            raise wrong("noise_scale other than 0 is not supported by this version of moeforge")
        return scale


class MoeRecipe(Recipe):
    """A mixture of experts: everything but the MLPs from `base_model`, one MLP per expert."""

    not_yet = ("shared_experts", "layers", "gate_parameters")

    base_model: Model
    experts: tuple[Expert, ...] = Field(min_length=1)
    experts_per_token: int = Field(default=2, ge=1)
    architecture: Annotated[str, AfterValidator(_architecture)] = "auto"
    gate_mode: Annotated[str, AfterValidator(_gate_mode)] = "fitted"
    seed: Seed = 0

    @field_validator("experts_per_token")
    @classmethod
    def _enough_experts(cls, per_token: int, info: ValidationInfo) -> int:
        if "experts" not in info.data:
            return per_token  # they are wrong, and reported themselves
        count = len(info.data["experts"])
        if per_token > count:
            raise wrong(
                f"experts_per_token is {per_token}, but there "
                f"{'is 1 expert' if count == 1 else f'are {count} experts'}"
                f"; list more experts or lower experts_per_token to {count}"
            )
        return per_token


KINDS: dict[str, type[Recipe]] = {
    "experts": MoeRecipe,
    "slices": StackRecipe,
    "models": MergeRecipe,
    "modules": ModulesRecipe,
}
"""Which kind of recipe it is follows from its keys."""


def parse_kind(data: dict[str, Any]) -> Recipe:
    """Validate `data` as the kind of recipe that its keys say.

    Raises:
        ValidationError: with every mistake.
    """
    filled = [key for key in KINDS if data.get(key)]
    if filled:  # mergekit takes an empty list for a key that is not there
        data = {key: value for key, value in data.items() if key not in KINDS or key in filled}
    present = [key for key in KINDS if key in data]
    if not present:
        # Guess the kind from a misspelt key, so that the message can name the right word.
        fields = {name for kind in KINDS.values() for name in (*kind.model_fields, *kind.not_yet)}
        present = [found for key in data if key not in fields and (found := closest(key, KINDS))]
    if len(present) == 1:
        return KINDS[present[0]].model_validate(data)
    got = f"got {' and '.join(present)}" if present else "got none of them"
    message = f"a recipe has exactly one of the keys {', '.join(KINDS)}; {got}"
    raise ValidationError.from_exception_data(
        "Recipe", [{"type": wrong(message), "loc": (), "input": None}]
    )


def average(models: Sequence[Any]) -> MergeRecipe:
    """Return the recipe of the plain average of `models`."""
    distinct = [model for i, model in enumerate(models) if model not in models[:i]]
    inputs = tuple(MergeInput(model=model) for model in distinct)
    weight = (Condition(1.0),)
    return MergeRecipe(merge_method="linear", models=inputs, parameters={"weight": weight})
