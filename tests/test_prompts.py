"""Prompt files: what is in them, and what is said of those that cannot be used."""

import json

import pytest

from moeforge import forge
from moeforge import recipe as recipes
from moeforge.recipe import prompts
from moeforge.recipe.prompts import Prompt

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_texts_are_separated_by_blank_lines(tmp_path):
    text = "\n\nfirst\n  second line\n\n\t \nthird\r\n\r\nfourth\n\n"
    loaded = prompts.load(write(tmp_path / "a.txt", text))
    assert [prompt.text for prompt in loaded] == ["first\n  second line", "third", "fourth"]


def test_jsonl_holds_texts_and_chats(tmp_path):
    lines = [json.dumps({"text": "one\n\ntwo"}), "", json.dumps({"messages": CHAT, "id": 7})]
    loaded = prompts.load(write(tmp_path / "a.jsonl", "\r\n".join(lines) + "\r\n"))
    assert loaded == (Prompt(text="one\n\ntwo"), Prompt(messages=tuple(CHAT)))


def test_line_separators_inside_a_json_string_are_text(tmp_path):
    """json.dumps(ensure_ascii=False) leaves U+2028 and U+0085 as they are."""
    text = "a\u2028b\x85c"
    line = json.dumps({"text": text}, ensure_ascii=False)
    assert prompts.load(write(tmp_path / "a.jsonl", line)) == (Prompt(text=text),)


@pytest.mark.parametrize(("name", "text"), [("a.txt", "é"), ("a.jsonl", '{"text": "é"}')])
def test_a_byte_order_mark_is_no_text(name, text, tmp_path):
    path = write(tmp_path / name, b"\xef\xbb\xbf" + text.encode())
    assert prompts.load(path) == (Prompt(text="é"),)


@pytest.mark.parametrize(
    ("name", "text", "line", "said"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": }\n', 3, "not JSON"),
        ("a.jsonl", '{"text": "x"}\nplain text\n', 2, "not JSON"),
        ("a.jsonl", '{"text": 3}\n', 1, 'expected {"text"'),
        ("a.jsonl", '{"text": ""}\n', 1, "the text is empty"),
        ("a.jsonl", '["x"]\n', 1, 'expected {"text"'),
        ("a.jsonl", '{"messages": []}\n', 1, 'expected {"text"'),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', 1, 'expected {"text"'),
        ("a.jsonl", "[" * 100_000 + "\n", 1, "nested too deeply"),
        ("a.jsonl", "\n\n", None, "no prompts in it"),
        ("a.txt", " \n\n \n", None, "no prompts in it"),
        ("a.txt", b"\xff\xfe\x00", None, "cannot be read"),
        ("a.json", '{"text": "x"}', None, "ends in .txt or .jsonl"),
        ("none.txt", None, None, "cannot be read"),
    ],
)
def test_what_cannot_be_used_is_said_with_file_and_line(name, text, line, said, tmp_path):
    path = tmp_path / name
    if text is not None:
        write(path, text)
    with pytest.raises(ValueError, match="a") as caught:
        prompts.load(path)
    where = f"{path}, line {line}: " if line else f"{path}: "
    assert str(caught.value).startswith(where)
    assert said in str(caught.value)


def mixture(llamas, tmp_path, *experts):
    """A recipe file in `tmp_path`, next to the prompt files that it names."""
    lines = [f"base_model: {llamas[0]}", "experts:"]
    for folder, prompts_ in zip(llamas[1:], experts, strict=True):
        lines += [f"  - source_model: {folder}", f"    {prompts_}"]
    return write(tmp_path / "moe.yml", "\n".join([*lines, "gate_mode: cheap_embed\n"]))


def test_files_are_found_beside_the_recipe_and_added_to_its_prompts(llamas, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(tmp_path / "a.txt", "from the file")
    both = "positive_prompts: [from the recipe]\n    prompts_file: a.txt"
    loaded = recipes.load(mixture(llamas, tmp_path, both, "prompts_file: here.txt"))
    first, second = loaded.recipe.experts
    expected = (Prompt(text="from the recipe"), Prompt(text="from the file"))
    assert loaded.expert_prompts(first) == expected
    write(tmp_path / "elsewhere" / "here.txt", "from the working directory")
    assert loaded.expert_prompts(second) == (Prompt(text="from the working directory"),)


def test_chats_can_be_compared_like_texts(llamas, tmp_path):
    write(tmp_path / "chat.jsonl", json.dumps({"messages": CHAT}))
    recipe = mixture(llamas, tmp_path, "prompts_file: chat.jsonl", "positive_prompts: [text]")
    (template,) = forge.check(recipe).errors
    assert "has no chat template" in template.what
    recipe = mixture(llamas, tmp_path, *["prompts_file: chat.jsonl"] * 2)
    template, finding = forge.check(recipe).errors
    assert "has no chat template" in template.what
    assert "experts[0] has the same prompts" in finding.what
    assert (finding.path, finding.line) == (("experts", 1), 5)


def test_every_problem_with_prompts_is_reported_at_once(llamas, tmp_path):
    write(tmp_path / "bad.jsonl", "no")
    recipe = mixture(llamas, tmp_path, "prompts_file: bad.jsonl", "positive_prompts: []")
    first, second = forge.check(recipe).errors
    assert (first.path, first.line) == (("experts", 0, "prompts_file"), 4)
    assert f"{tmp_path / 'bad.jsonl'}, line 1: not JSON" in first.what
    assert (second.path, second.line) == (("experts", 1), 5)
    assert "this one has none" in second.what
