"""Every tensor of every input is read or knowingly left out, in every kind of plan."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import zoo
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moeforge import forge
from moeforge.errors import PlanError
from moeforge.planners.account import accounted
from moeforge.plans import ROUTERS, Read, walk

TYPES = sorted(zoo.ZOO)[::3]
"""Every third type: layouts of all kinds, in half a minute."""


def names(folder):
    """Names of all tensors of a checkpoint, read by safetensors itself."""
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found.update(opened.keys())
    return found


def account(plan, folders):
    """Hold a plan to account by other means than its own check."""
    read = {
        (part.source, part.name)
        for tensor in plan.tensors
        for part in walk(tensor.expr)
        if isinstance(part, Read) and part.source != ROUTERS
    }
    left = {(at.source, at.name) for at in plan.left_out}
    every = {(str(folder), name) for folder in folders for name in names(folder)}
    assert read | left == every
    assert not read & left
    assert all(why for why in plan.left_out.values())
    made = [tensor.name for tensor in plan.tensors]
    assert len(made) == len(set(made))


def merge(*folders):
    models = [{"model": str(folder), "parameters": {"weight": 1}} for folder in folders]
    return {"merge_method": "linear", "models": models}


def stack(*folders):
    spans = [[0, 3], [1, 4]]
    slices = [
        {"sources": [{"model": str(folder), "layer_range": span}]}
        for folder, span in zip(folders, spans, strict=False)
    ]
    return {"slices": slices}


def mixture(base, *experts):
    entries = [{"source_model": str(expert)} for expert in experts]
    return {"base_model": str(base), "experts": entries, "gate_mode": "random"}


@pytest.mark.parametrize("kind", TYPES)
def test_nothing_is_lost(kind, models):
    shape = {"with_tokenizer": False, **zoo.ZOO[kind]}
    one, other = models(kind, seed=1, **shape), models(kind, seed=2, **shape)
    for make in (merge, stack, mixture):
        # A mixture has tensors of its base beside those of its experts: both are models of it.
        folders = (one, other) if make is not mixture else (one, other, one)
        reason = refusals(make).get(kind)
        if reason is None:
            account(forge.plan(make(*folders)), {one, other})
        else:
            with pytest.raises(PlanError, match=re.escape(reason)):
                forge.plan(make(*folders))


@cache
def refusals(make):
    """Why which types are refused, by the pages that say so and that other tests hold to be true.

    Every type can be merged.
    """
    if make is merge:
        return {}
    page = Path(__file__).parents[1] / "docs" / ("stacks.md" if make is stack else "families.md")
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    if make is mixture:
        return {row[0]: row[-1] for row in rows if row[1:2] == ["none"]}
    first = "middle repeated"  # the stack that `stack` makes, the first of that page
    return {row[0]: row[-1].split(f"{first}: ")[-1] for row in rows if row[1:2] == ["no"]}


def test_nothing_is_lost_of_adapters_and_inline_recipes(llamas, tmp_path):
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(llamas[1])
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"])).save_pretrained(
        adapter
    )
    plan = forge.plan(merge(llamas[0], f"{llamas[1]}+{adapter}"))
    account(plan, {*llamas[:2], adapter})
    inner = merge(*llamas[1:])
    experts = [{"source_model": inner}, {"source_model": f"{llamas[1]}+{adapter}"}]
    recipe = {"base_model": str(llamas[0]), "experts": experts, "gate_mode": "random"}
    account(forge.plan(recipe), {*llamas, adapter})


def test_nothing_is_lost_where_vocabularies_are_united(llamas, models):
    wider = models("llama", seed=7, vocab_size=320)
    plan = forge.plan({**merge(llamas[0], wider), "tokenizer": {"source": "union"}})
    account(plan, {llamas[0], wider})


def test_layers_in_no_slice_are_left_out_knowingly(llamas):
    slices = [{"sources": [{"model": str(llamas[0]), "layer_range": [1, 2]}]}]
    plan = forge.plan({"slices": slices})
    account(plan, {llamas[0]})
    assert set(plan.left_out.values()) == {"in no slice"}


# --- the check that every planning ends with -----------------------------------------------------


@pytest.fixture
def plan(llamas):
    return forge.plan(merge(*llamas[:2]))


def test_a_plan_that_loses_a_tensor_is_refused(plan, llamas):
    less = replace(plan, tensors=plan.tensors[1:])
    with pytest.raises(PlanError) as caught:
        accounted(less)
    for folder, finding in zip(llamas[:2], caught.value.findings, strict=True):
        assert f"1 tensors of {folder} have no place in the output: " in finding.what
        assert plan.tensors[0].name in finding.what
    why = {Read(str(folder), plan.tensors[0].name): "known" for folder in llamas[:2]}
    assert accounted(replace(less, left_out=why)).left_out == why


def test_a_plan_that_makes_a_tensor_twice_is_refused(plan):
    with pytest.raises(PlanError, match="1 tensors would be made twice"):
        accounted(replace(plan, tensors=(*plan.tensors, plan.tensors[0])))


def test_a_plan_that_reads_what_is_not_there_is_refused(plan, llamas):
    odd = replace(plan.tensors[0], name="odd", expr=Read(str(llamas[0]), "nowhere"))
    with pytest.raises(PlanError, match="lacks 1 tensors: nowhere"):
        accounted(replace(plan, tensors=(*plan.tensors, odd)))
    strange = replace(odd, expr=Read("a stranger", "x"))
    with pytest.raises(PlanError, match="reads a stranger, which it does not open"):
        accounted(replace(plan, tensors=(*plan.tensors, strange)))


def test_what_one_model_leaves_out_and_another_uses_is_not_listed(plan, llamas):
    used = Read(str(llamas[0]), plan.tensors[0].name)
    assert accounted(replace(plan, left_out={used: "a model says so"})).left_out == {}


def test_every_planning_ends_with_the_check(llamas, monkeypatch):
    """A planner that forgets a tensor is caught."""
    from moeforge.planners import merge as planner

    real = planner.merged

    def forgetful(*arguments):
        model = real(*arguments)
        tensors = dict(model.tensors)
        del tensors["model.norm.weight"]
        return replace(model, tensors=tensors)

    monkeypatch.setattr(planner, "merged", forgetful)
    report = forge.check(merge(*llamas[:2]))
    assert report.exit_code == 4
    assert "model.norm.weight" in json.dumps([error.what for error in report.errors])
