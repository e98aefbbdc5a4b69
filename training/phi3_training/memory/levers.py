"""Settings that need less memory, or use what there is: batch, accumulation, method, length.

Reads a recipe, a model's shape and a device; writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

from ..recipe import Recipe
from .config import ModelShape
from .device import Device
from .needs import Need, halves, training_need
from .rows import RowSizes

Changes = Mapping[str, Any]

# What allocators lose between pieces; a proposal leaves so much room.
MARGIN = 0.05
_SHORTEST = 256
_LADDER = {
    "full": ("full", "lora", "qlora"),
    "dora": ("dora", "lora", "qlora"),
    "lora": ("lora", "qlora"),
    "qlora": ("qlora",),
}


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with `section.key` changed."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        inner = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: inner})
    return recipe


def difference(recipe: Recipe, changes: Changes) -> Changes:
    """The changes that change something."""
    now = recipe.model_dump()
    pairs = ((key, value, *key.partition(".")[::2]) for key, value in changes.items())
    return {key: value for key, value, section, name in pairs if now[section][name] != value}


def words(changes: Changes) -> str:
    """As they are typed on the command line."""
    shown = {True: "true", False: "false"}
    return " ".join(
        f"{key}={shown[value] if isinstance(value, bool) else value}"
        for key, value in changes.items()
    )


def cure(recipe: Recipe, shape: ModelShape, device: Device, rows: RowSizes) -> Changes | None:
    """The first setting that fits, changing as little of what is learnt as can be."""
    settings = _sparing(recipe, device, rows)
    return _first_fit(settings, recipe, lambda r: training_need(r, shape, device, rows))


def proposal(recipe: Recipe, shape: ModelShape, device: Device, rows: RowSizes) -> Changes | None:
    """The fastest setting of the recipe's own method that fits with some room."""
    settings, room = _fastest(recipe), 1 + MARGIN
    return _first_fit(settings, recipe, lambda r: training_need(r, shape, device, rows), room)


def most_sparing(
    recipe: Recipe, shape: ModelShape, device: Device, rows: RowSizes
) -> tuple[Changes, Need]:
    """The end of the road, and what even that needs."""
    *_, most = _sparing(recipe, device, rows)
    return difference(recipe, most), training_need(changed(recipe, most), shape, device, rows)


def _sparing(recipe: Recipe, device: Device, rows: RowSizes) -> Iterator[Changes]:
    """Settings from the recipe's own to the most sparing, each with the same rows per step.

    A limit below the longest row would cut it; above, it matters to packed rows alone.
    """
    settings = recipe.finetune
    methods = [m for m in _LADDER[settings.method] if m != "qlora" or device.kind == "cuda"]
    lengths = [recipe.data.max_length, *halves(recipe.data.max_length, _SHORTEST)]
    if rows.is_known:
        least = rows.longest if settings.packing else recipe.data.max_length
        lengths = [recipe.data.max_length, *(n for n in lengths[1:] if n >= least)]
    checkpointing = sorted({settings.gradient_checkpointing, True})
    step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    sizes = [n for n in _divisors(step) if n <= settings.per_device_train_batch_size]
    for length, method, kept, size in product(lengths, methods, checkpointing, sizes):
        yield _setting(size, step, kept) | {"finetune.method": method, "data.max_length": length}


def _fastest(recipe: Recipe) -> Iterator[Changes]:
    """Settings from the fastest on: nothing computed twice, large batches."""
    settings = recipe.finetune
    step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    for kept, size in product((False, True), _divisors(step)):
        yield _setting(size, step, kept)


def _setting(size: int, step: int, checkpointing: bool) -> dict[str, Any]:
    return {
        "finetune.per_device_train_batch_size": size,
        "finetune.gradient_accumulation_steps": step // size,
        "finetune.gradient_checkpointing": checkpointing,
    }


def _first_fit(
    settings: Iterator[Changes],
    recipe: Recipe,
    need_of: Callable[[Recipe], Need],
    room: float = 1.0,
) -> Changes | None:
    for changes in settings:
        need = need_of(changed(recipe, changes))
        if need.total * room <= need.device.available:
            return changes
    return None


def _divisors(number: int) -> list[int]:
    """From the largest down."""
    return [n for n in range(number, 0, -1) if number % n == 0]
