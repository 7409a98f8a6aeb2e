"""The door: what is no recipe is refused in words, all mistakes at once, and nothing runs."""

import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import moeforge
from moeforge import recipe as recipes
from moeforge.errors import RecipeError, show_path
from moeforge.recipe import (
    Adapter,
    MergeRecipe,
    ModulesRecipe,
    MoeRecipe,
    Reference,
    StackRecipe,
)


def mistakes(recipe):
    """What a recipe (text or dict) is refused for: [(line, path, message)]."""
    with pytest.raises(RecipeError) as caught:
        load(recipe)
    return [(f.line, show_path(f.path), f.what) for f in caught.value.findings]


def load(recipe):
    if isinstance(recipe, dict):
        return recipes.load(recipe)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yml")
        path.write_text(recipe, encoding="utf-8")
        return recipes.load(path)


def moe(**changes):
    experts = [{"source_model": "a"}, {"source_model": "b"}]
    return {"base_model": "x", "experts": experts, **changes}


def linear(*models, **changes):
    inputs = [{"model": model, "parameters": {"weight": 1}} for model in models]
    return {"merge_method": "linear", "models": inputs, **changes}


# --- everything at once --------------------------------------------------------------------------

WRONG_MOE = """\
base_model: ./base
experts:
  - source_model: ./a
    positive_promts: [hello]
  - source_model: ./b
    positive_prompts: hello
  - source_model: ./c
    noise_scale: -0.1
gate_mode: fited
architecture: mixtrall
dtype: bf16
expert_per_token: 1
"""


def test_every_mistake_is_reported_at_once_with_line_path_and_nearest_word():
    found = {(line, path): what for line, path, what in mistakes(WRONG_MOE)}
    assert list(found) == [
        (4, "$.experts[0].positive_promts"),
        (6, "$.experts[1].positive_prompts"),
        (8, "$.experts[2].noise_scale"),
        (9, "$.gate_mode"),
        (10, "$.architecture"),
        (11, "$.dtype"),
        (12, "$.expert_per_token"),
    ]
    for line, word in [
        (4, "positive_prompts"),
        (9, "fitted"),
        (10, "mixtral"),
        (11, "bfloat16"),
        (12, "experts_per_token"),
    ]:
        (what,) = (what for (at, _), what in found.items() if at == line)
        assert f'did you mean "{word}"?' in what
    assert "expected a list" in found[6, "$.experts[1].positive_prompts"]
    assert "at least 0" in found[8, "$.experts[2].noise_scale"]


NESTED = """\
base_model:
  merge_method: slerpp
  base_model: ./a
  models:
    - model: ./a
    - model:
        slices:
          - sources:
              - model: ./b
                layer_range: [0, 4]
                layer_rang: [0, 4]
experts:
  - source_model:
      merge_method: linear
      models:
        - model: {modl: ./a}
"""


def test_mistakes_of_nested_recipes_have_their_own_path_and_line():
    found = mistakes(NESTED)
    assert [(line, path) for line, path, _ in found] == [
        (2, "$.base_model.merge_method"),
        (11, "$.base_model.models[1].model.slices[0].sources[0].layer_rang"),
        (16, "$.experts[0].source_model.models[0].model.modl"),
    ]
    for (*_, what), word in zip(found, ("slerp", "layer_range", "model"), strict=True):
        assert f'did you mean "{word}"?' in what


@pytest.mark.parametrize("kind", ["experts", "slices", "models"])
@pytest.mark.parametrize("drop", [0, 2, -1])
def test_a_misspelt_kind_is_named_and_not_called_missing(kind, drop):
    """`expert:` must not be told that `models:` is missing."""
    word = kind[:drop] + kind[drop + 1 :] if drop >= 0 else kind[:-1]
    body = {"base_model": "x", word: []}
    if kind == "models":
        body = {"merge_method": "linear", word: []}
    ((_, path, what),) = mistakes(body)
    assert path == f"$.{word}"
    assert f'did you mean "{kind}"?' in what


def test_a_far_off_key_is_answered_with_the_known_ones():
    ((_, path, what),) = mistakes(moe(quantisation=4))
    assert path == "$.quantisation"
    assert "gate_mode" in what
    assert "experts_per_token" in what


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"merge_method": "linear"}, "got none of them"),
        (linear("a", slices=[1]), "got slices and models"),
        (linear("a", modules={"default": {}}), "got models and modules"),
        (moe(models=[1]), "got experts and models"),
        ({"merge_method": "linear", "models": [], "slices": []}, "got slices and models"),
    ],
)
def test_a_recipe_is_of_exactly_one_kind(recipe, said):
    ((_, path, what),) = mistakes(recipe)
    assert path == "$"
    assert said in what
    assert "experts, slices, models, modules" in what


@pytest.mark.parametrize("empty", [[], {}, None])
@pytest.mark.parametrize("key", ["slices", "modules", "experts"])
def test_an_empty_list_beside_a_filled_one_is_no_kind(key, empty):
    assert load(linear("a", **{key: empty})).recipe == load(linear("a")).recipe


@pytest.mark.parametrize("module", [{}, {"models": [], "slices": None}, {"parameters": {"t": 1}}])
def test_a_module_has_models_or_slices(module):
    ((_, path, what),) = mistakes({"merge_method": "linear", "modules": {"default": module}})
    assert path == "$.modules.default"
    assert "either models or slices" in what


def test_a_module_has_not_both():
    part = {"sources": [{"model": "a", "layer_range": [0, 1]}]}
    module = {"models": [{"model": "a"}], "slices": [part]}
    ((_, path, what),) = mistakes({"merge_method": "linear", "modules": {"decoder": module}})
    assert path == "$.modules.decoder"
    assert "either models or slices" in what


@pytest.mark.parametrize(
    ("recipe", "path", "said"),
    [
        (moe(experts=[]), "$.experts", "at least one entry"),
        (moe(experts_per_token=3), "$.experts_per_token", "there are 2 experts"),
        (moe(experts_per_token=0), "$.experts_per_token", "at least 1, got 0"),
        (moe(experts_per_token=1.5), "$.experts_per_token", "a whole number, got 1.5"),
        (moe(seed=-1), "$.seed", "at least 0"),
        (moe(architecture=""), "$.architecture", "unknown architecture"),
        (moe(base_model=None), "$.base_model", "expected a model"),
        (moe(base_model=7), "$.base_model", "got 7"),
        (moe(base_model=moe()), "$.base_model", "mixture of experts cannot be an input"),
        (
            moe(experts=[{"source_model": "a", "positive_prompts": [True]}, {"source_model": "b"}]),
            "$.experts[0].positive_prompts[0]",
            "put it in quotes",
        ),
        (
            moe(experts=[{"source_model": "a", "positive_prompts": [""]}, {"source_model": "b"}]),
            "$.experts[0].positive_prompts[0]",
            "not empty",
        ),
        (
            moe(
                experts=[
                    {"source_model": "a", "residual_scale": float("nan")},
                    {"source_model": "b"},
                ]
            ),
            "$.experts[0].residual_scale",
            "a number, got nan",
        ),
        (
            {"slices": [{"sources": [{"model": "a", "layer_range": [0, 1, 2]}]}]},
            "$.slices[0].sources[0].layer_range",
            "[start, end], the end exclusive",
        ),
        (
            {"slices": [{"sources": [{"model": "a", "layer_range": "0-4"}]}]},
            "$.slices[0].sources[0].layer_range",
            "[start, end], the end exclusive",
        ),
        (linear("a", parameters=[1]), "$.parameters", "expected a mapping"),
        (linear(), "$.models", "at least one entry"),
        ({"merge_method": "linear", "modules": {}}, "$.modules", "at least one entry"),
        (linear("a", tokenizer={}, tokenizer_source="base"), "$.tokenizer_source", "say the same"),
        (linear("a", tokenizer={"sorce": "base"}), "$.tokenizer.sorce", '"source"'),
        (
            {"merge_method": "linear", "modules": {"default": {"model": []}}},
            "$.modules.default.model",
            '"models"',
        ),
        (linear("a", evaluate=["held-out.txt"]), "$.evaluate", "expected a mapping"),
        (linear("a", evaluate={"code": 3}), "$.evaluate.code", "expected a text, got 3"),
    ],
)
def test_impossible_values_are_refused_in_words(recipe, path, said):
    ((_, where, what),) = mistakes(recipe)
    assert where == path
    assert said in what
    assert "tuple" not in what, "that is Python's word, not the reader's"


def test_long_values_are_not_poured_out():
    ((*_, what),) = mistakes(moe(base_model=list(range(10_000))))
    assert len(what) < 200


# --- models --------------------------------------------------------------------------------------


def named(model):
    return load(linear(model)).recipe.models[0].model


@pytest.mark.parametrize(
    ("written", "model", "revision", "subfolder"),
    [
        ("./a", "./a", None, None),
        ("owner/name", "owner/name", None, None),
        ("owner/name@main", "owner/name", "main", None),
        ("owner/name@refs/pr/1", "owner/name", "refs/pr/1", None),
        ({"model": "a"}, "a", None, None),
        ({"model": "a", "revision": "b", "subfolder": "c"}, "a", "b", "c"),
        ({"model": "owner/name@main"}, "owner/name", "main", None),
        ({"model": {"path": "owner/name", "revision": "main"}}, "owner/name", "main", None),
        ({"model": {"path": "a", "revision": None}, "lora": None}, "a", None, None),
        ({"model": "a+b@c"}, "a+b", "c", None),
        ({"model": {"path": "a@b+c"}}, "a@b+c", None, None),
        (Path("some/where"), "some/where", None, None),
    ],
)
def test_ways_to_name_a_model(written, model, revision, subfolder):
    found = named(written)
    assert (found.model, found.revision, found.subfolder) == (model, revision, subfolder)
    assert found.lora is None


@pytest.mark.parametrize("written", ["a@b@c", "@main", "a@", ""])
def test_what_names_no_model(written):
    ((_, path, what),) = mistakes(linear(written))
    assert path == "$.models[0].model"
    assert "path-or-id[@revision]" in what


@pytest.mark.parametrize("written", ["a+", "a+b+c", "+b"])
def test_what_names_no_model_and_adapter(written):
    ((_, path, what),) = mistakes(linear(written))
    assert path == "$.models[0].model"
    assert "not of the form" in what


@pytest.mark.parametrize(
    "written",
    [
        "a@main+b@c",
        {"model": "a@main", "lora": "b@c"},
        {"model": {"path": "a", "revision": "main"}, "lora": {"path": "b", "revision": "c"}},
        {"model": "a", "revision": "main", "lora": {"model": "b", "revision": "c"}},
    ],
)
def test_ways_to_name_a_model_with_an_adapter(written):
    adapter = Adapter(model="b", revision="c")
    assert named(written) == Reference(model="a", revision="main", lora=adapter)


def test_an_adapter_of_an_inline_recipe():
    found = named({"model": linear("a"), "lora": "b"})
    assert isinstance(found.model, MergeRecipe)
    assert found.lora == Adapter(model="b")


def test_references_with_another_architecture_are_another_model():
    """mergekit tells them apart too: beside a listed `a`, such a base is one more input."""
    assert named({"model": "a", "override_architecture": "X"}) != named("a")
    assert named({"model": "a", "override_architecture": None}) == named("a")


def test_kinds_and_defaults():
    merge = load(linear("a")).recipe
    assert isinstance(merge, MergeRecipe)
    assert merge.dtype is None
    stack = load({"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}).recipe
    assert isinstance(stack, StackRecipe)
    assert stack.merge_method == "passthrough"
    modules = {"merge_method": "linear", "modules": {"default": {"models": [{"model": "a"}]}}}
    assert isinstance(load(modules).recipe, ModulesRecipe)
    mixture = load(moe(dtype="torch.bfloat16")).recipe
    assert isinstance(mixture, MoeRecipe)
    assert mixture.experts_per_token == 2
    assert mixture.gate_mode == "fitted"
    assert mixture.dtype == "bfloat16"


# --- YAML ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("", 0, "the recipe is empty"),
        ("# nothing\n", 0, "the recipe is empty"),
        ("\n- a\n- b\n", 2, "a mapping of keys to values, and this is a list"),
        ("just words", 1, "a mapping of keys"),
        ("models: [{model: x\n", 2, "not valid YAML"),
        ("a: 1\n b: 2\n", 2, "not valid YAML"),
        ("a: 1\n--- \nb: 2\n", 2, "another document"),
        ("merge_method: linear\nmodels: *nowhere\n", 2, "undefined alias"),
        ("a: 1\nb: 2\x07\n", 2, "character '\\x07'"),
        ("---\n~\n", 0, "the recipe is empty"),
        ("[" * 3000, 0, "nested too deeply"),
        ("? [a, b]\n: 1\n", 1, "a key is a word"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_yaml_mapping(text, line, said):
    ((at, path, what),) = mistakes(text)
    assert path == "$"
    assert at == line
    assert said in what


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("models:\n\t- a\n", "Indent with spaces, not with tabs."),
        ("merge_method:linear\nmodels: []\n", "A key's colon needs a space behind it"),
        ("a:\n - b: 1\n  - c\n", "Entries of one list or mapping are indented alike."),
        ("a: 'linear\n", "A quote or bracket is not closed."),
    ],
)
def test_common_mistakes_in_yaml_say_what_to_do(text, fix):
    with pytest.raises(RecipeError, match="not valid YAML") as caught:
        load(text)
    assert caught.value.findings[0].fix.startswith(fix)


def test_long_words_are_shortened():
    ((_, _, what),) = mistakes({"merge_method": "x" * 100_000, "models": [{"model": "a"}]})
    assert what.startswith(f'unknown merge method "{"x" * 57}…". Known: ')


def test_values_that_cannot_be_made_are_placed():
    digits = "9" * 5000
    text = f"models: []\nseed: {digits}\nbase_model: &b\n  models: [{{model: *b}}]\n"
    text += "dtype: 2024-13-45\n"
    assert mistakes(text) == [
        (
            2,
            "$.seed",
            f"{digits[:30]}… is neither a number nor a date; put it in quotes if it is a text",
        ),
        (
            4,
            "$.base_model.models[0].model",
            "the alias (*) here stands for a value that it is part of",
        ),
        (
            5,
            "$.dtype",
            "2024-13-45 is neither a number nor a date; put it in quotes if it is a text",
        ),
    ]


def test_tags_that_do_not_fit_their_values_are_placed():
    text = "models: []\nseed: !!int ''\nbase_model: !!bool maybe\ndtype: !!timestamp soon\n"
    assert mistakes(text) == [
        (2, "$.seed", '"" is not what the tag !!int says; leave it out'),
        (3, "$.base_model", '"maybe" is not what the tag !!bool says; leave it out'),
        (4, "$.dtype", '"soon" is not what the tag !!timestamp says; leave it out'),
    ]


def test_every_mistake_in_a_parameter_is_told():
    text = """\
merge_method: linear
models:
  - model: a
    parameters:
      weight:
        - {filter: mlp, valeu: 1}
        - {filter: 3, value: [0, ~, 1]}
        - {filter: x}
  - model: b
    parameters: {weight: [1, {}, 2]}
"""
    assert mistakes(text) == [
        (
            6,
            "$.models[0].parameters.weight[0].valeu",
            'unknown key "valeu" — did you mean "value"?',
        ),
        (
            7,
            "$.models[0].parameters.weight[1].filter",
            "a filter is a text, got 3; put it in quotes",
        ),
        (7, "$.models[0].parameters.weight[1].value[1]", "expected a number, got nothing"),
        (8, "$.models[0].parameters.weight[2]", '"value" is missing; expected filter and value'),
        (10, "$.models[1].parameters.weight", "a list mixes numbers and filter/value entries"),
    ]


def test_the_kind_is_guessed_from_what_a_misspelt_key_holds():
    said = [what for _, _, what in mistakes({"modles": [{"model": "a"}], "merge_method": "linear"})]
    assert said == ['unknown key "modles" — did you mean "models"?']


def test_duplicate_keys_are_refused_with_both_lines():
    text = "merge_method: linear\nmodels:\n  - model: a\n    model: b\nmerge_method: slerp\n"
    assert mistakes(text) == [
        (4, "$.models[0].model", '"model" is given twice; the first is on line 3'),
        (5, "$.merge_method", '"merge_method" is given twice; the first is on line 1'),
    ]


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/apply:os.system {{args: ['touch {}']}}",
        "!!python/object:moeforge.recipe.Reference {{model: '{}'}}",
        "!!python/name:os.system",
        "!!set {{a, b}}",
    ],
)
def test_tags_that_would_make_objects_are_refused_and_do_nothing(value, tmp_path):
    trap = tmp_path / "trap"
    text = f"merge_method: linear\nmodels: []\nbase_model: {value.format(trap)}\n"
    ((line, _, what),) = mistakes(text)
    assert line == 3
    assert "python" in what or "!!set" in what
    assert not trap.exists()


@pytest.mark.parametrize("use", ["[{}]", "{{<<: [{}]}}"], ids=["lists", "merged mappings"])
def test_alias_bombs_go_off_quickly_and_harmlessly(use):
    first = "[x]" if use == "[{}]" else "{x: 1}"
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {use.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 20)]
    began = time.perf_counter()
    assert mistakes("\n".join(lines))
    assert time.perf_counter() - began < 10, "9^19 values would take for ever"


def test_merge_keys_give_way_to_own_keys():
    text = """\
merge_method: linear
models:
  - &first
    model: ./a
    parameters: &weights {weight: 1, normalize: 0}
  - <<: *first
    model: ./b
  - {<<: [{model: ./c}, *first]}
"""
    models = load(text).recipe.models
    assert [str(entry.model) for entry in models] == ["./a", "./b", "./c"]
    assert all(entry.parameters == models[0].parameters for entry in models)


def test_a_recipe_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.yml").write_bytes("a: b\nc: é".encode("latin-1"))
    for path in (tmp_path / "none.yml", tmp_path, tmp_path / "latin.yml"):
        with pytest.raises(RecipeError, match="cannot read the recipe") as caught:
            recipes.load(path)
        assert str(path) in str(caught.value)
    assert caught.value.findings[0].line == 2
    assert "the byte 0xe9 is not UTF-8" in str(caught.value)


# --- recipes as dicts ----------------------------------------------------------------------------


def test_a_dict_means_the_same_as_its_yaml():
    text = "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: [0, 0.00001]}}]\n"
    inputs = [{"model": Path("./a"), "parameters": {"weight": (0, 1e-5)}}]
    recipe = load({"merge_method": "linear", "models": inputs}).recipe
    assert str(recipe.models[0].model) == "a", "as pathlib writes it"
    assert recipe.models[0].parameters == load(text).recipe.models[0].parameters


@pytest.mark.parametrize("prompt", ["😀 ok", "a\x85b\u2028c", "\x7f\x00", "yes", "1e3", "'\n\n\""])
def test_any_text_in_a_dict_survives(prompt):
    expert = {"source_model": "a", "positive_prompts": [prompt]}
    loaded = load(moe(experts=[expert], experts_per_token=1))
    assert loaded.recipe.experts[0].positive_prompts == (prompt,)
    assert load(loaded.document.text).recipe == loaded.recipe, "what is written is the same recipe"


def test_a_dict_that_yaml_cannot_say_is_refused():
    loop = moe()
    loop["experts"].append(loop)
    assert "nested" in mistakes(loop)[0][2]
    assert "object object" in mistakes(moe(seed=object()))[0][2]


def test_mistakes_in_a_dict_have_a_path_but_no_line():
    ((line, path, _),) = mistakes(moe(gate_mode="no"))
    assert (line, path) == (0, "$.gate_mode")


# --- anything ------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    """models slices experts modules default tokens lora path merge_method base_model model sources
    layer_range parameters weight t
    filter value dtype linear slerp passthrough source_model positive_prompts gate_mode evaluate
    experts_per_token seed float32 auto a@b a+b <<""".split()  # noqa: SIM905 - a list of words
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS
DATA = st.recursive(
    SCALARS | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS | st.text(max_size=3) | st.integers(), inner, max_size=5)
    ),
    max_leaves=25,
)
RECIPES = st.dictionaries(WORDS | st.text(max_size=3), DATA, max_size=6)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(RECIPES)
@example({"models": [{"model": "a", "parameters": {"weight": 10**400}}], "merge_method": "linear"})
@example({"experts": [{}], "experts_per_token": 2**70, "base_model": []})
def test_arbitrary_data_is_a_recipe_or_a_recipe_error(data):
    try:
        loaded = recipes.load(data)
    except RecipeError:
        return
    assert loaded.document.data.keys() & {"models", "slices", "experts", "modules"}


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>?'\"#,<\n \t\x00é1.~@`%")))
def test_arbitrary_text_is_a_recipe_or_a_recipe_error(text):
    with pytest.raises(RecipeError):
        load(text)


def test_check_reports_what_load_raises(tmp_path):
    path = tmp_path / "wrong.yml"
    path.write_text(WRONG_MOE)
    report = moeforge.check(path)
    assert report.exit_code == 2
    assert report.plan is None
    assert [(f.line, show_path(f.path), f.what) for f in report.errors] == mistakes(WRONG_MOE)
