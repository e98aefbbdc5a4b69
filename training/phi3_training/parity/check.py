"""Holds every place that writes prompts against the trainer's rows, conversation by conversation.

Reads the folders in `Places`; writes nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import MissingExtraError, StageError
from ..prompt import ChatFormat
from ..run import Run
from ..serve.engines.tokens import TokenEngine
from .golden import ANSWER, Case, Messages, golden
from .report import Difference, Place, Report, Vocabulary, first_difference
from .served import Recorder, RequestRefusedError, client_asks, flow_asks, forwarded, script_asks
from .trained import Trained, forged, trained

Ask = Callable[[TokenEngine, Messages], Awaitable[str]]

_ROUTES: tuple[tuple[str, Ask], ...] = (
    ("flow, then POST /score", flow_asks),
    ("OpenAI client, then /v1/chat/completions", client_asks),
)
_ROOM = 8  # tokens for an answer
# An Azure deployment loads the model with transformers.
_SCRIPT: tuple[tuple[str, Ask], ...] = (("flow, then the Azure scoring script", script_asks),)


@dataclass(frozen=True)
class Places:
    """Where prompts are written: the folder trained from, and what serves the tuned model."""

    trained_from: Path
    model: Path
    onnx: tuple[Path, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)


def places_of_run(run: Run) -> Places:
    """The folders of a run. Raises StageError when it has no tuned model yet."""
    base = run.path / str(run.require("base", "phi3 train")["path"])
    model = run.path / str(run.require("model", "phi3 train")["path"])
    return _with_onnx(base, model, sorted(run.path.glob("onnx*")))


def places_of_folder(folder: Path) -> Places:
    """One model folder, which is trained from and served alike."""
    return _with_onnx(folder, folder, [folder])


def _with_onnx(base: Path, model: Path, candidates: Sequence[Path]) -> Places:
    onnx = tuple(path for path in candidates if (path / "genai_config.json").is_file())
    missing = "no ONNX folder yet; make one with: phi3 export --to onnx-fp32"
    return Places(base, model, onnx, {} if onnx else {"engine ort-genai": missing})


def check_tokens(places: Places) -> Report:
    """Compare all places over the golden set. Raises StageError for a folder without a format."""
    chat = _chat(places.trained_from)
    names = Vocabulary(places.trained_from)
    rows, cases = [], []
    for case in golden(chat, names.literals()):
        row = trained(chat, case, names)
        # A short context cannot take them all.
        if len(row.prompt) + _ROOM <= chat.context_length:
            rows.append(row)
            cases.append(case)
    report = Report(len(cases))
    report.places.append(_trainer(chat, cases, rows, names))
    for title, folder in _distinct({"trained from": places.trained_from, "tuned": places.model}):
        report.places.append(_reference(title, folder, cases, rows, names))
    for name, folder, settings, routes in (
        ("transformers", places.model, "generation_config.json", _ROUTES + _SCRIPT),
        *(("ort-genai", folder, "genai_config.json", _ROUTES) for folder in places.onnx),
    ):
        report.places += asyncio.run(_engine(name, folder, cases, rows, names, routes))
        report.places.append(_stops(folder / settings, rows, names))
    report.places.append(asyncio.run(_upstream(cases)))
    report.places += [Place(name, skipped=reason) for name, reason in places.notes.items()]
    return report


def _distinct(folders: dict[str, Path]) -> list[tuple[str, Path]]:
    named = {folder.resolve(): title for title, folder in reversed(folders.items())}
    return [(title, folder) for folder, title in reversed(named.items())]


def _chat(folder: Path) -> ChatFormat:
    try:
        return ChatFormat.from_folder(folder)
    except ValueError as error:
        raise StageError(str(error)) from None


def _trainer(
    chat: ChatFormat, cases: Sequence[Case], rows: Sequence[Trained], names: Vocabulary
) -> Place:
    """The trainer itself: no control token out of a message, and an end on every answer."""
    place = Place("trainer")
    for case, row in zip(cases, rows, strict=True):
        if row.refused is not None:
            continue
        place.compared += 1
        harmless = Case(case.name, case.harmless)
        found = forged(case, row.prompt, trained(chat, harmless, names).prompt, names)
        if found is not None:
            place.differences.append(found)
        if row.end is None or row.end not in chat.stop_token_ids:
            what = "the trained answer ends with no token that stops the model"
            place.differences.append(Difference(case.name, what))
    return place


def _reference(
    title: str, folder: Path, cases: Sequence[Case], rows: Sequence[Trained], names: Vocabulary
) -> Place:
    """transformers, which lets messages write control tokens: not compared where they try to."""
    place = Place(f"transformers' chat template, {title} model")
    try:
        from .reference import Reference, TemplateRefusalError
    except ImportError as error:
        place.skipped = str(MissingExtraError(error.name or "transformers", "local"))
        return place
    reference = Reference(folder)
    for case, row in zip(cases, rows, strict=True):
        if case.literals or row.refused is not None:
            continue
        answered = [*case.spoken, {"role": "assistant", "content": ANSWER}]
        for what, messages, wanted in (
            ("the prompt", case.spoken, row.prompt),
            ("the whole row", answered, row.row),
        ):
            place.compared += 1
            try:
                ids = reference.ids(messages, prompt=what == "the prompt")
            except TemplateRefusalError as error:
                place.differences.append(Difference(case.name, f"refused: {error}"))
                continue
            _note(place, first_difference(case.name, wanted, ids, names, what))
    return place


async def _engine(
    name: str,
    folder: Path,
    cases: Sequence[Case],
    rows: Sequence[Trained],
    names: Vocabulary,
    routes: Sequence[tuple[str, Ask]],
) -> list[Place]:
    """The ids that an engine's model is handed, by every route, and whether it stops."""
    recorder = Recorder(next((row.end for row in rows if row.end is not None), 0))
    try:
        engine = TokenEngine.of_folder(name, folder, recorder, slots=1)
    except (StageError, ValueError) as error:
        unusable = Difference("every conversation", f"cannot be served: {error}")
        return [Place(f"engine {name} ({folder.name})", 1, differences=[unusable])]
    places = []
    try:
        for title, ask in routes:
            place = Place(f"engine {name} ({folder.name}): {title}")
            for case, row in zip(cases, rows, strict=True):
                place.compared += 1
                recorder.prompts.clear()
                try:
                    reason = await ask(engine, case.messages)
                except RequestRefusedError as error:
                    if row.refused is None:
                        place.differences.append(Difference(case.name, f"refused: {error}"))
                    continue
                place.differences += _answered(case, row, recorder.prompts[0], reason, names)
            places.append(place)
    finally:
        await engine.close()
    return places


def _answered(
    case: Case, row: Trained, ids: list[int], reason: str, names: Vocabulary
) -> list[Difference]:
    if row.refused is not None:
        return [Difference(case.name, f"answered, but the trainer refuses it: {row.refused}")]
    found = first_difference(case.name, row.prompt, ids, names, "the prompt")
    differences = [] if found is None else [found]
    if reason != "stop":
        what = "does not stop at the token that ends a trained answer"
        differences.append(Difference(case.name, what))
    return differences


def _stops(file: Path, rows: Sequence[Trained], names: Vocabulary) -> Place:
    """What other servers read: the stop tokens that the folder's own settings name."""
    place = Place(f"stop tokens of {file.parent.name}/{file.name}", compared=1)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    named = content.get("model", content).get("eos_token_id")
    stops = named if isinstance(named, list) else [named]
    for end in {row.end for row in rows if row.end is not None}.difference(stops):
        what = f"{names.text(end)!r} ({end}) ends a trained answer, but is not in"
        place.differences.append(Difference("every answer", f"{what} eos_token_id {stops}"))
    return place


async def _upstream(cases: Sequence[Case]) -> Place:
    """The messages that are passed on; what the other server writes of them is its own."""
    place = Place("engine upstream: the messages it passes on (that server writes its own tokens)")
    for case in cases:
        place.compared += 1
        passed = await forwarded(case)
        if passed != case.spoken:
            what = f"passes on {list(passed)}, asked {list(case.spoken)}"
            place.differences.append(Difference(case.name, what[:300]))
    return place


def _note(place: Place, difference: Difference | None) -> None:
    if difference is not None:
        place.differences.append(difference)
