"""The memory lines of a plan: what fits a device, what does not and what to change, what is better.

Reads a recipe and the device's memory; the lines it returns are those of `phi3 plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from ..engine import choose_engine
from ..progress import PlanLine
from ..recipe import Recipe
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
from .training import FLOAT32, Phase, Work, compute_bytes, step_phase, work_of

# Python, torch, transformers, TRL and peft, loaded: measured on Linux (benchmarks/memory_plan.py).
# Plain pip installs torch's CUDA build there, whose libraries are loaded without a GPU as well.
LIBRARIES = 600 * 2**20
LIBRARIES_WITH_CUDA = 950 * 2**20
# CUDA's own context and its libraries' workspace: a round figure, not measured on a GPU yet.
CUDA_CONTEXT = GIB
# What allocators lose between pieces; a proposal leaves so much room.
MARGIN = 0.05
_SHORTEST = 256  # tokens: no shorter limit is proposed
# From each method to those that need less memory, in that order.
_LADDER = {
    "full": ("full", "lora", "qlora"),
    "dora": ("dora", "lora", "qlora"),
    "lora": ("lora", "qlora"),
    "qlora": ("qlora",),
}
_EVAL_BATCH = "evaluate.per_device_eval_batch_size"

Changes = Mapping[str, Any]


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


@dataclass(frozen=True)
class Planner:
    """A recipe on a device: what its stages need there, and settings that need less."""

    recipe: Recipe
    shape: ModelShape
    device: Device
    rows: RowSizes

    @property
    def work(self) -> Work:
        """One training step."""
        return work_of(self.recipe, self.shape, self.device, self.rows)

    def training(self, changes: Changes | None = None) -> Need:
        """The higher one of a training step and of writing the model, with changed settings."""
        recipe = changed(self.recipe, changes or {})
        work = work_of(recipe, self.shape, self.device, self.rows)
        phases = [step_phase(self.shape, work)]
        if work.method != "qlora":  # merged in RAM, see loading
            phases.append(save_phase(self.shape, work))
        # Each process has a GPU of its own, but all share one RAM.
        sharing = 1 if self.device.kind == "cuda" else _processes(recipe)
        return Need(max(phases, key=lambda phase: phase.total), self.device, sharing)

    def loading(self, ram: Device) -> Need:
        """The RAM of a GPU machine: weights pass through it, and a QLoRA adapter merges there."""
        full = self.recipe.finetune.method == "full"
        each = FLOAT32 if full else compute_bytes(self.recipe, self.device)
        parts = {"weights on their way to the GPU": each * self.shape.parameters}
        return Need(Phase("load", parts), ram, _processes(self.recipe))

    def evaluation(self, at_once: int) -> Need:
        """Asking and scoring one model; base and tuned model follow one another."""
        work = replace(
            self.work,
            compute=compute_bytes(self.recipe, self.device),  # not as rounded for training
            tokens=min(self.rows.scored, self.shape.context),
            learnt=self.rows.share,
        )
        new_tokens, prompt = self.recipe.evaluate.max_new_tokens, self.rows.prompt
        phase = evaluate_phase(
            self.shape, work, at_once=at_once, new_tokens=new_tokens, prompt=prompt
        )
        return Need(phase, self.device)

    def sparing(self) -> Iterator[Changes]:
        """Settings from the recipe's own to the most sparing, each with the same rows per step."""
        settings, limit = self.recipe.finetune, self.recipe.data.max_length
        on_gpu = self.device.kind == "cuda"
        methods = [m for m in _LADDER[settings.method] if m != "qlora" or on_gpu]
        # A limit below the longest row would cut it; above, it matters to packed rows alone.
        least = 0
        if self.rows.is_known:
            least = self.rows.longest if settings.packing else limit
        lengths = [limit, *(n for n in _halves(limit, _SHORTEST) if n >= least)]
        checkpointing = sorted({settings.gradient_checkpointing, True})
        batches = self._batches(checkpointing, settings.per_device_train_batch_size)
        # As little of what is learnt changes as can be: methods late, the length last.
        for length, method, batch in product(lengths, methods, batches):
            yield {**batch, "finetune.method": method, "data.max_length": length}

    def proposal(self) -> Changes | None:
        """The fastest setting of the recipe's own method that fits with some room."""
        step = self.recipe.finetune.per_device_train_batch_size
        step *= self.recipe.finetune.gradient_accumulation_steps
        # Fast: nothing is computed twice, and batches are large.
        return self.first_fit(self._batches((False, True), step), 1 + MARGIN)

    def first_fit(self, settings: Iterable[Changes], room: float = 1.0) -> Changes | None:
        """The first of these settings that fits."""
        free = self.device.available
        return next((c for c in settings if self.training(c).total * room <= free), None)

    def _batches(self, checkpointing: Sequence[bool], largest: int) -> list[Changes]:
        """Ways to take the same rows per step, large batches first."""
        settings = self.recipe.finetune
        step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        return [
            {
                "finetune.per_device_train_batch_size": size,
                "finetune.gradient_accumulation_steps": step // size,
                "finetune.gradient_checkpointing": again,
            }
            for again in checkpointing
            for size in range(largest, 0, -1)
            if step % size == 0
        ]


def _processes(recipe: Recipe) -> int:
    """The training processes of this machine."""
    return recipe.finetune.num_processes // recipe.finetune.num_machines


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with `section.key` changed."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        inner = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: inner})
    return recipe


def memory_plan(recipe: Recipe, device: Device, rows: RowSizes | None = None) -> list[PlanLine]:
    """The lines for training, evaluation and serving on `device`; no `rows`: the worst case."""
    rows = worst_case(recipe) if rows is None else rows
    try:
        shape = shape_of(recipe)
    except UnknownShapeError as error:
        return [PlanLine("finetune", f"memory cannot be predicted: {error}")]
    plan = Planner(recipe, shape, device, rows)
    lines = [_training(plan)]
    if device.kind == "cuda" and device.is_here:
        need = plan.loading(this_ram())
        text = f"does not fit: {need} of RAM. {need.too_much}"
        text = f"fits: {need} of RAM" if need.fits else text
        lines.append(PlanLine("finetune", text, not need.fits, _details(need, shape)))
    lines.append(_evaluation(plan))
    if recipe.serve.engine != "upstream":
        lines += _serving(plan)
    if device.kind == "cuda":
        lines.append(
            PlanLine("memory", "a GPU's figures are calculated, not measured on a GPU yet")
        )
    return lines


def _training(plan: Planner) -> PlanLine:
    recipe, shape, rows = plan.recipe, plan.shape, plan.rows
    if recipe.finetune.method == "qlora" and plan.device.kind != "cuda":
        text = f"qlora needs a CUDA GPU, and this plan is for {plan.device.name}"
        return PlanLine("finetune", f"{text}: finetune.method=lora", stops=True)
    need, work, best = plan.training(), plan.work, plan.proposal()
    packed = " of packed rows" if work.packing else ""
    known = f"longest row {rows.longest:,} tokens, {rows.how}" if rows.is_known else rows.how
    text = (
        f"{need} for a batch of {work.batch} x {work.tokens:,} tokens{packed} ({known}), "
        f"{shape.parameters / 1e6:,.1f} M weights by {shape.source}"
    )
    # The worst batch: rows are grouped by length, so the longest ones do meet.
    details = _details(need, shape) | {"proposal": dict(best or {}), "rows": asdict(rows)}
    if need.fits:
        better = _difference(recipe, best or {})
        remark = f"; better: {_words(better)}" if better else "" if best else ", but tightly"
        return PlanLine("finetune", f"fits{remark}; {text}", details=details)
    cure = plan.first_fit(plan.sparing())
    change = _difference(recipe, cure or {})
    if cure is not None:
        fix = f"It fits ({gib(plan.training(cure).total)}) with {_words(change)}"
    else:
        *_, smallest = plan.sparing()
        setting = _words(_difference(recipe, smallest)) or "this one"
        fix = (
            f"Even the smallest setting ({setting}) needs {gib(plan.training(smallest).total)}: "
            "use a larger device or a smaller model"
        )
    text = f"does not fit: {text}. {need.too_much}. {fix}"
    return PlanLine("finetune", text, True, details | {"change": dict(change)})


def _evaluation(plan: Planner) -> PlanLine:
    settings, rows = plan.recipe.evaluate, plan.rows
    at_once = settings.per_device_eval_batch_size
    need = plan.evaluation(at_once)
    details = _details(need, plan.shape)
    length = f"{rows.prompt:,} tokens" if rows.is_known else f"data.max_length={rows.prompt:,}"
    text = (
        f"{need} for {at_once} questions of up to {length} at once and answers of "
        f"{settings.max_new_tokens}, one model after the other"
    )
    if need.fits:
        return PlanLine("evaluate", f"fits; {text}", details=details)
    text = f"does not fit: {text}. {need.too_much}"
    shorter = "" if rows.is_known else ", or a lower data.max_length, if your chats are shorter"
    for fewer in _halves(at_once, 1):
        smaller = plan.evaluation(fewer)
        if smaller.fits:
            text += f". It fits ({gib(smaller.total)}) with {_EVAL_BATCH}={fewer}{shorter}"
            return PlanLine("evaluate", text, True, {**details, "change": {_EVAL_BATCH: fewer}})
    least = gib(plan.evaluation(1).total)
    text += f". Even one at a time needs {least}: use a larger device{shorter}"
    return PlanLine("evaluate", text, True, details)


def _serving(plan: Planner) -> list[PlanLine]:
    """The endpoint starts when training has ended, so what is in use now does not count."""
    recipe, shape, device = plan.recipe, plan.shape, plan.device
    # Of a device that is not here all that is known is whether it is a GPU.
    gpu = None if device.is_here and device.kind != "cuda" else device.kind == "cuda"
    engine, _ = choose_engine(recipe.serve.engine, adapters=recipe.serve.adapters, gpu=gpu)
    precision = recipe.serve.precision
    compute = compute_bytes(recipe, device)
    # Not the training's rows: a served conversation grows with every turn.
    tokens = min(shape.context, recipe.data.max_length + recipe.serve.max_new_tokens)

    def refusal(need: Need, text: str, lever: str) -> PlanLine:
        short = f"{gib(need.total - device.total)} more than {device.name} has"
        text = f"does not fit: {text}, {short}: {lever}"
        return PlanLine("deploy", text, True, _details(need, shape))

    lines = []
    if engine == "onnxruntime":
        need = Need(convert_phase(shape, precision), device)
        if need.total > device.total:
            text = f"converting the model to ONNX ({precision}), {need}"
            lines.append(refusal(need, text, "serve.engine=transformers"))
    need = Need(serve_phase(shape, precision, engine, compute, tokens), device)
    text = f"{need} with one conversation of {tokens:,} tokens"
    if need.total > device.total:
        smaller = precision == "fp32" and engine == "onnxruntime"
        lever = "serve.precision=int4" if smaller else "use a larger device"
        return [*lines, refusal(need, text, lever)]
    row = row_bytes(shape, engine, compute, tokens)
    room = 1 + max(0, device.available - need.total) // row
    wanted = recipe.serve.max_concurrent_requests_per_instance
    text = f"fits; {text}; room for {min(room, wanted)} of {wanted} at once"
    details = _details(need, shape) | {"conversations": int(room)}
    return [*lines, PlanLine("deploy", text, details=details)]


def _halves(number: int, least: int) -> Iterator[int]:
    """Half of it, a quarter, and so on."""
    while number // 2 >= least:
        number //= 2
        yield number


def _difference(recipe: Recipe, changes: Changes) -> dict[str, object]:
    """The changes that change something."""
    return {k: v for k, v in changes.items() if changed(recipe, {k: v}) != recipe}


def _words(changes: Changes) -> str:
    """As they are typed on the command line."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())


def _details(need: Need, shape: ModelShape) -> dict[str, object]:
    device = need.device
    return {
        "phase": need.phase.name,
        "bytes": need.total,
        "processes": need.processes,
        "parts": {**need.phase.parts, "overhead": need.overhead},
        "model": {"parameters": shape.parameters, "source": shape.source},
        "device": {"kind": device.kind, "total": device.total, "available": device.available},
    }
