"""The data stage: checks and splits all chats; writes run/data/{train,validation,replay}.jsonl.

Nothing is written when there is a fault, but run/data-faults.txt, which lists every one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..run import Run
from .compare import Seen, Trained
from .faults import Fault, in_order, write_report
from .read import ChatFile, read_checked
from .split import held_out
from .write import RowWriter, divide

if TYPE_CHECKING:
    from ..recipe import DataSection

REPORT = "data-faults.txt"
FOLDER = "data"

Files = dict[str, list[ChatFile]]
Writers = dict[str, RowWriter]


def prepare(data: DataSection, run: Run) -> dict[str, Any]:
    """Check, split and write the chats of a recipe; returns the manifest of the stage.

    Raises DataError with every fault of every file; then the run's chats stay as they were.
    """
    started = time.monotonic()
    report = run.path / REPORT
    files, faults = _chat_files(data)
    with _staging(run.path) as staging:
        writers, keys = _read_parts(files, staging)
        faults += [fault for part in files.values() for file in part for fault in file.faults]
        if not faults and not data.validation:
            faults = _split(data, keys, writers, staging)
        if faults:
            faults = in_order(faults)
            write_report(report, faults)
            raise DataError(faults, report)
        _publish(writers, run)
    report.unlink(missing_ok=True)
    return {**_manifest(data, files, writers), "seconds": round(time.monotonic() - started, 3)}


def _chat_files(data: DataSection) -> tuple[Files, list[Fault]]:
    """The files to read, trained parts first, and a fault for each that is named again."""
    files: Files = {}
    faults = []
    named: dict[Path, str] = {}
    sources = {"train": data.train, "replay": data.replay, "validation": data.validation}
    for part, paths in sources.items():
        files[part] = []
        for path in paths:
            first = named.get(path.resolve())
            if first is None:
                named[path.resolve()] = part
                files[part].append(ChatFile(path))
            else:
                what = f"named twice, by data.{first} and data.{part}"
                faults.append(Fault(path, 0, "named-twice", what, "name it once"))
    return files, faults


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


def _read_parts(files: Files, staging: Path) -> tuple[Writers, list[bytes]]:
    """Write each part to `staging`; gives the training rows' question keys as well."""
    trained, trained_rows, held_rows = Trained(), Seen(), Seen()
    writers: Writers = {}
    keys: list[bytes] = []
    for part, of_part in files.items():
        if not of_part:
            continue
        with RowWriter(staging / f"{part}.jsonl") as writer:
            writers[part] = writer
            for file in of_part:
                if part == "validation":
                    _read_held_out(file, held_rows, trained, writer)
                    continue
                found = _read_trained(file, trained_rows, trained, writer)
                keys += found if part == "train" else []
    return writers, keys


def _read_trained(file: ChatFile, seen: Seen, trained: Trained, writer: RowWriter) -> list[bytes]:
    keys = []
    for conversation in read_checked(file, seen):
        key = conversation.question_key()
        trained.add(key, conversation)
        keys.append(key)
        writer.write(conversation)
    return keys


def _read_held_out(file: ChatFile, seen: Seen, trained: Trained, writer: RowWriter) -> None:
    for conversation in read_checked(file, seen):
        if problem := trained.leaked(conversation):
            file.fault(conversation.line, problem)
        writer.write(conversation)


def _split(data: DataSection, keys: list[bytes], writers: Writers, staging: Path) -> list[Fault]:
    """Divide the staged training rows; a fault when there is nothing to hold out."""
    chosen = held_out(keys, data.validation_share, data.seed)
    if not chosen:
        what = "all conversations ask the same question, so none can be held out"
        mend = "add conversations, or name held-out ones under data.validation"
        return [Fault(data.train[0], 0, "too-few", what, mend)]
    whole = writers["train"].path
    writers["train"], writers["validation"] = divide(
        whole, chosen, staging / "rest.jsonl", staging / "validation.jsonl"
    )
    return []


def _publish(writers: Writers, run: Run) -> None:
    """Put the whole files in place, and take away those of an earlier recipe."""
    folder = run.path / FOLDER
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.jsonl"):
        if old.stem not in writers:
            old.unlink()
    for part, writer in writers.items():
        writer.path.replace(folder / f"{part}.jsonl")


def _manifest(data: DataSection, files: Files, writers: Writers) -> dict[str, Any]:
    order = [part for part in ("train", "validation", "replay") if part in writers]
    return {
        "inputs": {part: [_input(file) for file in files[part]] for part in order},
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
        "choices": _choices(data, writers),
    }


def _input(file: ChatFile) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "sha256": file.sha256,
        "bytes": file.size,
        "rows": file.rows,
        "formats": dict(file.formats),
    }


def _choices(data: DataSection, writers: Writers) -> list[str]:
    """The automatic choices of this stage, each with its reason."""
    if data.validation:
        return []
    rows = writers["validation"].rows
    return [
        f"held out: {rows} of {rows + writers['train'].rows} conversations, drawn with seed "
        f"{data.seed} (data.validation names no file)"
    ]
