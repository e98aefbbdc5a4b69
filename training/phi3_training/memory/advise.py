"""The memory lines of a plan: what fits a device, what does not and what to change, what is better.

Reads a recipe and the device's memory; the lines it returns are those of `phi3 plan`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..planning import PlanLine
from ..recipe import Recipe
from ..serve.choice import choose_engine
from .config import ModelShape, UnknownShapeError, shape_of
from .device import Device, gib, this_ram
from .inference import convert_phase, row_bytes, serve_phase
from .levers import changed, cure, difference, most_sparing, proposal, words
from .needs import Need, evaluation_need, halves, loading_need, training_need
from .rows import RowSizes, worst_case
from .training import compute_bytes, work_of

_EVAL_BATCH = "evaluate.per_device_eval_batch_size"


def memory_plan(recipe: Recipe, device: Device, rows: RowSizes | None = None) -> list[PlanLine]:
    """The lines for training, evaluation and serving on `device`; no `rows`: the worst case."""
    rows = worst_case(recipe) if rows is None else rows
    try:
        shape = shape_of(recipe)
    except UnknownShapeError as error:
        return [PlanLine("finetune", f"memory is not predicted: {error}")]
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
        f"Even the most sparing setting ({words(most) or 'this one'}) needs "
        f"{gib(need.total)}: take a larger device or a smaller model"
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
    text += f". Even one at a time needs {gib(need_with(1).total)}: take a larger device{shorter}"
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
        lever = "take a larger device"
        if precision == "fp32" and engine == "ort-genai":
            lever = "serve.precision=int4"
        text = f"does not fit: {text}, {short} more than {device.name} has: {lever}"
        return [*lines, PlanLine("deploy", text, True, details)]
    row = row_bytes(shape, engine, compute, tokens)
    room = 1 + max(0, device.available - need.total) // row
    wanted = recipe.serve.max_concurrent_requests_per_instance
    text = f"fits; {text}; room for {min(room, wanted)} of {wanted} such at once"
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
