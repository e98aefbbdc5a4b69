"""The memory lines of a plan: what fits a device, what does not and what to change, what is better.

Reads a recipe and the device's memory; the lines it returns are those of `phi3 plan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from ..planning import PlanLine
from ..recipe import Recipe
from ..serve.choice import choose_engine
from .inference import convert_phase, evaluate_phase, row_bytes, save_phase, serve_phase
from .model import (
    GIB,
    Device,
    ModelShape,
    UnknownShapeError,
    gib,
    shape_of,
    this_ram,
    torch_has_cuda,
)
from .rows import RowSizes, worst_case
from .training import FLOAT32, Phase, compute_bytes, step_phase, work_of

# What each stage needs on a device, and whether that fits there.
# Reads a recipe, a model's shape and a device; writes nothing.

# Python, torch, transformers, TRL and peft, loaded: measured on Linux (benchmarks/memory_plan.py).
# Plain pip installs torch's CUDA build there, whose libraries are loaded without a GPU as well.
LIBRARIES = 600 * 2**20
LIBRARIES_WITH_CUDA = 950 * 2**20
# CUDA's own context and its libraries' workspace: a round figure, not measured on a GPU yet.
CUDA_CONTEXT = GIB


@dataclass(frozen=True)
class Need:
    """The peak of a phase on a device; several processes of a CPU share its memory."""

    phase: Phase
    device: Device
    processes: int = 1

    @property
    def overhead(self) -> int:
        """What each process holds in addition to the model."""
        if self.device.kind == "cuda":
            return CUDA_CONTEXT
        return LIBRARIES_WITH_CUDA if torch_has_cuda() else LIBRARIES

    @property
    def total(self) -> int:
        """All bytes on the device."""
        return self.processes * (self.phase.total + self.overhead)

    @property
    def fits(self) -> bool:
        """Whether so much is free now."""
        return self.total <= self.device.available

    def __str__(self) -> str:
        """`memory 3.21 GiB (weights 1.90, activations 0.71, libraries 0.59)`, largest first."""
        name = "CUDA" if self.device.kind == "cuda" else "libraries"
        parts = {**self.phase.parts, name: self.overhead}
        shown = sorted(parts.items(), key=lambda part: -part[1])
        listed = ", ".join(
            f"{what} {size / GIB:.2f}" for what, size in shown if size >= 0.005 * GIB
        )
        each = f", in each of {self.processes} processes" if self.processes > 1 else ""
        return f"memory {gib(self.total)} ({listed}{each})"

    @property
    def too_much(self) -> str:
        """By how much it does not fit; only where it does not."""
        text = f"Too much by {gib(self.total - self.device.available)}: {self.device.where}"
        if self.total <= self.device.total:
            text += ", so closing other programs would be enough"
        return text


def training_need(recipe: Recipe, shape: ModelShape, device: Device, rows: RowSizes) -> Need:
    """The higher one of a training step and of writing the model."""
    work = work_of(recipe, shape, device, rows)
    phases = [step_phase(shape, work)]
    if work.method != "qlora":  # merged in RAM, see loading_need
        phases.append(save_phase(shape, work))
    sharing = 1 if device.kind == "cuda" else processes_here(recipe)
    return Need(max(phases, key=lambda phase: phase.total), device, sharing)


def evaluation_need(recipe: Recipe, shape: ModelShape, device: Device, rows: RowSizes) -> Need:
    """Asking and scoring one model; base and tuned model follow one another."""
    work = work_of(recipe, shape, device, rows)
    phase = evaluate_phase(
        shape,
        replace(
            work,
            compute=compute_bytes(recipe, device),  # not as rounded for training
            tokens=min(rows.scored, shape.context),
            learnt=rows.share,
        ),
        at_once=recipe.evaluate.per_device_eval_batch_size,
        new_tokens=recipe.evaluate.max_new_tokens,
        prompt=rows.prompt,
    )
    return Need(phase, device)


def loading_need(recipe: Recipe, shape: ModelShape, gpu: Device, ram: Device) -> Need:
    """The RAM of a GPU machine: weights pass through it, and a QLoRA adapter is merged there."""
    full = recipe.finetune.method == "full"
    size = (FLOAT32 if full else compute_bytes(recipe, gpu)) * shape.parameters
    phase = Phase("load", {"weights on their way to the GPU": size})
    return Need(phase, ram, processes_here(recipe))


def processes_here(recipe: Recipe) -> int:
    """The training processes of this machine."""
    return recipe.finetune.num_processes // recipe.finetune.num_machines


def halves(number: int, least: int) -> Iterator[int]:
    """Half of it, a quarter, and so on."""
    while number // 2 >= least:
        number //= 2
        yield number


# Settings that need less memory, or use what there is: batch, accumulation, method, length.
# Reads a recipe, a model's shape and a device; writes nothing.

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
    """The smallest setting, and what even that needs."""
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


_EVAL_BATCH = "evaluate.per_device_eval_batch_size"


def memory_plan(recipe: Recipe, device: Device, rows: RowSizes | None = None) -> list[PlanLine]:
    """The lines for training, evaluation and serving on `device`; no `rows`: the worst case."""
    rows = worst_case(recipe) if rows is None else rows
    try:
        shape = shape_of(recipe)
    except UnknownShapeError as error:
        return [PlanLine("finetune", f"memory cannot be predicted: {error}")]
    lines = [_training(recipe, shape, device, rows)]
    if device.kind == "cuda" and device.is_here:
        lines.append(_loading(recipe, shape, device))
    lines.append(_evaluation(recipe, shape, device, rows))
    if recipe.serve.engine != "upstream":
        lines += _serving(recipe, shape, device)
    if device.kind == "cuda":
        lines.append(
            PlanLine("memory", "a GPU's figures are calculated, not measured on a GPU yet")
        )
    return lines


def _training(recipe: Recipe, shape: ModelShape, device: Device, rows: RowSizes) -> PlanLine:
    if recipe.finetune.method == "qlora" and device.kind != "cuda":
        text = f"qlora needs a CUDA GPU, and this plan is for {device.name}: finetune.method=lora"
        return PlanLine("finetune", text, stops=True)
    need = training_need(recipe, shape, device, rows)
    model = f"{shape.parameters / 1e6:,.1f} M weights by {shape.source}"
    text = f"{need} for {_batch(recipe, shape, device, rows)}, {model}"
    best = proposal(recipe, shape, device, rows)
    details = _details(need, shape) | {"proposal": dict(best or {}), "rows": asdict(rows)}
    if need.fits:
        better = difference(recipe, best or {})
        remark = f"; better: {words(better)}" if better else "" if best else ", but tightly"
        return PlanLine("finetune", f"fits{remark}; {text}", details=details)
    found = cure(recipe, shape, device, rows)
    details["change"] = dict(difference(recipe, found or {}))
    fix = _cure(found, recipe, shape, device, rows)
    return PlanLine("finetune", f"does not fit: {text}. {need.too_much}. {fix}", True, details)


def _batch(recipe: Recipe, shape: ModelShape, device: Device, rows: RowSizes) -> str:
    """The largest batch, and how its length is known."""
    work = work_of(recipe, shape, device, rows)
    packed = " of packed rows" if work.packing else ""
    size = f"a batch of {work.batch} x {work.tokens:,} tokens{packed}"
    if not rows.is_known:
        return f"{size} ({rows.how})"
    return f"{size} (longest row {rows.longest:,} tokens, {rows.how})"


def _cure(found: Any, recipe: Recipe, shape: ModelShape, device: Device, rows: RowSizes) -> str:
    if found is not None:
        need = training_need(changed(recipe, found), shape, device, rows)
        return f"It fits ({gib(need.total)}) with {words(difference(recipe, found))}"
    most, need = most_sparing(recipe, shape, device, rows)
    return (
        f"Even the smallest setting ({words(most) or 'this one'}) needs {gib(need.total)}: use a "
        f"larger device or a smaller model"
    )


def _loading(recipe: Recipe, shape: ModelShape, gpu: Device) -> PlanLine:
    need = loading_need(recipe, shape, gpu, this_ram())
    if need.fits:
        return PlanLine("finetune", f"fits: {need} of RAM", details=_details(need, shape))
    text = f"does not fit: {need} of RAM. {need.too_much}"
    return PlanLine("finetune", text, True, _details(need, shape))


def _evaluation(recipe: Recipe, shape: ModelShape, device: Device, rows: RowSizes) -> PlanLine:
    def need_with(at_once: int) -> Need:
        return evaluation_need(changed(recipe, {_EVAL_BATCH: at_once}), shape, device, rows)

    at_once = recipe.evaluate.per_device_eval_batch_size
    need = need_with(at_once)
    details = _details(need, shape)
    length = f"{rows.prompt:,} tokens" if rows.is_known else f"data.max_length={rows.prompt:,}"
    text = (
        f"{need} for {at_once} questions of up to {length} at once and answers of "
        f"{recipe.evaluate.max_new_tokens}, one model after the other"
    )
    if need.fits:
        return PlanLine("evaluate", f"fits; {text}", details=details)
    text = f"does not fit: {text}. {need.too_much}"
    shorter = "" if rows.is_known else ", or a lower data.max_length, if your chats are shorter"
    for fewer in halves(at_once, 1):
        smaller = need_with(fewer)
        if smaller.fits:
            text += f". It fits ({gib(smaller.total)}) with {_EVAL_BATCH}={fewer}{shorter}"
            return PlanLine("evaluate", text, True, {**details, "change": {_EVAL_BATCH: fewer}})
    text += f". Even one at a time needs {gib(need_with(1).total)}: use a larger device{shorter}"
    return PlanLine("evaluate", text, True, details)


def _serving(recipe: Recipe, shape: ModelShape, device: Device) -> list[PlanLine]:
    """The endpoint starts when training has ended, so what is in use now does not count."""
    engine, precision = _engine(recipe, device), recipe.serve.precision
    compute = compute_bytes(recipe, device)
    # Not the training's rows: a served conversation grows with every turn.
    tokens = min(shape.context, recipe.data.max_length + recipe.serve.max_new_tokens)
    need = Need(serve_phase(shape, precision, engine, compute, tokens), device)
    details = _details(need, shape)
    text = f"{need} with one conversation of {tokens:,} tokens"
    lines = []
    if engine == "ort-genai":
        lines += _conversion(recipe, shape, device)
    if need.total > device.total:
        short = gib(need.total - device.total)
        lever = "use a larger device"
        if precision == "fp32" and engine == "ort-genai":
            lever = "serve.precision=int4"
        text = f"does not fit: {text}, {short} more than {device.name} has: {lever}"
        return [*lines, PlanLine("deploy", text, True, details)]
    row = row_bytes(shape, engine, compute, tokens)
    room = 1 + max(0, device.available - need.total) // row
    wanted = recipe.serve.max_concurrent_requests_per_instance
    text = f"fits; {text}; room for {min(room, wanted)} of {wanted} at once"
    return [*lines, PlanLine("deploy", text, details=details | {"conversations": int(room)})]


def _conversion(recipe: Recipe, shape: ModelShape, device: Device) -> list[PlanLine]:
    """A line only where the way to ONNX needs more than there is."""
    need = Need(convert_phase(shape, recipe.serve.precision), device)
    if need.total <= device.total:
        return []
    text = (
        f"does not fit: converting the model to ONNX ({recipe.serve.precision}), {need}, "
        f"{gib(need.total - device.total)} more than {device.name} has: serve.engine=transformers"
    )
    return [PlanLine("deploy", text, True, _details(need, shape))]


def _engine(recipe: Recipe, device: Device) -> str:
    """The engine that serves on that device."""
    if recipe.serve.engine != "auto":
        return recipe.serve.engine
    if device.kind == "cuda" or recipe.serve.adapters:
        return "transformers"
    return choose_engine("auto")[0] if device.is_here else "ort-genai"


def _details(need: Need, shape: ModelShape) -> dict[str, Any]:
    device = need.device
    return {
        "phase": need.phase.name,
        "bytes": need.total,
        "processes": need.processes,
        "parts": {**need.phase.parts, "overhead": need.overhead},
        "model": {"parameters": shape.parameters, "source": shape.source},
        "device": {"kind": device.kind, "total": device.total, "available": device.available},
    }
