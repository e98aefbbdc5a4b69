"""A recipe: what to train on what, how it is judged and how it is served. Reads YAML.

`load_recipe` reports every fault at once; relative paths count from the
recipe's folder, those of an override from the current folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ..errors import RecipeError, UsageError
from ..run import write_atomically
from .azure import AzureSection
from .faults import fault_line, is_typed, lines_of
from .keys import keys_of
from .sections import (
    HUB,
    BaseSection,
    ConnectionSection,
    DataSection,
    EvaluateSection,
    FinetuneSection,
    GateSection,
    HubSet,
    ModelSection,
    Name,
    Section,
    ServeSection,
)

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

YamlMap = dict[str, Any]  # what YAML can hold, until pydantic has read it


class Recipe(Section):
    """A whole recipe; see training/recipes/ for shipped ones."""

    name: Name
    """Name of the recipe, and of its run where --run gives none."""
    model: ModelSection = ModelSection()
    base: BaseSection | None = None
    data: DataSection
    finetune: FinetuneSection = FinetuneSection()
    evaluate: EvaluateSection = EvaluateSection()
    gate: GateSection = GateSection()
    serve: ServeSection = ServeSection()
    connection: ConnectionSection = ConnectionSection()
    azure: AzureSection = AzureSection()
    ask: Annotated[str, Field(min_length=1)] | None = None
    """The question asked at the end; none: the first held-out one."""

    @model_validator(mode="after")
    def _flash_packs_one_row(self) -> Recipe:
        flash = self.model.attn_implementation == "flash_attention_2"
        if flash and self.finetune.packing and self.finetune.per_device_train_batch_size > 1:
            raise ValueError(
                "flash_attention_2 keeps packed conversations apart only with one row per batch: "
                "set "
                "finetune.per_device_train_batch_size=1 and raise gradient_accumulation_steps"
            )
        return self

    @model_validator(mode="after")
    def _tiny_has_base(self) -> Recipe:
        if self.model.is_tiny and self.base is None:
            raise ValueError("model.name_or_path tiny needs a base: section (what to train it on)")
        return self


# What a recipe sets for one model and would be wrong for another.
_OF_THE_MODEL = ("model", "base", "finetune", "evaluate", "gate", "serve")
# What a recipe sets for its chats and would be wrong for others.
_OF_THE_CHATS: Mapping[str, object] = {"data.validation": [], "ask": None}


def load_recipe(
    path: Path, overrides: Sequence[str] = (), *, model_from: Path | None = None
) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides.

    The value of a key whose type is text is taken as it was typed, any other one as YAML.

    `model_from` names a recipe whose model, and the sections that are set for it, are taken instead
    of the recipe's own and of an override of `model.name_or_path`.

    With `data.train` overridden, the recipe's held-out chats and its question are replaced as well:
    see `replaced_with_chats`.

    Raises RecipeError with every fault: unreadable YAML, unknown keys, wrong values, and files
    that a path names but that do not exist. Those of overrides are reported as the command line's.
    """
    content = read_yaml(path)
    lines, faults = lines_of(path.read_text(encoding="utf-8"))
    _resolve_paths(content, path.parent)
    if model_from is not None:
        other = read_yaml(model_from)
        _resolve_paths(other, model_from.parent)
        for section in _OF_THE_MODEL:
            content.pop(section, None)
        content |= {section: other[section] for section in _OF_THE_MODEL if section in other}
        if isinstance(content.get("data"), dict):
            content["data"]["casual_copies"] = other["data"].get("casual_copies", False)
        overrides = [text for text in overrides if not text.startswith("model.name_or_path=")]
    of_file: set[tuple[tuple[int | str, ...], str]] = set()  # faults that the file alone has
    if overrides:
        try:
            Recipe.model_validate(deepcopy(content))
        except ValidationError as error:
            of_file = {(item["loc"], item["msg"]) for item in error.errors()}
    typed = _apply_overrides(content, overrides)
    for key, value in replaced_with_chats(overrides).items():
        _set(content, key.split("."), value)
    _resolve_paths(content, Path.cwd())  # paths typed on the command line; others are absolute now
    keys = keys_of(Recipe)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        items = error.errors()
        for item in items:
            # A fault that the file alone does not have comes from what was typed, whatever its key.
            is_new = bool(overrides) and (item["loc"], item["msg"]) not in of_file
            by_hand = is_new or is_typed(item["loc"], overrides)
            (typed if by_hand else faults).append(fault_line(item, {} if by_hand else lines, keys))
        # What is sound of it names files as well: those that are missing belong to the same report.
        recipe = _sound_part(content, items)
    named: dict[str, Sequence[Path | HubSet]] = {
        "base.data": recipe.base.data if recipe.base else [],
        "data.train": recipe.data.train,
        "data.validation": recipe.data.validation,
        "data.replay": recipe.data.replay,
        "evaluate.canary": recipe.evaluate.canary or [],
        "evaluate.probes": recipe.evaluate.probes or [],
    }
    for key, paths in named.items():
        reported = typed if is_typed(key.split("."), overrides) else faults
        for file in paths:
            if isinstance(file, HubSet) or file.is_file():
                continue
            if not (key in _MAY_BE_FOLDERS and file.is_dir()):
                reported.append(f"{key}: no such file: {file}")
    if faults or typed:
        raise RecipeError(str(path), faults, typed)
    return recipe


def azure_section_of(values: Mapping[str, str]) -> AzureSection:
    """The `azure:` section of values typed on the command line; UsageError with every fault."""
    try:
        return AzureSection.model_validate(dict(values))
    except ValidationError as error:
        keys = keys_of(Recipe)
        items = error.errors()
        for item in items:
            item["loc"] = ("azure", *item["loc"])
        raise UsageError("\n".join(fault_line(item, {}, keys) for item in items)) from None


def replaced_with_chats(overrides: Sequence[str]) -> YamlMap:
    """What overriding `data.train` replaces: held-out chats and question of the recipe's own chats.

    A share of the new chats is held back, and the first of them is asked. A key that is overridden
    itself stays; empty where `data.train` is not overridden.
    """
    typed = {text.partition("=")[0] for text in overrides}
    if "data.train" not in typed:
        return {}
    return {key: value for key, value in _OF_THE_CHATS.items() if key not in typed}


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe as it was resolved, so that `load_recipe` reads the same one again."""
    content = recipe.model_dump(mode="json")
    # In the order of the sections, as a person would write it.
    write_atomically(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 does and everybody expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parse(text: str) -> object:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader


def read_yaml(path: Path) -> YamlMap:
    """The keys of a YAML file; RecipeError when it cannot be read as such."""
    try:
        content = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(str(path), ["no such file; shipped recipes: phi3 recipes"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        raise RecipeError(str(path), [f"is not YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(content, dict):
        raise RecipeError(str(path), ["expected keys such as name:, model:, data:"])
    return content


def _apply_overrides(content: YamlMap, overrides: Sequence[str]) -> list[str]:
    faults = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            faults.append(f"{override!r}: expected key.sub=value, e.g. finetune.learning_rate=1e-4")
            continue
        try:
            _set(content, key.split("."), _value(key, value))
        except yaml.YAMLError:
            faults.append(f"{override!r}: the value is not YAML")
        except TypeError:
            faults.append(f"{override!r}: {key.rpartition('.')[0]} is not a section")
    return faults


# Mappings whose values are text under names of the user's own.
_TEXTS_UNDER = "azure.tags."


def _value(key: str, text: str) -> object:
    """The value of an override: as typed where the key is text, else what YAML makes of it.

    A name may be `007` or `no`, which YAML would read as a number and as false.
    """
    known = next((each for each in keys_of(Recipe) if each.name == key), None)
    is_list = text.startswith("[") and text.endswith("]")
    if text in ("", "null") or (known is None and not key.startswith(_TEXTS_UNDER)):
        return _parse(text)
    if known is None or known.is_text:
        return text
    if is_list or not known.is_list_of_text:
        return _parse(text)
    return text if key == "finetune.target_modules" else [text]


def _set(content: YamlMap, keys: list[str], value: object) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise TypeError(key)
    content[keys[-1]] = value


_PATH_KEYS = (
    ("base", "data"),
    ("data", "train"),
    ("data", "validation"),
    ("data", "replay"),
    ("evaluate", "canary"),
    ("evaluate", "probes"),
)
_MAY_BE_FOLDERS = ("data.train", "data.validation", "data.replay")


def _resolve_paths(content: YamlMap, folder: Path) -> None:
    """Make paths absolute, and turn a single path into a list of one."""
    for section, key in _PATH_KEYS:
        values = content.get(section)
        if not isinstance(values, dict) or values.get(key) is None:
            continue
        entries = values[key] if isinstance(values[key], list) else [values[key]]
        values[key] = [
            str((folder / Path(item).expanduser()).resolve())
            if isinstance(item, str) and not item.startswith(HUB)
            else item
            for item in entries
            if item is not None
        ]


def _sound_part(content: YamlMap, faults: Sequence[ErrorDetails]) -> Recipe:
    """What of a faulty recipe names files and can be read: each section without its wrong keys."""
    wrong = {tuple(item["loc"][:2]) for item in faults}
    sections: YamlMap = {"data": DataSection.model_construct(train=[])}
    for name in {section for section, _key in _PATH_KEYS}:
        values = content.get(name)
        if not isinstance(values, dict):
            continue
        sound = {key: value for key, value in values.items() if (name, key) not in wrong}
        try:
            kind: Any = Recipe.model_fields[name].annotation
            sections[name] = TypeAdapter(kind).validate_python(sound)
        except ValidationError:  # what is missing was already reported
            continue
    return Recipe.model_construct(**sections)
