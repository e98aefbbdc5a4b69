"""Every key of a recipe, from the schema: meaning, allowed values, true default, and near misses.

Reads and writes nothing. `phi3 recipes --keys`, the command line's `key=value` and the faults of a
recipe all ask here.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .sections import HubSet


@dataclass(frozen=True)
class Key:
    """A key by its full name; `default` is as YAML writes it, None where the key is required."""

    name: str
    allowed: str
    default: str | None
    description: str
    is_text: bool  # its value is text, whatever YAML would make of it
    is_list_of_text: bool


def keys_of(model: type[BaseModel], prefix: str = "", given: BaseModel | None = None) -> list[Key]:
    """The keys of a section and of those below it; `given` is what is there by default."""
    keys: list[Key] = []
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if given is not None:
            default = getattr(given, name)
        section = _section_of(field.annotation)
        if section is not None:
            below = default if isinstance(default, BaseModel) else None
            keys += keys_of(section, f"{prefix}{name}.", below)
            continue
        kinds = list(_kinds(field.annotation))
        items = [item for kind in kinds if get_origin(kind) is list for item in get_args(kind)]
        item_kinds = [kind for item in items for kind in _kinds(item)]
        marks = [
            inner
            for mark in field.metadata
            for inner in (mark.metadata if isinstance(mark, FieldInfo) else [mark])
        ]
        bounds = [
            form.format(f"{bound:g}" if isinstance(bound, float) else bound)
            for limit, form in _BOUNDS
            for mark in marks
            if (bound := getattr(mark, limit, None)) is not None
        ]
        if isinstance(default, list):
            default = [
                v.model_dump(mode="json") if isinstance(v, BaseModel) else v for v in default
            ]
        in_yaml = "none"  # PyYAML ends a bare scalar with a line of its own, "..."
        if default is not None and default is not PydanticUndefined:
            in_yaml = yaml.safe_dump(
                default, default_flow_style=True, sort_keys=False, width=1_000_000
            )
        key = Key(
            name=prefix + name,
            allowed=", ".join([" or ".join(dict.fromkeys(map(_kind_name, kinds))), *bounds]),
            default=None
            if default is PydanticUndefined
            else in_yaml.removesuffix("\n").removesuffix("\n..."),
            description=" ".join((field.description or "").split()),
            is_text=bool(kinds) and all(map(_is_text, kinds)),
            is_list_of_text=bool(item_kinds) and all(map(_is_text, item_kinds)),
        )
        keys.append(key)
        # A list of sections, such as the rules of the gate.
        entry = _section_of(items[0]) if len(kinds) == 1 and items else None
        if entry is not None:
            keys += keys_of(entry, f"{prefix}{name}[].")
    return keys


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types in an annotation, without None and metadata."""
    if get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _kinds(part)
    elif hasattr(annotation, "__metadata__"):
        yield from _kinds(annotation.__origin__)
    elif annotation is not type(None):
        yield annotation


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(value, str) for value in get_args(kind))
    return kind in (str, Path, HubSet)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    kinds = list(_kinds(annotation))
    is_section = len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel)
    return kinds[0] if is_section else None


_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}
_BOUNDS = (
    ("ge", "{} or more"),
    ("gt", "more than {}"),
    ("le", "{} or less"),
    ("lt", "less than {}"),
)


def _kind_name(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return " | ".join(map(str, get_args(kind)))
    if origin is list:
        inner = list(_kinds(get_args(kind)[0]))
        if any(isinstance(k, type) and issubclass(k, BaseModel) and k is not HubSet for k in inner):
            return "one rule or a list of them"
        return f"list of: {' or '.join(_kind_name(k) for k in inner)}"
    if origin is dict:
        return "mapping of name: value"
    return "hub:NAME:SPLIT" if kind is HubSet else _NAMES.get(kind, str(kind))


# What other tools call our keys, and where people put them.
ALIASES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "seq_length", "seq_len", "sequence_len", "cutoff_len",
         "block_size", "model_max_length"),
        ("data.max_length",),
    ),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "epoch"), ("finetune.num_train_epochs",)),
    **dict.fromkeys(("steps", "num_steps", "train_steps"), ("finetune.max_steps",)),
    **dict.fromkeys(("lr", "learningrate"), ("finetune.learning_rate",)),
    **dict.fromkeys(
        ("batch_size", "micro_batch_size", "train_batch_size", "per_device_batch_size"),
        ("finetune.per_device_train_batch_size",),
    ),
    **dict.fromkeys(
        ("grad_accum", "gradient_accumulation", "grad_accum_steps", "accumulation_steps"),
        ("finetune.gradient_accumulation_steps",),
    ),
    **dict.fromkeys(("r", "rank", "lora_rank"), ("finetune.lora_r",)),
    "alpha": ("finetune.lora_alpha",),
    "dropout": ("finetune.lora_dropout",),
    **dict.fromkeys(
        ("lora_target", "lora_target_modules", "modules", "layers"), ("finetune.target_modules",)
    ),
    "modules_to_save": ("finetune.method=full (an adapter trains layers, not whole matrices)",),
    **dict.fromkeys(("warmup", "warmup_steps"), ("finetune.warmup_ratio (a share of the steps)",)),
    **dict.fromkeys(("scheduler", "lr_scheduler"), ("finetune.lr_scheduler_type",)),
    "sample_packing": ("finetune.packing",),
    "use_dora": ("finetune.method=dora",),
    **dict.fromkeys(("load_in_4bit", "quantization"), ("finetune.method=qlora",)),
    **dict.fromkeys(
        ("model_name", "model_id", "base_model", "model_name_or_path", "pretrained_model"),
        ("model.name_or_path",),
    ),
    **dict.fromkeys(
        ("attn", "attention", "flash_attention", "use_flash_attention_2"),
        ("model.attn_implementation",),
    ),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "precision"), ("model.dtype",)),
    **dict.fromkeys(
        ("dataset", "datasets", "dataset_name", "dataset_path", "train_file", "train_path"),
        ("data.train",),
    ),
    **dict.fromkeys(
        ("eval_dataset", "validation_file", "eval_file", "test", "dev"), ("data.validation",)
    ),
    **dict.fromkeys(("val_size", "val_set_size", "test_size"), ("data.validation_share",)),
    **dict.fromkeys(("max_tokens", "max_length_of_answer"), ("evaluate.max_new_tokens",)),
    "question": ("ask",),
    **dict.fromkeys(("output_dir", "run_name"), ("--run NAME",)),
    "resume_from_checkpoint": ("nothing: a training resumes by itself",),
}  # fmt: skip
_CLOSE = 0.75  # of difflib, whose default is 0.6; `lora_rank` and `lora_r` have 0.8


def meant(key: str, keys: Sequence[Key]) -> list[str]:
    """The keys that somebody may have meant by `key`, which a recipe does not have."""
    names = [each.name for each in keys if "[]" not in each.name]
    last = key.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    # The tiny model's own training has keys of the same names, and is seldom meant.
    same = [n for n in same if not n.startswith("base.")] or same
    if same and (len(same) <= 3 or last in ("seed", "name")):
        return same
    if last.lower() in ALIASES:
        return list(ALIASES[last.lower()])
    by_last = difflib.get_close_matches(last, {n.rpartition(".")[2] for n in names}, 1, _CLOSE)
    close = difflib.get_close_matches(key, names, 2, _CLOSE)
    section = key.rpartition(".")[0]
    near = [n for n in names if n.rpartition(".")[2] in by_last]
    here = [n for n in near if n.rpartition(".")[0] == section]
    return here or close or [n for n in near if not n.startswith("base.")] or near
