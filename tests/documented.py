"""What docs/json.md says that commands print, and whether an output is that."""

import re
from functools import cache
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "json.md"
_PLAIN = {"string": str, "integer": int, "boolean": bool, "number": (int, float)}


@cache
def sections():
    """Types by key, by the heading of the table."""
    found = {}
    for part in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| `(.+?)` \| (.+?) \|", part, flags=re.MULTILINE)
        for name in part.partition("\n")[0].split(", "):
            found[name] = dict(rows)
    return found


def hold(command, data):
    """Hold the output of a command to its table: no key too many, none missing, all of its type."""
    rows = sections()[command]
    lists = all(key.startswith("[]") for key in rows)
    assert isinstance(data, list if lists else dict), command
    for number, item in enumerate(data if lists else [data]):
        _object(item, rows, "[]." if lists else "", f"{command}[{number}]")


def _object(data, rows, before, where):
    names = {key[len(before) :] for key in rows if key.startswith(before)}
    names = {name for name in names if not set(name) & set(".[]{}")}
    assert isinstance(data, dict), f"{where}: {data!r} is no object"
    assert set(data) <= names, f"{where}: not documented: {set(data) - names}"
    for name in names:
        kinds = rows[before + name].split(" or ")
        if name not in data:
            assert kinds[-1] == "absent", f"{where}.{name} is missing"
            continue
        _value(data[name], [k for k in kinds if k != "absent"], rows, before + name, where)


def _value(value, kinds, rows, path, where):
    where, first = f"{where}.{path}", kinds[0]
    for word, kind, mark in (("list of ", list, "[]"), ("map of ", dict, "{}")):
        if first.startswith(word):
            # "or null" after a list is of its items where a list came, of itself where none did.
            if value is None and "null" in kinds:
                return
            assert isinstance(value, kind), f"{where}: {value!r} is no {kind.__name__}"
            inner = [first.removeprefix(word), *kinds[1:]]
            for item in value if kind is list else value.values():
                _value(item, inner, rows, path + mark, where)
            return
    if "any" in kinds or (value is None and "null" in kinds):
        return
    if first == "object":
        _object(value, rows, f"{path}.", where)
    elif first.startswith("`"):
        hold(first.strip("`"), value)
    else:
        types = [_PLAIN[kind] for kind in kinds if kind != "null"]
        fits = any(isinstance(value, kind) for kind in types)
        fits &= "boolean" in kinds or not isinstance(value, bool)
        assert fits, f"{where}: {value!r} is no {' or '.join(kinds)}"
