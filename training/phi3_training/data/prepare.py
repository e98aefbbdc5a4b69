"""The data stage: checks and splits all chats; writes run/data/{train,validation,replay}.jsonl.

Nothing is written when there is a fault, but run/data-faults.txt, which lists every one.
run/data-report.txt lists each row that was left out and each warning; run/data-origins.json says
where each row was written.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, StageError
from ..run import Run
from .arrays import U8, Bools, Ints
from .facts import MOST_COMPARED, Chat, teachers
from .faults import Fault, in_order, write_report
from .findings import Findings, Rules, sentences, write_findings
from .lengths import lengths
from .origins import FILE as ORIGINS
from .origins import MOST_ROWS, write_origins
from .scan import Scan, scan
from .sources import Source, expand, place_of
from .split import held_out, held_out_reworded
from .write import RowWriter, distribute

if TYPE_CHECKING:
    from ..recipe_data import DataSection

FAULTS = "data-faults.txt"
REPORT = "data-report.txt"
FOLDER = "data"
# Trained parts first: of two rows that are alike the later one is named.
PARTS = ("train", "replay", "validation")

Writers = dict[str, RowWriter]


def prepare(
    data: DataSection, run: Run, *, tokenizer: Path | None = None, workers: int | None = None
) -> dict[str, Any]:
    """Check, split and write the chats of a recipe; returns the manifest of the stage.

    `tokenizer` is a model folder to count tokens with. Raises DataError with every fault of
    every source; then the run's chats stay as they were.
    """
    started = time.monotonic()
    sources, faults = chosen_sources({part: getattr(data, part) for part in PARTS})
    with _staging(run.path) as staging:
        scans = scan(sources, staging, workers=workers)
        findings = Findings(scans, Rules(data.duplicates, data.near_duplicates))
        faults += findings.faults()
        target = _targets(data, findings)
        if not faults and not data.validation and not (target == _number("validation")).any():
            faults = [_nothing_to_hold_out(data)]
        if faults:
            faults = in_order(faults)
            write_report(run.path / FAULTS, faults)
            raise DataError(faults, run.path / FAULTS)
        writers = _write(findings, target, staging)
        _refuse_changed(scans)
        listed = write_findings(run.path / REPORT, findings)
        stats = lengths(findings.table, np.flatnonzero(target), tokenizer)
        taught = _taught(findings, target)
        _publish(writers, run)
        write_origins(run.path / ORIGINS, _places(findings, target))
    (run.path / FAULTS).unlink(missing_ok=True)
    return {
        **_manifest(data, scans, writers),
        **findings.counts(),
        "report": REPORT if listed else None,
        "tokens": stats,
        "held_out": taught,
        "choices": _choices(data, findings, writers, taught),
        "seconds": round(time.monotonic() - started, 3),
    }


def chosen_sources(
    parts: dict[str, Sequence[Source]],
) -> tuple[list[tuple[str, Source]], list[Fault]]:
    """The sources to read, folders opened, and a fault for each that is named again."""
    chosen: list[tuple[str, Source]] = []
    faults = []
    named: dict[str, str] = {}
    for part, sources in parts.items():
        for source in sources:
            inside = expand(source)
            if not inside:
                what, mend = "a folder without chats", "put .jsonl, .json, .csv or .parquet there"
                faults.append(Fault(place_of(source), 0, "no-chat-files", what, mend))
            for one in inside:
                key = str(one.resolve() if isinstance(one, Path) else one)
                if key in named:
                    what = f"named twice, by data.{named[key]} and data.{part}"
                    faults.append(Fault(place_of(one), 0, "named-twice", what, "name it once"))
                    continue
                named[key] = part
                chosen.append((part, one))
    return chosen, faults


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder for files in the making: gone afterwards, also what an interrupted run left."""
    staging = folder / ".data.new"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _number(part: str) -> int:
    return PARTS.index(part) + 1


def _targets(data: DataSection, findings: Findings) -> U8:
    """For each row the number of the part it is written to; 0 for removed ones."""
    table = findings.table
    numbers = np.array([_number(one.part) for one in table.scans], np.uint8)
    target = np.where(findings.keep, numbers[table.source], 0).astype(np.uint8)
    if not data.validation:
        rows = np.flatnonzero(target == _number("train"))
        if len(rows):
            chosen = _held_out(data, findings, rows)
            target[rows[chosen]] = _number("validation")
    return target


def _held_out(data: DataSection, findings: Findings, rows: Ints) -> Bools:
    """Reworded questions first, where the set is small enough to compare its chats."""
    keys = findings.groups[rows]
    if len(rows) > MOST_COMPARED:
        return held_out(keys, data.validation_share, data.seed)
    chats = _chats(findings, rows)
    found = teachers(chats, chats)
    return held_out_reworded(keys, data.validation_share, data.seed, found)


def _chats(findings: Findings, rows: Ints) -> list[Chat]:
    found = []
    for row in rows.tolist():
        *before, answer = findings.table.conversation(row).messages
        said = "\n".join(message.content for message in before)
        found.append(Chat(said, before[-1].content, answer.content))
    return found


def _taught(findings: Findings, target: U8) -> dict[str, int] | None:
    """How many held-out questions ask for what a training chat answers; None of a large set."""
    held = np.flatnonzero(target == _number("validation"))
    trained = np.flatnonzero((target == _number("train")) | (target == _number("replay")))
    if len(held) + len(trained) > MOST_COMPARED:
        return None
    found = teachers(_chats(findings, held), _chats(findings, trained))
    reworded = sum(bool(one) for one in found)
    return {"reworded": reworded, "new": len(held) - reworded}


def _nothing_to_hold_out(data: DataSection) -> Fault:
    what = "all conversations ask the same question, so none can be held out"
    mend = "add conversations, or name held-out ones under data.validation"
    return Fault(place_of(data.train[0]), 0, "too-few", what, mend)


def _write(findings: Findings, target: U8, staging: Path) -> Writers:
    with ExitStack() as stack:
        writers = {
            part: stack.enter_context(RowWriter(staging / f"{part}.jsonl"))
            for part in PARTS
            if (target == _number(part)).any()
        }
        numbered = {_number(part): writer for part, writer in writers.items()}
        distribute(findings.table, target, numbered)
    return writers


def _refuse_changed(scans: Sequence[Scan]) -> None:
    """Rows are copied from their source after all were checked: it must still be the same."""
    for one in scans:
        if one.has_changed():
            raise StageError(f"{one.path} was changed while it was read; prepare again")


def _publish(writers: Writers, run: Run) -> None:
    """Put the whole files in place, and take away those of an earlier recipe."""
    folder = run.path / FOLDER
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.jsonl"):
        if old.stem not in writers:
            old.unlink()
    for part, writer in writers.items():
        writer.path.replace(folder / f"{part}.jsonl")


def _places(findings: Findings, target: U8) -> dict[str, list[tuple[Path, int]]]:
    """The source and line of each written row; none of a large set."""
    if np.count_nonzero(target) > MOST_ROWS:
        return {}
    return {
        part: [
            findings.table.place(row) for row in np.flatnonzero(target == _number(part)).tolist()
        ]
        for part in PARTS
    }


def _manifest(data: DataSection, scans: Sequence[Scan], writers: Writers) -> dict[str, Any]:
    order = [part for part in ("train", "validation", "replay") if part in writers]
    return {
        "inputs": {
            part: [_input(one) for one in scans if one.part == part]
            for part in order
            if any(one.part == part for one in scans)
        },
        "outputs": {
            part: {
                "path": f"{FOLDER}/{part}.jsonl",
                "sha256": writers[part].sha256,
                "rows": writers[part].rows,
            }
            for part in order
        },
        "seed": data.seed,
        "settings": data.model_dump(mode="json", exclude={"train", "validation", "replay"}),
    }


def _input(one: Scan) -> dict[str, Any]:
    return {
        "path": str(one.path),
        "sha256": one.sha256,
        "bytes": one.size,
        "rows": one.rows,
        "formats": dict(one.formats),
    }


def _choices(
    data: DataSection, findings: Findings, writers: Writers, taught: Mapping[str, int] | None
) -> list[str]:
    """What was found and chosen, each with its reason."""
    lines = []
    if not data.validation:
        rows = writers["validation"].rows
        lines.append(
            f"held out: {rows} of {rows + writers['train'].rows} conversations, drawn with seed "
            f"{data.seed} (data.validation names no file)"
        )
        if taught is not None:
            lines.append(
                f"of the held-out questions {taught['reworded']} reword what a training chat "
                f"answers, {taught['new']} ask for something that none answers"
            )
    return [*lines, *sentences(findings.counts(), REPORT)]
