"""`check --target`: what other engines make of an output, told before it is built."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moeforge
from moeforge import catalog, targets
from moeforge.cli import app
from moeforge.errors import RecipeError
from moeforge.plans import Fill, PlannedTensor

SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


def mixture(dense, architecture, **extra):
    experts = [{"source_model": str(dense)}] * 3
    recipe = {"base_model": str(dense), "experts": experts, "gate_mode": "random"}
    return {**recipe, "architecture": architecture, **extra}


def told(recipe, target):
    """Return errors, and warnings and notes, as texts."""
    errors, notes = targets.report(moeforge.plan(recipe), target)
    return [str(finding) for finding in errors], [str(finding) for finding in notes]


FOUND = [
    ("qwen2", {}, "qwen2_moe", "llama.cpp", "add up to less than 1"),
    ("qwen2", {}, "qwen2_moe", "mlx", "add up to less than 1"),
    ("qwen2", {"tie_word_embeddings": True}, "qwen2_moe", "llama.cpp", "ties its head"),
    ("qwen2", SLIDING, "qwen2_moe", "transformers4", "does not read layer_types"),
    ("qwen2", SLIDING, "qwen2_moe", "vllm", "does not read layer_types"),
    ("qwen2", {}, "granitemoe", "vllm", "leaves attention biases out without a word"),
    ("qwen3", {"attention_bias": True}, "qwen3_moe", "vllm", "leaves the bias of o_proj out"),
    ("qwen3", {"attention_bias": True}, "qwen3_moe", "mlx", "does not load attention biases"),
    ("qwen3", {"rope_parameters": YARN}, "qwen3_moe", "mlx", "rotary positions here (yarn)"),
    ("llama", {"head_dim": 32}, "mixtral", "mlx", "takes heads for 16 wide"),
    (
        "llama",
        {"hidden_act": "gelu"},
        "mixtral",
        "llama.cpp",
        "SiLU whatever hidden_act says: gelu",
    ),
]


@pytest.mark.parametrize(("kind", "config", "home", "target", "text"), FOUND)
def test_what_an_engine_gets_wrong_is_an_error(kind, config, home, target, text, models):
    plain = {"use_sliding_window": False} if kind.startswith("qwen") else {}
    dense = models(kind, with_tokenizer=False, **{**plain, **config})
    errors, notes = told(mixture(dense, home), target)
    assert any(text in error for error in errors), errors
    assert not any("was run on" in note for note in notes)
    assert moeforge.check(mixture(dense, home), target=target).exit_code == 4
    assert moeforge.check(mixture(dense, home)).exit_code == 0


def test_the_advice_helps(models):
    dense = models("qwen2", with_tokenizer=False, use_sliding_window=False)
    errors, _ = told(mixture(dense, "qwen2_moe"), "llama.cpp")
    assert "Write architecture: granitemoe." in errors[0]
    assert told(mixture(dense, "granitemoe"), "llama.cpp")[0] == []
    assert told(mixture(dense, "qwen2_moe", experts_per_token=3), "llama.cpp")[0] == []


@pytest.mark.parametrize("target", targets.TARGETS)
def test_a_plain_mixtral_is_read_everywhere(target, llamas):
    errors, notes = told(mixture(llamas[0], "mixtral"), target)
    assert errors == []
    assert notes == [f"{targets.TARGETS[target]} was run on mixtral"]


def test_a_window_is_a_warning_that_names_the_length(models):
    short = mixture(models("mistral", with_tokenizer=False, sliding_window=100), "mixtral")
    errors, notes = told(short, "llama.cpp")
    assert errors == []
    assert "looks back 100 (sliding_window): the same up to that length" in notes[0]
    never = mixture(models("mistral", with_tokenizer=False, sliding_window=512), "mixtral")
    assert told(never, "llama.cpp")[1] == ["llama.cpp was run on mixtral"]


def test_a_gate_of_zero_is_found(models):
    dense = models("qwen2", with_tokenizer=False, use_sliding_window=False)
    plan = moeforge.plan(mixture(dense, "qwen2_moe", experts_per_token=3))
    tensors = tuple(
        PlannedTensor(tensor.name, tensor.spec, Fill(0.0))
        if tensor.name.endswith("shared_expert_gate.weight")
        else tensor
        for tensor in plan.tensors
    )
    assert targets.report(plan, "llama.cpp")[0] == ()
    (error,) = targets.report(replace(plan, tensors=tensors), "llama.cpp")[0]
    assert "it gives NaN" in error.what


def test_code_of_its_own_and_types_that_are_not_there(models):
    own = mixture(models("gpt2", with_tokenizer=False, n_embd=64, n_layer=4, n_head=4), "remote")
    assert "runs no code of a model's own (modeling_moeforge.py)" in told(own, "llama.cpp")[0][0]
    assert "asks for AutoModel in auto_map" in told(own, "vllm")[0][0]
    assert told(own, "transformers4") == ([], ["transformers 4.57 was run on moeforge_gpt2"])
    plan = moeforge.plan(mixture(models("qwen2", with_tokenizer=False), "qwen2_moe"))
    for kind, text in (("lfm2_moe", "has no lfm2_moe"), ("new_moe", "nobody has looked")):
        given = replace(plan, config={**plan.config, "model_type": kind})
        errors, notes = targets.report(given, "transformers4")
        assert text in str((*errors, *notes)[0])


def test_stacks_are_read_like_their_models(llamas):
    slices = [{"sources": [{"model": str(llamas[0]), "layer_range": [0, 2]}]}]
    recipe = {"merge_method": "passthrough", "slices": slices}
    assert told(recipe, "mlx") == ([], ["mlx-lm reads this like any other llama model"])


def test_the_page_has_a_row_for_every_family_and_says_the_same():
    page = Path(__file__).parent.parent / "docs" / "engines.md"
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    cells = {
        row[0]: dict(zip(targets.TARGETS, row[2:], strict=True)) for row in rows if len(row) == 6
    }
    assert set(catalog.names("families")) <= set(cells)
    for family in catalog.names("families"):
        for target in targets.TARGETS:
            cell = cells[family][target]
            absent, run = (
                family in table[target].split() for table in (targets.ABSENT, targets.RUN)
            )
            assert absent is cell.startswith("✗ not there"), (family, target)
            assert cell == "\u2013" or run or absent, (family, target)
            assert not (run and absent)


def test_the_command_line(models, tmp_path):
    dense = models("qwen2", with_tokenizer=False, use_sliding_window=False)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps(mixture(dense, "qwen2_moe")))
    run = CliRunner().invoke(app, ["check", str(recipe), "--target", "llama.cpp"])
    assert run.exit_code == 4
    assert "error: llama.cpp weighs the chosen experts" in run.stderr
    run = CliRunner().invoke(app, ["check", str(recipe), "--target", "llamacpp"])
    assert run.exit_code == 2
    assert 'did you mean "llama.cpp"?' in run.stderr
    with pytest.raises(RecipeError):
        targets.report(moeforge.plan(mixture(dense, "qwen2_moe")), "ollama")
