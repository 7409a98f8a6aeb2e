"""Owns the recipe language: which keys there are, their types, and what each means.

Knows words, not models: whether layers exist or shapes agree is for `moeforge.planners`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from moeforge import catalog, tensors
from moeforge.recipe.document import unknown
from moeforge.recipe.parameters import Parameters
from moeforge.recipe.strict import Strict, Written, or_empty, or_none, show, wrong
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


_ADAPTER = {"$ref": "#/definitions/adapter"}
_PLACE = {"$ref": "#/definitions/place"}


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

    model: Annotated[Any, Written(_PLACE)]
    revision: str | None = None
    subfolder: str | None = None
    lora: Annotated[Adapter | None, BeforeValidator(_parse_adapter), Written(_ADAPTER)] = None
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
            inline = parse_model(value)
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


def parse_model(value: Any) -> Any:
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
        from moeforge.recipe import kinds  # which knows what stands here: recipes nest

        if "merge_method" in value or any(key in value for key in kinds.KINDS):
            return kinds.parse_inline(value)
        return Reference.model_validate(value)
    raise wrong(f"expected a model (path, Hub id or inline recipe), got {show(value)}")


Model = Annotated[Any, BeforeValidator(parse_model), Written({"$ref": "#/definitions/model"})]
"""A `Reference`, or an inline `MergeRecipe`, `StackRecipe` or `ModulesRecipe`."""


# --- words from the shelves ----------------------------------------------------------------------


def _method(word: str) -> str:
    if word not in catalog.names("methods"):
        raise wrong(unknown("merge method", word, catalog.names("methods")))
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


def or_no_entries(value: Any) -> Any:
    """Take a key without a value for no entries, as YAML writes it."""
    return () if value is None else value


MethodName = Annotated[str, AfterValidator(_method), Written({"$ref": "#/definitions/method"})]
DTypeName = Annotated[
    str | None,
    BeforeValidator(or_none),
    AfterValidator(_dtype),
    Written({"$ref": "#/definitions/dtype"}),
]
"""A dtype of torch, with or without "torch."; None where a recipe says nothing."""
_LAYER = {"type": ["integer", "boolean", "string"], "pattern": r"^\s*[-+]?\d+(\.0*)?\s*$"}
"""A number, or what pydantic takes for one, as mergekit does."""
LayerRange = Annotated[
    tuple[int, int],
    BeforeValidator(_range),
    Written({"type": "array", "items": _LAYER, "minItems": 2, "maxItems": 2}),
]
Text = Annotated[str, Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Settings = Annotated[
    Parameters, BeforeValidator(or_empty), Written({"$ref": "#/definitions/parameters"})
]


# --- merges and stacks ---------------------------------------------------------------------------


class MergeInput(Strict):
    """One entry of `models`.

    Attributes:
        model: a path, a Hub id, or a recipe.
        parameters: values of the method's parameters for this model; they win over all others.
    """

    model: Model
    parameters: Settings = Field(default_factory=dict)


class SliceSource(Strict):
    """One entry of a slice's `sources`.

    Attributes:
        model: a path, a Hub id, or a recipe.
        layer_range: [start, end): its layers, from 0, the end exclusive.
        parameters: values of the method's parameters for this model in this slice; they win over
            all others.
    """

    model: Model
    layer_range: LayerRange
    parameters: Settings = Field(default_factory=dict)


class Slice(Strict):
    """A run of output layers, merged from equally long layer ranges of one or more models.

    Attributes:
        residual_weight: accepted because mergekit does, and without effect there too.
        sources: whose layers; several are merged and have equally long ranges.
        base_model: the base of this slice, in place of the recipe's.
        parameters: values of the method's parameters in this slice; they win over the recipe's.
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
        base_model: the model that methods start from; it gives config and tokenizer. Without one,
            the first model listed gives them.
        parameters: values of the method's parameters, where nothing more specific sets them.
        out_dtype: dtype of the result; wins over `dtype`.
        seed: what random masks follow from. An inline recipe without one has its own masks all the
            same: they follow from the outer recipe's seed and its place there.
    """

    base_model: Model | None = None
    parameters: Settings = Field(default_factory=dict)
    out_dtype: DTypeName = None
    seed: Seed | None = None


class MergeRecipe(Combination):
    """A merge of whole models, tensor by tensor.

    Attributes:
        merge_method: how tensors are merged.
        models: what is merged. A `base_model` that is not listed is appended.
    """

    merge_method: MethodName
    models: tuple[MergeInput, ...] = Field(min_length=1)


class StackRecipe(Combination):
    """A stack of layer ranges ("frankenmerge").

    Attributes:
        slices: the layers of the result, from the first to the last.
        merge_method: how the sources of one slice are merged.
    """

    slices: tuple[Slice, ...] = Field(min_length=1)
    merge_method: MethodName = "passthrough"


class Module(Strict):
    """What one module of a model of several is made of: `models` or `slices`.

    Attributes:
        models: what is merged, module by module.
        slices: its layers, from the first to the last.
        parameters: values of the method's parameters in this module; they win over the recipe's.
    """

    models: Annotated[tuple[MergeInput, ...], BeforeValidator(or_no_entries)] = ()
    slices: Annotated[tuple[Slice, ...], BeforeValidator(or_no_entries)] = ()
    parameters: Settings = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of_them(self) -> Module:
        if bool(self.models) == bool(self.slices):
            raise wrong("a module has either models or slices")
        return self


class ModulesRecipe(Combination):
    """A merge that says for each module (text decoder, vision tower, …) how it is made.

    Attributes:
        merge_method: how tensors are merged.
        modules: `text_decoder`, `vision_tower`, …; `default` in a model of one. What is not named
            comes from the base.
    """

    merge_method: MethodName
    modules: dict[str, Module] = Field(min_length=1)
