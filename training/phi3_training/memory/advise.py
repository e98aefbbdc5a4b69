"""Decides whether a recipe fits a device, what to change where it does not, and what fits best.

Reads a recipe and the device's memory; the lines it returns are those of `phi3 plan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ..recipe import Recipe
from ..serve.choice import choose_engine
from .config import ModelShape, UnknownShapeError, shape_of
from .device import GIB, Device, gib, this_device, this_ram
from .inference import evaluate_phase, row_bytes, save_phase, serve_phase
from .training import FLOAT32, Phase, compute_bytes, step_phase, work_of

Changes = Mapping[str, Any]

# Python, torch, transformers, TRL and peft, loaded: measured on Linux (benchmarks/memory_plan.py).
LIBRARIES = 600 * 2**20
# CUDA's own context and its libraries' workspace; a round figure, not measured by this project.
CUDA_CONTEXT = GIB
# What allocators lose between pieces; less room than this is called tight.
MARGIN = 0.05
_SHORTEST = 256
_LADDER = {
    "full": ("full", "lora", "qlora"),
    "dora": ("dora", "lora", "qlora"),
    "lora": ("lora", "qlora"),
    "qlora": ("qlora",),
}


@dataclass(frozen=True)
class MemoryLine:
    """A line of the plan: the stage it is about, and whether it stops that stage."""

    stage: str
    text: str
    stops: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


def memory_plan(recipe: Recipe, device: Device | None = None) -> list[MemoryLine]:
    """The lines for `device`, or for this machine: training, evaluation, serving."""
    planned = device or this_device()
    try:
        shape = shape_of(recipe)
    except UnknownShapeError as error:
        return [MemoryLine("finetune", f"memory is not predicted: {error}")]
    lines = [_training(recipe, shape, planned), _evaluation(recipe, shape, planned)]
    if planned.kind == "cuda" and device is None:
        lines.append(_loading(recipe, shape, planned))
    if recipe.serve.engine != "upstream":
        lines.append(_serving(recipe, shape, planned, elsewhere=device is not None))
    return lines


def _training(recipe: Recipe, shape: ModelShape, device: Device) -> MemoryLine:
    if recipe.finetune.method == "qlora" and device.kind != "cuda":
        text = f"qlora needs a CUDA GPU, and this plan is for {device.name}: finetune.method=lora"
        return MemoryLine("finetune", text, stops=True)
    phase = _higher(_training_phases(recipe, shape, device))
    model = f"{shape.parameters / 1e6:,.1f} M weights by {shape.source}"
    rows = f"rows of data.max_length={_length(recipe, shape)} tokens"
    text = f"{_needs(phase, device)} for {rows}, {model}"
    proposed = _first_fit(_best(recipe), recipe, shape, device, 1 + MARGIN)
    details = _details(phase, shape, device) | {"proposal": dict(proposed or {})}
    if _fits(phase, device):
        if proposed and _changed(recipe, proposed):
            text += f". Fits; better: {_words(_changed(recipe, proposed))}"
        else:
            text += ". Fits" if proposed else ". Fits, but tightly"
        return MemoryLine("finetune", text, details=details)
    cure = _first_fit(_sparing(recipe, device), recipe, shape, device)
    details["change"] = dict(_changed(recipe, cure or {}))
    text += _too_much(phase, device)
    return MemoryLine("finetune", text + _cure(cure, recipe, shape, device), True, details)


def _loading(recipe: Recipe, shape: ModelShape, device: Device) -> MemoryLine:
    """The RAM beside a GPU: weights pass through it, and a QLoRA adapter is merged there."""
    full = recipe.finetune.method == "full"
    size = (FLOAT32 if full else compute_bytes(recipe, device)) * shape.parameters
    ram = this_ram()
    phase = Phase("load", {"weights on their way to the GPU": size, "libraries": LIBRARIES})
    text = f"memory {gib(phase.total)} of RAM for weights on their way to the GPU"
    if phase.total > ram.available:
        text += f". Too much by {gib(phase.total - ram.available)}: {ram.where}"
        return MemoryLine("finetune", text, stops=True)
    return MemoryLine("finetune", text + ". Fits")


def _evaluation(recipe: Recipe, shape: ModelShape, device: Device) -> MemoryLine:
    phase = _evaluate_phase(recipe, shape, device)
    details = _details(phase, shape, device)
    text = _needs(phase, device) + ", one model after the other"
    if _fits(phase, device):
        return MemoryLine("evaluate", text + ". Fits", details=details)
    text += _too_much(phase, device)
    size = recipe.evaluate.per_device_eval_batch_size
    key = "evaluate.per_device_eval_batch_size"
    for fewer in _halves(size, 1):
        smaller = _evaluate_phase(changed(recipe, {key: fewer}), shape, device)
        if _fits(smaller, device):
            text += (
                f". It fits ({gib(_whole(smaller, device))}) with {key}={fewer}, or with a lower "
            )
            text += "data.max_length, if your chats are shorter than that"
            return MemoryLine("evaluate", text, True, {**details, "change": {key: fewer}})
    least = _evaluate_phase(changed(recipe, {key: 1}), shape, device)
    text += f". Even one row at a time needs {gib(_whole(least, device))}: take a larger device"
    return MemoryLine("evaluate", text, True, details)


def _serving(recipe: Recipe, shape: ModelShape, device: Device, *, elsewhere: bool) -> MemoryLine:
    engine = recipe.serve.engine
    if engine == "auto":
        engine = choose_engine("auto")[0] if not elsewhere else "ort-genai"
        engine = "transformers" if device.kind == "cuda" else engine
    compute = compute_bytes(recipe, device)
    tokens = min(shape.context, _length(recipe, shape) + recipe.serve.max_new_tokens)
    phase = serve_phase(shape, recipe.serve.precision, engine, compute, tokens)
    details = _details(phase, shape, device)
    text = f"{_needs(phase, device)} with one conversation of {tokens:,} tokens"
    # The endpoint starts when training has ended, so what is in use now does not count.
    short = _whole(phase, device) - device.total
    if short > 0:
        text += f", {gib(short)} more than {device.name} has"
        precise = recipe.serve.precision == "fp32" and engine == "ort-genai"
        text += ": serve.precision=int4" if precise else ": take a larger device"
        return MemoryLine("deploy", text, True, details)
    row = row_bytes(shape, engine, compute, tokens)
    room = 1 + max(0, device.available - _whole(phase, device)) // row
    wanted = recipe.serve.max_concurrent_requests_per_instance
    text += f"; room for {min(room, wanted)} of {wanted} such at once"
    return MemoryLine("deploy", text, details=details | {"conversations": int(room)})


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with `section.key` changed."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        inner = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: inner})
    return recipe


def _sparing(recipe: Recipe, device: Device) -> Iterator[Changes]:
    """Settings from the recipe's own to the most sparing, each with the same batch per step."""
    settings = recipe.finetune
    methods = [m for m in _LADDER[settings.method] if m != "qlora" or device.kind == "cuda"]
    lengths = (recipe.data.max_length, *_halves(recipe.data.max_length, _SHORTEST))
    checkpointing = sorted({settings.gradient_checkpointing, True})
    step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    sizes = [n for n in _divisors(step) if n <= settings.per_device_train_batch_size]
    for length, method, kept, size in product(lengths, methods, checkpointing, sizes):
        yield _setting(size, step, kept) | {"finetune.method": method, "data.max_length": length}


def _best(recipe: Recipe) -> Iterator[Changes]:
    """Settings from the fastest on: large batches, nothing computed twice."""
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
    shape: ModelShape,
    device: Device,
    margin: float = 1.0,
) -> Changes | None:
    for changes in settings:
        phase = _higher(_training_phases(changed(recipe, changes), shape, device))
        if _whole(phase, device) * margin <= device.available:
            return changes
    return None


def _changed(recipe: Recipe, changes: Changes) -> Changes:
    """Those that differ from the recipe."""
    now = recipe.model_dump()
    pairs = ((key, value, *key.partition(".")[::2]) for key, value in changes.items())
    return {key: value for key, value, section, name in pairs if now[section][name] != value}


def _cure(cure: Changes | None, recipe: Recipe, shape: ModelShape, device: Device) -> str:
    if cure is not None:
        phase = _higher(_training_phases(changed(recipe, cure), shape, device))
        words = _words(_changed(recipe, cure))
        return f". It fits ({gib(_whole(phase, device))}) with {words}"
    *_, most = _sparing(recipe, device)
    phase = _higher(_training_phases(changed(recipe, most), shape, device))
    return (
        f". Even the most sparing setting ({_words(_changed(recipe, most)) or 'this one'}) needs "
        f"{gib(_whole(phase, device))}: take a larger device or a smaller model"
    )


def _training_phases(recipe: Recipe, shape: ModelShape, device: Device) -> tuple[Phase, ...]:
    work = work_of(recipe, shape, device)
    if work.method == "qlora":  # merged in RAM, see _loading
        return (step_phase(shape, work),)
    return step_phase(shape, work), save_phase(shape, work)


def _evaluate_phase(recipe: Recipe, shape: ModelShape, device: Device) -> Phase:
    return evaluate_phase(
        shape,
        work_of(recipe, shape, device),
        at_once=recipe.evaluate.per_device_eval_batch_size,
        new_tokens=recipe.evaluate.max_new_tokens,
    )


def _higher(phases: tuple[Phase, ...]) -> Phase:
    return max(phases, key=lambda phase: phase.total)


def _overhead(device: Device) -> int:
    return CUDA_CONTEXT if device.kind == "cuda" else LIBRARIES


def _whole(phase: Phase, device: Device) -> int:
    return phase.total + _overhead(device)


def _fits(phase: Phase, device: Device) -> bool:
    return _whole(phase, device) <= device.available


def _needs(phase: Phase, device: Device) -> str:
    """`memory 3.21 GiB (weights 1.90, activations 0.71, libraries 0.59)`, the largest first."""
    name = "CUDA" if device.kind == "cuda" else "libraries"
    parts = {**phase.parts, name: _overhead(device)}
    shown = sorted(parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{what} {size / GIB:.2f}" for what, size in shown if size >= 0.005 * GIB)
    return f"memory {gib(_whole(phase, device))} ({listed})"


def _too_much(phase: Phase, device: Device) -> str:
    short = _whole(phase, device) - device.available
    text = f". Too much by {gib(short)}: {device.where}"
    if _whole(phase, device) <= device.total:
        text += ", so ending other programs would do"
    return text


def _words(changes: Changes) -> str:
    shown = {True: "true", False: "false"}
    return " ".join(
        f"{key}={shown[value] if isinstance(value, bool) else value}"
        for key, value in changes.items()
    )


def _details(phase: Phase, shape: ModelShape, device: Device) -> dict[str, Any]:
    return {
        "phase": phase.name,
        "bytes": _whole(phase, device),
        "parts": {**phase.parts, "overhead": _overhead(device)},
        "model": {"parameters": shape.parameters, "source": shape.source},
        "device": {"kind": device.kind, "total": device.total, "available": device.available},
    }


def _length(recipe: Recipe, shape: ModelShape) -> int:
    return min(recipe.data.max_length, shape.context)


def _divisors(number: int) -> list[int]:
    """From the largest down."""
    return [n for n in range(number, 0, -1) if number % n == 0]


def _halves(number: int, least: int) -> Iterator[int]:
    while number // 2 >= least:
        number //= 2
        yield number
