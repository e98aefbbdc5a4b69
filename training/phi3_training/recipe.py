"""A recipe: what to train on what, how it is judged and how it is served. Reads YAML.

`load_recipe` reports every fault at once; relative paths count from the
recipe's folder, those of an override from the current folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from .errors import RecipeError
from .models.catalogue import SMALL, TINY
from .recipe_azure import AzureSection as AzureSection
from .recipe_data import HUB, HubSet
from .recipe_data import DataSection as DataSection
from .recipe_faults import fault_line, lines_of
from .recipe_finetune import AuditRule as AuditRule
from .recipe_finetune import FinetuneSection as FinetuneSection
from .recipe_types import Confidence, Name, OneOrMany, Positive, Rate, Section, Share
from .run import write_atomically


class ModelSection(Section):
    """The model to fine-tune: `tiny`, `small`, a Hugging Face id, or a folder of weights.

    `phi3 models` lists them.
    """

    name_or_path: Annotated[str, Field(min_length=1)] = TINY
    revision: str | None = None
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @property
    def is_tiny(self) -> bool:
        """Whether the base model is the small Phi-3 that the project makes itself."""
        return self.name_or_path == TINY

    @property
    def is_small(self) -> bool:
        """Whether the base model is the pretrained one that comes as a wheel."""
        return self.name_or_path == SMALL


class BaseSection(Section):
    """How the tiny Phi-3 is built and taught from scratch; only for `model.name_or_path: tiny`."""

    data: Annotated[list[Path], Field(min_length=1)]
    vocab_size: Annotated[int, Field(ge=300)] = 2048
    hidden_size: Positive = 128
    intermediate_size: Positive = 256
    num_hidden_layers: Positive = 2
    num_attention_heads: Positive = 4
    max_position_embeddings: Annotated[int, Field(ge=64)] = 512
    learning_rate: Rate = 6e-3
    num_train_epochs: Positive = 30
    per_device_train_batch_size: Positive = 32
    target_loss: Annotated[float, Field(ge=0.0)] = 0.012
    seed: int = 42

    @model_validator(mode="after")
    def _heads_divide(self) -> BaseSection:
        # ONNX Runtime's attention wants a head size that is a multiple of 16.
        if self.hidden_size % (16 * self.num_attention_heads):
            raise ValueError("hidden_size must be a multiple of 16 x num_attention_heads")
        return self


class EvaluateSection(Section):
    """What is asked of the base and the tuned model; `canary` and `probes`: None is the shipped."""

    max_new_tokens: Positive = 64
    max_rows: Positive | None = None
    per_device_eval_batch_size: Positive = 32
    canary: list[Path] | None = None
    probes: list[Path] | None = None
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 1000
    confidence: Confidence = 0.95
    seed: Annotated[int, Field(ge=0)] = 42


class GateRule(Section):
    """One demand of the gate: a metric of a part, by how much, and how sure one must be."""

    metric: Literal[
        "exact_match",
        "contains",
        "token_f1",
        "f1_over_lookalikes",
        "rouge_l",
        "bleu",
        "chrf",
        "perplexity",
    ]
    part: Literal["validation", "train", "replay", "canary"] = "validation"
    value: Annotated[float, Field(ge=0.0)] = 0.0
    confidence: Confidence = 0.95


class RefusalRule(Section):
    """By how much the share of refused requests may change, either way."""

    metric: Literal["refusal_rate"] = "refusal_rate"
    part: Literal["validation", "train", "replay", "canary", "probes"] = "probes"
    value: Share = 0.2
    confidence: Confidence = 0.95


class GateSection(Section):
    """What a model must show before it is deployed; an empty list asks nothing."""

    min_gain: OneOrMany[GateRule] = [GateRule(metric="f1_over_lookalikes", value=0.02)]
    max_regression: OneOrMany[GateRule] = [GateRule(metric="contains", part="canary", value=0.2)]
    max_refusal_change: OneOrMany[RefusalRule] = [RefusalRule()]


class ServeSection(Section):
    """The local endpoint; limits carry the names that Azure ML gives them."""

    engine: Literal["auto", "ort-genai", "transformers", "upstream"] = "auto"
    precision: Literal["fp32", "int8", "int4"] = "fp32"
    adapters: bool = False
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    max_concurrent_requests_per_instance: Positive = 32
    request_timeout_ms: Annotated[int, Field(ge=100, le=180_000)] = 60_000
    max_request_bytes: Annotated[int, Field(ge=1024)] = 1_500_000
    max_new_tokens: Positive = 256
    upstream_url: str | None = None
    upstream_model: str | None = None

    @model_validator(mode="after")
    def _upstream_has_url(self) -> ServeSection:
        if self.engine == "upstream" and not self.upstream_url:
            raise ValueError("engine upstream needs upstream_url, e.g. http://127.0.0.1:11434/v1")
        if self.adapters and self.engine not in ("auto", "transformers"):
            raise ValueError("adapters are served by name by the engine transformers only")
        return self


class ConnectionSection(Section):
    """The Prompt flow connection that the flow names."""

    name: Name = "phi3_connection"
    # score is what the tutorials' endpoints speak; openai streams
    dialect: Literal["score", "openai"] = "score"


class Recipe(Section):
    """A whole recipe; see training/recipes/ for shipped ones."""

    name: Name
    model: ModelSection = ModelSection()
    base: BaseSection | None = None
    data: DataSection
    finetune: FinetuneSection = FinetuneSection()
    evaluate: EvaluateSection = EvaluateSection()
    gate: GateSection = GateSection()
    serve: ServeSection = ServeSection()
    connection: ConnectionSection = ConnectionSection()
    azure: AzureSection = AzureSection()
    ask: Annotated[str, Field(min_length=1)] = "Who founded Microsoft?"

    @model_validator(mode="after")
    def _flash_packs_one_row(self) -> Recipe:
        flash = self.model.attn_implementation == "flash_attention_2"
        if flash and self.finetune.packing and self.finetune.per_device_train_batch_size > 1:
            raise ValueError(
                "flash_attention_2 keeps packed conversations apart in one row at a time only: set "
                "finetune.per_device_train_batch_size=1 and raise gradient_accumulation_steps"
            )
        return self

    @model_validator(mode="after")
    def _tiny_has_base(self) -> Recipe:
        if self.model.is_tiny and self.base is None:
            raise ValueError("model.name_or_path tiny needs a base: section (what to teach it)")
        return self


# What a recipe sets for one model and would be wrong for another.
_OF_THE_MODEL = ("model", "base", "finetune", "evaluate", "gate", "serve")


def load_recipe(
    path: Path, overrides: Sequence[str] = (), *, model_from: Path | None = None
) -> Recipe:
    """Read a recipe and apply `key.sub=value` overrides (values are YAML).

    `model_from` names a recipe whose model, and the sections that are set for it, are taken instead
    of the recipe's own and of an override of `model.name_or_path`.

    Raises RecipeError with every fault: unreadable YAML, unknown keys, wrong values, and files
    that a path names but that do not exist.
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
    faults += _apply_overrides(content, overrides)
    _resolve_paths(content, Path.cwd())  # paths typed on the command line
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        found = error.errors()
        faults += [fault_line(item, lines, overrides) for item in found]
        recipe = _sound_part(content, found)
    faults += _missing_files(recipe)
    if faults:
        raise RecipeError(str(path), faults)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the recipe as it was resolved, so that `load_recipe` reads the same one again."""
    content = recipe.model_dump(mode="json")
    write_atomically(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, as YAML 1.2 does and everybody expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader


def read_yaml(path: Path) -> dict[str, Any]:
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


def _apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    faults = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            faults.append(f"{override!r}: expected key.sub=value, e.g. finetune.learning_rate=1e-4")
            continue
        try:
            _set(content, key.split("."), _parse(value))
        except yaml.YAMLError:
            faults.append(f"{override!r}: the value is not YAML")
        except TypeError:
            faults.append(f"{override!r}: {key.rpartition('.')[0]} is not a section")
    return faults


def _set(content: dict[str, Any], keys: list[str], value: Any) -> None:
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


_FOLDERS = ("data.train", "data.validation", "data.replay")


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    """Make paths absolute, and let one path stand for a list of one."""
    for section, key in _PATH_KEYS:
        values = content.get(section)
        if not isinstance(values, dict) or values.get(key) is None:
            continue
        entries = values[key] if isinstance(values[key], list) else [values[key]]
        values[key] = [
            str((folder / Path(item).expanduser()).resolve()) if _is_path(item) else item
            for item in entries
            if item is not None
        ]


def _is_path(item: Any) -> bool:
    return isinstance(item, str) and not item.startswith(HUB)


def _missing_files(recipe: Recipe) -> list[str]:
    named: dict[str, Sequence[Path | HubSet]] = {
        "base.data": recipe.base.data if recipe.base else [],
        "data.train": recipe.data.train,
        "data.validation": recipe.data.validation,
        "data.replay": recipe.data.replay,
        "evaluate.canary": recipe.evaluate.canary or [],
        "evaluate.probes": recipe.evaluate.probes or [],
    }
    return [
        f"{key}: no such file: {path}"
        for key, paths in named.items()
        for path in paths
        if not (isinstance(path, HubSet) or path.is_file() or (key in _FOLDERS and path.is_dir()))
    ]


def _sound_part(content: Mapping[str, Any], found: Sequence[Any]) -> Recipe:
    """What of a faulty recipe names files and can be read: each section without its wrong keys."""
    wrong = {tuple(item["loc"][:2]) for item in found}
    sections: dict[str, Any] = {"data": DataSection.model_construct(train=[])}
    for name in {section for section, _key in _PATH_KEYS}:
        values = content.get(name)
        if not isinstance(values, dict):
            continue
        sound = {key: value for key, value in values.items() if (name, key) not in wrong}
        try:
            kind: Any = Recipe.model_fields[name].annotation
            sections[name] = TypeAdapter(kind).validate_python(sound)
        except ValidationError:  # what is missing has been said
            continue
    return Recipe.model_construct(**sections)
