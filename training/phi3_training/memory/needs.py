"""What each stage needs on a device, and whether that fits there.

Reads a recipe, a model's shape and a device; writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..recipe import Recipe
from .config import ModelShape
from .device import GIB, Device, gib, torch_has_cuda
from .inference import evaluate_phase, save_phase
from .rows import RowSizes
from .training import FLOAT32, Phase, compute_bytes, step_phase, work_of

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
        """What each process holds beside the model."""
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
            text += ", so ending other programs would do"
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
    """The RAM beside a GPU: weights pass through it, and a QLoRA adapter is merged there."""
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
