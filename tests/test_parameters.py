"""Which value a parameter has for a tensor: gradients, filters, scopes, and what is refused."""

import math

import pytest

from moeforge import forge
from moeforge.errors import show_path
from moeforge.recipe.parameters import (
    Condition,
    ParameterError,
    Scope,
    coerce,
    evaluate,
    resolve,
    unused_filters,
)

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def params(plan, name):
    """Parameters of the merge that makes output tensor `name`."""
    (tensor,) = (tensor for tensor in plan.tensors if tensor.name == name)
    return dict(tensor.expr.params)


def by_layer(plan, word, rest="mlp.up_proj.weight"):
    depth = plan.config["num_hidden_layers"]
    return [params(plan, f"model.layers.{i}.{rest}")[word] for i in range(depth)]


def slerp(models, *, parameters):
    first, second = map(str, models[:2])
    return {
        "merge_method": "slerp",
        "base_model": first,
        "models": [{"model": first}, {"model": second}],
        "parameters": parameters,
    }


def linear(models, *own, **parameters):
    inputs = [
        {"model": str(model), "parameters": settings}
        for model, settings in zip(models, own, strict=False)
    ]
    return {"merge_method": "linear", "models": inputs, "parameters": parameters}


def stack(models, *slices, method="linear", **changes):
    """A stack of slices [(range, {own parameters} per model, {slice parameters})]."""
    return {
        "merge_method": method,
        "slices": [
            {
                "sources": [
                    {"model": str(model), "layer_range": layers, "parameters": settings}
                    for model, settings in zip(models, own, strict=False)
                ],
                "parameters": shared,
            }
            for layers, own, shared in slices
        ],
        **changes,
    }


def refused(recipe):
    report = forge.check(recipe)
    assert report.exit_code == 4
    return [(show_path(f.path), f.what) for f in report.errors]


# --- gradients -----------------------------------------------------------------------------------


def test_a_gradient_is_interpolated_over_the_layers(llamas):
    """Layer i of 4 is at i/3; between [0, 1, 0.5] that is 0, 2/3, 1·(2/3) + 0.5·(1/3), 0.5."""
    plan = forge.plan(slerp(llamas, parameters={"t": [0, 1, 0.5]}))
    assert by_layer(plan, "t") == pytest.approx([0, 2 / 3, 5 / 6, 0.5])


def test_tensors_outside_the_layers_take_the_first_value(llamas):
    plan = forge.plan(slerp(llamas, parameters={"t": [0.25, 1]}))
    assert [params(plan, name)["t"] for name in (EMBED, NORM, HEAD)] == [0.25] * 3


def test_a_single_layer_takes_the_last_value(models):
    folders = [models("llama", seed=seed, num_hidden_layers=1) for seed in (1, 2)]
    plan = forge.plan(slerp(folders, parameters={"t": [0.25, 1]}))
    assert by_layer(plan, "t") == [1]
    assert params(plan, HEAD)["t"] == 0.25


def test_gradients_start_again_in_each_slice(llamas):
    own = [{"weight": [0, 1]}, {"weight": [1, 0]}]
    plan = forge.plan(stack(llamas, ([0, 3], own, {}), ([2, 4], own, {}), ([1, 2], own, {})))
    expected = [(0, 1), (0.5, 0.5), (1, 0), (0, 1), (1, 0), (1, 0)]
    assert by_layer(plan, "weight") == expected


def test_a_gradient_of_one_value_is_that_value(llamas):
    plan = forge.plan(slerp(llamas, parameters={"t": [0.4]}))
    assert {dict(tensor.expr.params)["t"] for tensor in plan.tensors} == {0.4}


def test_booleans_are_picked_and_not_mixed(llamas):
    """Of two values the second counts only where the position reaches 1: the last layer."""
    plan = forge.plan(linear(llamas, {"weight": 1}, {"weight": 3}, normalize=[True, False]))
    assert by_layer(plan, "normalize") == [True, True, True, False]
    assert params(plan, HEAD)["normalize"] is True


# --- filters -------------------------------------------------------------------------------------


def test_the_first_filter_that_matches_counts(llamas):
    setting = [
        {"filter": "self_attn", "value": 0.1},
        {"filter": "layers.3.", "value": 0.2},
        {"filter": "mlp", "value": [0.3, 0.6]},
        {"value": 0.5},
    ]
    plan = forge.plan(slerp(llamas, parameters={"t": setting}))
    assert by_layer(plan, "t", "self_attn.q_proj.weight") == [0.1] * 4
    assert by_layer(plan, "t") == pytest.approx([0.3, 0.4, 0.5, 0.2])
    assert by_layer(plan, "t", "input_layernorm.weight") == [0.5, 0.5, 0.5, 0.2]
    assert params(plan, EMBED)["t"] == 0.5


def test_a_single_mapping_is_a_list_of_one(llamas):
    plan = forge.plan(slerp(llamas, parameters={"t": {"value": [0, 0.9]}}))
    assert by_layer(plan, "t") == pytest.approx([0, 0.3, 0.6, 0.9])


def test_what_no_filter_matches_falls_through_to_the_next_scope(llamas):
    own = {"weight": [{"filter": "mlp", "value": 5}]}
    plan = forge.plan(linear(llamas, own, {"weight": 2}, weight=1))
    assert params(plan, "model.layers.0.mlp.up_proj.weight")["weight"] == (5, 2)
    assert params(plan, "model.layers.0.self_attn.q_proj.weight")["weight"] == (1, 2)


def test_an_empty_list_sets_nothing(llamas):
    plan = forge.plan(linear(llamas, {"weight": []}, {"weight": 2}, weight=7))
    assert params(plan, HEAD)["weight"] == (7, 2)


def test_an_empty_list_behind_a_filter_ends_its_scope(llamas):
    """As measured of mergekit: the MLP's weight is the global one, not the next entry's."""
    own = {"weight": [{"filter": "mlp", "value": []}, {"value": 3}]}
    plan = forge.plan(linear(llamas, own, {"weight": 2}, weight=0.25))
    assert params(plan, "model.layers.0.mlp.up_proj.weight")["weight"] == (0.25, 2)
    assert params(plan, "model.layers.0.self_attn.q_proj.weight")["weight"] == (3, 2)


def test_source_goes_before_slice_before_global(llamas):
    recipe = stack(
        llamas,
        ([0, 2], [{"weight": 1}, {}], {"weight": 2, "normalize": False}),
        ([2, 4], [{}, {"weight": 4}], {}),
        parameters={"weight": 3, "normalize": True},
    )
    plan = forge.plan(recipe)
    assert by_layer(plan, "weight") == [(1, 2), (1, 2), (3, 4), (3, 4)]
    assert by_layer(plan, "normalize") == [False, False, True, True]
    assert params(plan, EMBED)["weight"] == (1, 2), "as in the first slice"
    assert params(plan, HEAD)["weight"] == (3, 4), "as in the last slice"


def test_filters_see_input_names_per_input_and_output_names_when_shared(llamas):
    """Output layers 2 and 3 come from layers 0 and 1 of the inputs."""
    by_input = [{"weight": [{"filter": "layers.1.", "value": 9}, {"value": 1}]}, {"weight": 1}]
    by_output = {"normalize": [{"filter": "layers.3.", "value": False}, {"value": True}]}
    plain = [{"weight": 1}, {"weight": 1}]
    plan = forge.plan(stack(llamas, ([2, 4], plain, {}), ([0, 2], by_input, by_output)))
    assert by_layer(plan, "weight") == [(1, 1), (1, 1), (1, 1), (9, 1)]
    assert by_layer(plan, "normalize") == [True, True, True, False]


def test_inline_recipes_have_scopes_of_their_own(llamas):
    inner = linear(llamas, {"weight": 1}, {"weight": 2}, normalize=False)
    outer = {
        "merge_method": "slerp",
        "base_model": inner,
        "models": [{"model": inner}, {"model": str(llamas[2])}],
        "parameters": {"t": 0.5},
    }
    plan = forge.plan(outer)
    (head,) = (tensor.expr for tensor in plan.tensors if tensor.name == HEAD)
    assert dict(head.params) == {"t": 0.5}
    assert dict(head.inputs[0].params) == {"weight": (1, 2), "normalize": False}


# --- types ---------------------------------------------------------------------------------------


def test_numbers_may_be_written_as_strings(llamas):
    """YAML reads 1e-5 as a text: its own numbers need a dot."""
    plan = forge.plan(linear(llamas, {"weight": "1e-5"}, {"weight": "0.5"}))
    assert params(plan, HEAD)["weight"] == (0.00001, 0.5)


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (1, float, 1.0),
        (True, float, 1.0),
        ("-2.5e3", float, -2500.0),
        (3.0, int, 3),
        ("10", int, 10),
        (1, bool, True),
        (0.0, bool, False),
        ("true", bool, True),
        ("Yes", bool, True),
        ("ON", bool, True),
        ("t", bool, True),
        ("1", bool, True),
        ("FALSE", bool, False),
        ("no", bool, False),
        ("off", bool, False),
        ("n", bool, False),
        ("0", bool, False),
        ("abs", str, "abs"),
    ],
)
def test_values_become_their_declared_type(value, kind, expected):
    result = coerce(value, kind)
    assert result == expected
    assert type(result) is kind


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("high", float),
        (math.nan, float),
        (math.inf, float),
        ("-inf", float),
        (10**400, float),
        (math.inf, int),
        (1.5, int),
        ("", int),
        (2, bool),
        ("2", bool),
        ("", bool),
        ("true", float),
        (3, str),
        (True, str),
    ],
)
def test_values_of_another_type_are_refused(value, kind):
    with pytest.raises(ParameterError, match="expected"):
        coerce(value, kind)


def test_whole_numbers_may_not_fall_between():
    setting = (Condition((1, 2)),)
    assert evaluate(setting, "x", 1.0, int) == (2, setting[0])
    with pytest.raises(ParameterError, match=r"whole number, got 1\.5"):
        evaluate(setting, "x", 0.5, int)


def test_words_are_picked():
    setting = (Condition(("a", "b", "c")),)
    picked = [evaluate(setting, "x", position, str)[0] for position in (0, 0.49, 0.5, 0.99, 1)]
    assert picked == ["a", "a", "b", "b", "c"]


def test_wrong_types_are_reported_with_their_path(llamas):
    recipe = linear(llamas, {"weight": "much"}, {"weight": 1})
    assert refused(recipe) == [
        ("$.models[0].parameters.weight", "expected a number, got 'much'"),
    ]
    recipe = linear(llamas, {"weight": 1}, {"weight": 1}, normalize=[True, "maybe"])
    assert refused(recipe) == [("$.parameters.normalize", "expected true or false, got 'maybe'")]


@pytest.mark.parametrize(
    ("value", "at"),
    [
        (None, ""),
        ([1, None], "[1]"),
        ({"filter": "mlp"}, ""),
        ([1, {"value": 2}], ""),
        ({"value": 1, "filtr": "x"}, ".filtr"),
    ],
)
def test_what_is_no_setting_is_refused_at_the_door(llamas, value, at):
    report = forge.check(slerp(llamas, parameters={"t": value}))
    assert report.exit_code == 2
    assert [show_path(f.path) for f in report.errors] == [f"$.parameters.t{at}"]


# --- names ---------------------------------------------------------------------------------------


def test_unknown_names_are_errors_with_the_nearest_word(llamas):
    own = [{"wieght": 1, "weight": 1}, {"weight": 1}]
    recipe = linear(llamas, *own, normalise=True)
    found = dict(refused(recipe))
    assert 'did you mean "weight"?' in found["$.models[0].parameters.wieght"]
    assert 'did you mean "normalize"?' in found["$.parameters.normalise"]


def test_names_of_other_methods_are_noted_and_change_nothing(llamas):
    """Published recipes are full of them; a filter in one of them decides nothing either."""
    extra = {"t": 0.5, "scale": [{"filter": "mlp", "value": 2}, {"value": 1}]}
    report = forge.check(linear(llamas, {"weight": 1}, {"weight": 2}, **extra))
    assert not report.errors
    assert sorted(show_path(f.path) for f in report.notes) == [
        "$.parameters.scale",
        "$.parameters.t",
    ]
    plain = forge.plan(linear(llamas, {"weight": 1}, {"weight": 2}))
    assert report.plan.tensors == plain.tensors


def test_a_shared_parameter_does_not_belong_to_one_input(llamas):
    """mergekit ignores it there, so it is a note: published recipes must still build."""
    report = forge.check(linear(llamas, {"weight": 1, "normalize": False}, {"weight": 1}))
    assert not report.errors
    (note,) = report.notes
    assert note.path == ("models", 0, "parameters", "normalize")
    assert "one value for all inputs" in note.what
    merge = next(t.expr for t in report.plan.tensors)
    assert dict(merge.params)["normalize"] is True, "it stays without effect"


def test_filters_that_match_nothing_are_errors(llamas):
    setting = [{"filter": "mpl", "value": 0.1}, {"filter": "layers.9.", "value": 0.2}, {"value": 1}]
    found = refused(slerp(llamas, parameters={"t": setting}))
    assert found == [
        ("$.parameters.t[0]", 'filter "mpl" decides no tensor'),
        ("$.parameters.t[1]", 'filter "layers.9." decides no tensor'),
    ]


def test_a_filter_behind_a_wider_one_decides_nothing(llamas):
    setting = [{"filter": "mlp", "value": 0.1}, {"filter": "mlp.up_proj", "value": 0}, {"value": 1}]
    assert refused(slerp(llamas, parameters={"t": setting})) == [
        ("$.parameters.t[1]", 'filter "mlp.up_proj" decides no tensor')
    ]


def test_missing_parameters_are_reported_for_each_model(llamas):
    found = refused(linear(llamas, {}, {"weight": 1}, {}))
    assert [path for path, _ in found] == ["$.models[0]", "$.models[2]"]
    for (_, what), folder in zip(found, (llamas[0], llamas[2]), strict=True):
        assert f"linear needs the parameter weight for {folder}" in what
    ((path, what),) = refused(slerp(llamas, parameters={}))
    assert path == "$.parameters"
    assert "slerp needs the parameter t" in what


def test_scopes_are_asked_in_order_and_use_is_recorded():
    near = Scope({"t": (Condition(1.0, "mlp"), Condition(2.0, "mlp"))}, ("near",))
    far = Scope({"t": (Condition(3.0, "*"),), "other": (Condition(0.0, "x"),)}, ("far",))
    used = set()
    assert resolve("t", (near, far), "a.mlp.b", 0.0, float, used) == 1.0
    assert resolve("t", (near, far), "a.norm.b", 0.0, float, used) == 3.0
    assert resolve("none", (near, far), "a", 0.0, float, used) is None
    assert used == {("near", "t", 0), ("far", "t", 0)}
    assert unused_filters((near, far), used) == [
        (("near", "t", 1), "mlp"),
        (("far", "other", 0), "x"),
    ]
