"""What is wrong with a recipe: key, expected value, actual value, line.

Reads YAML text and pydantic's findings; writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import yaml

from .keys import Key, meant

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Place = tuple[str | int, ...]
Lines = Mapping[Place, int]

_DEEPEST = 8  # levels; a recipe has four (azure.endpoint.liveness_probe.period)
_EXPECTED = {
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "list_type": "a list",
    "string_type": "text",
    "path_type": "a path",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-', at most 64, the first one "
    "a letter or digit",
    "string_too_short": "some text",
    "literal_error": "{expected}",
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "less than {lt}",
    "too_short": "a list of {min_length} or more",
}


def fault_line(item: ErrorDetails, lines: Lines, keys: Sequence[Key]) -> str:
    """One of pydantic's findings: `finetune.lora_r: expected 1 or more, got 0 (line 7)`."""
    place: Place = tuple(item["loc"])
    key = ".".join(map(str, place)) or "recipe"
    what = "is missing" if item["type"] == "missing" else plain(item)
    if item["type"] == "extra_forbidden":
        names = meant(key, keys)
        hint = f"did you mean {' or '.join(names)}?" if names else "check its spelling"
        what = f"unknown key; {hint} (all keys: phi3 recipes --keys)"
    # The line of the key, or of what should hold it.
    for length in range(len(place), 0, -1):
        # One entry may be written for a list of one: its number is then nowhere in the file.
        for known in (place[:length], tuple(part for part in place[:length] if part != 0)):
            if known in lines:
                return f"{key}: {what} (line {lines[known]})"
    return f"{key}: {what}"


def is_typed(place: Sequence[str | int], overrides: Sequence[str]) -> bool:
    """Whether an override of the command line names this key, or a section that holds it."""
    names = tuple(map(str, place))
    typed = [tuple(word.partition("=")[0].split(".")) for word in overrides]
    return any(names[: len(key)] == key for key in typed)


def plain(item: ErrorDetails) -> str:
    """What was expected, and what was found."""
    form = _EXPECTED.get(item["type"])
    if form is not None:
        limits = {
            name: int(value) if isinstance(value, float) and value.is_integer() else value
            for name, value in item.get("ctx", {}).items()
        }
        return f"expected {form.format(**limits)}, got {_shown(item.get('input'))}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    given = item.get("input")
    return message if isinstance(given, (dict, list)) else f"{message}, got {_shown(given)}"


def lines_of(text: str) -> tuple[Lines, list[str]]:
    """The line of each key and list entry of a YAML text, and a fault for each key given twice."""
    lines: dict[Place, int] = {}
    twice: list[str] = []
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for place, line in _places(root, ()):
        if place in lines:
            key = ".".join(map(str, place))
            twice.append(f"{key}: given twice (lines {lines[place]} and {line})")
        lines[place] = line
    return lines, twice


def _places(node: yaml.Node | None, place: Place) -> Iterator[tuple[Place, int]]:
    """Keys before what they hold; an alias may lead in circles, a recipe is not so deep."""
    if len(place) > _DEEPEST:
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            if key.value != "<<":
                yield inner, key.start_mark.line + 1
                yield from _places(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*place, number), value.start_mark.line + 1
            yield from _places(value, (*place, number))


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping of keys"
    if isinstance(value, (list, tuple)):
        return "a list" if value else "an empty list"
    return repr(value)
