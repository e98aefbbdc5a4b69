"""The data stage: checks and splits all chats; writes run/data/{train,validation,replay}.jsonl.

Nothing is written when there is a fault, but run/data-faults.txt, which lists every one.
run/data-report.txt lists each row that was left out and each warning; run/data-origins.json says
where each row was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from phi3_tool.grounding import question_in

from ..errors import DataError, StageError
from ..manifests import DatasetManifest, Prepared
from ..manifests import Source as Input
from ..progress import Progress, no_progress
from ..recipe import Recipe
from ..run import Run, write_atomically
from ..telling import Set, has_expected_words, names_in
from . import faults as wordings
from .digest import U8, U64, Bools, Ints, mixed
from .faults import Fault, in_order, shown, write_report
from .findings import (
    Findings,
    Rules,
    TokenRules,
    Verdict,
    judge,
    lengths,
    sentences,
    write_findings,
)
from .scan import Scan, Span, Table, scan
from .sources import Folder, Source, expand, named, place_of

if TYPE_CHECKING:
    from ..recipe import DataSection


# Which chats teach what another one asks: the same answer, or one with the same facts.
# Works on questions and answers alone; used where a set is small enough to compare.

MOST_COMPARED = 5000  # chats of a set; that many of 50 words take some 5 seconds
MOST_CANDIDATES = 50  # of one chat; a set where more share a rare word is compared with these


class Chat(NamedTuple):
    """All turns before the last answer, its question, and that answer."""

    before: str
    question: str
    answer: str


def teachers(asked: Sequence[Chat], taught: Sequence[Chat]) -> list[list[int]]:
    """For each chat of `asked` the chats of `taught` that teach its answer, except itself.

    One does where its own answer would count as right for the question, and it mentions what the
    question asks about: of its words, the rarest that other chats have as well.
    """
    itself = asked is taught
    everything = asked if itself else [*asked, *taught]
    among = Set.of([chat.answer for chat in everything], [chat.question for chat in everything])
    subjects = [among.subject(f"{chat.question}\n{chat.answer}") for chat in taught]
    counts = Counter(word for subject in subjects for word in subject)
    by_word: defaultdict[str, list[int]] = defaultdict(list)
    by_answer: defaultdict[str, list[int]] = defaultdict(list)
    for number, chat in enumerate(taught):
        by_answer[chat.answer].append(number)
        for word in among.telling(chat.answer).all:
            by_word[word].append(number)
    teachers_of: list[list[int]] = []
    for place, chat in enumerate(asked):
        known = {
            word: counts[word] for word in among.subject(chat.question) if counts[word] > itself
        }
        rarest = {word for word, count in known.items() if count == min(known.values())}
        if not names_in(chat.question) <= known.keys() | among.asked_common:
            teachers_of.append([])  # asks about something that no other chat mentions
            continue
        lists = sorted(
            (by_word.get(word, []) for word in among.telling(chat.answer, chat.before).all), key=len
        )
        # The rarest word may be among those that an answer need not have.
        near = [number for numbers in lists[:2] for number in numbers[:MOST_CANDIDATES]]
        candidates = {*near, *by_answer[chat.answer][:MOST_CANDIDATES]}
        teachers_of.append(
            sorted(
                number
                for number in candidates - ({place} if itself else set())
                if (not rarest or rarest & subjects[number])
                and has_expected_words(taught[number].answer, chat.answer, chat.before, among)
            )
        )
    return teachers_of


# Chooses the held-out part of a set: seeded, and never the same question on both sides.

ENOUGH = 10  # held-out questions that a gate can judge by


def held_out(keys: U64, share: float, seed: int) -> Bools:
    """Which rows to hold out: about `share` of `keys`, at least one, never all.

    Rows with equal keys (the same question in the same context) stay together. None when there
    are fewer than two different keys. The order of the rows does not matter.
    """
    groups, members, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    order = _order(groups, seed)
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = np.zeros(len(groups), np.bool_)
    wanted = max(1, round(share * len(keys)))
    chosen[order[:-1]] = before[:-1] < wanted
    return chosen[members]


def held_out_reworded(
    keys: U64, share: float, seed: int, teachers: Sequence[Sequence[int]]
) -> Bools:
    """The same, of rows whose fact is still trained on; `teachers[row]` are rows that teach it.

    Such a question can be answered by a model that has learnt its chats. If there are fewer
    than ENOUGH of them, others are added as `held_out` chooses them, up to the share.
    """
    groups, members, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    wanted = max(1, round(share * len(keys)))
    rows_of = [np.flatnonzero(members == group) for group in range(len(groups))]
    taught_by = [{row for row in rows if members[row] != members[i]} for i, rows in
                 enumerate(teachers)]  # fmt: skip
    teaches: list[list[int]] = [[] for _ in keys]
    for row, rows in enumerate(taught_by):
        for teacher in rows:
            teaches[teacher].append(row)
    left = [len(rows) for rows in taught_by]  # teachers of each row that are still trained on
    chosen = np.zeros(len(groups), np.bool_)
    held: set[int] = set()
    order = _order(groups, seed)
    for group in order.tolist():
        rows = rows_of[group].tolist()
        lost = Counter(row for teacher in rows for row in teaches[teacher])
        if len(held) >= wanted or any(left[row] < 1 for row in rows):
            continue
        if any(row in held and left[row] - count < 1 for row, count in lost.items()):
            continue
        chosen[group] = True
        held.update(rows)
        for row, count in lost.items():
            left[row] -= count
    if len(held) < min(wanted, ENOUGH):
        count = len(held)
        for group in order.tolist():
            if count >= wanted or chosen.sum() >= len(groups) - 1:
                break
            if not chosen[group]:
                chosen[group] = True
                count += int(sizes[group])
    return chosen[members]


def _order(groups: U64, seed: int) -> Ints:
    start = mixed(np.array([seed % 2**64], np.uint64))
    return np.argsort(mixed(groups ^ start), kind="stable")


# Where each prepared row is in the user's own files, so that messages can name that place.
# Reads and writes run/data-origins.json; sets of more than a bound of rows have none.

ORIGINS_FILE = "data-origins.json"
MOST_ROWS = 20_000  # about 1 MB


def write_origins(path: Path, places: Mapping[str, Sequence[tuple[Path, int]]]) -> None:
    """Write the file and line of each row of each part; none where there are too many rows."""
    if not 0 < sum(map(len, places.values())) <= MOST_ROWS:
        path.unlink(missing_ok=True)
        return
    rows = {
        part: [f"{file}:{line}" for file, line in rows_of_part]
        for part, rows_of_part in places.items()
    }
    write_atomically(path, json.dumps(rows, ensure_ascii=False))


def origins(run: Path, part: str) -> list[str]:
    """`file:line` for each row of a part, in order; empty where that is not known."""
    try:
        places = json.loads((run / ORIGINS_FILE).read_text(encoding="utf-8")).get(part, [])
    except (OSError, ValueError, AttributeError):
        return []
    return [str(place) for place in places]


# Writes prepared conversations as JSON lines, counted and hashed on the way.

_AHEAD = 2  # spans of 1 MB that are read before they are written


class RowWriter:
    """Rows for one file; when the `with` block ends they are on the disk, not only in a cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._stream = path.open("wb")
        self._hash = hashlib.sha256()
        self._hashed: Future[None] | None = None

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())  # a crash must not leave a manifest of an empty file

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        self._await_hash()
        return self._hash.hexdigest()

    def write(self, data: bytes, rows: int, hashing: Executor) -> None:
        """Add whole lines; they are hashed in a thread, which takes as long as writing.

        It lags one call at most, so that memory stays flat.
        """
        if rows:
            hashed = hashing.submit(self._hash.update, data)
            self._stream.write(data)
            self.rows += rows
            self._await_hash()
            self._hashed = hashed

    def _await_hash(self) -> None:
        if self._hashed is not None:
            self._hashed.result()


Lines = list[tuple[int, bytes, int]]  # number of the writer, lines, how many


def distribute(table: Table, target: U8, writers: Mapping[int, RowWriter]) -> None:
    """Copy each row to the writer that its number in `target` names; 0 is none.

    One thread reads and sorts ahead and one hashes while this one writes.
    """

    def sorted_lines(span: Span) -> Lines:
        with span.path.open("rb") as stream:
            stream.seek(span.start)
            data = memoryview(stream.read(span.end - span.start))
        wanted, lines = target[span.rows], []
        for number in writers:
            chosen = np.flatnonzero(wanted == number).tolist()
            texts = [data[span.places[i] : span.places[i] + span.sizes[i]] for i in chosen]
            lines.append((number, b"\n".join([*texts, b""]), len(texts)))
        return lines

    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as hashing:
        waiting: deque[Future[Lines]] = deque()
        for span in table.spans(np.flatnonzero(target)):
            waiting.append(ahead.submit(sorted_lines, span))
            if len(waiting) > _AHEAD:
                _write_lines(waiting.popleft().result(), writers, hashing)
        for last in waiting:
            _write_lines(last.result(), writers, hashing)


def _write_lines(lines: Lines, writers: Mapping[int, RowWriter], hashing: Executor) -> None:
    for number, data, rows in lines:
        writers[number].write(data, rows, hashing)


FAULTS = "data-faults.txt"
REPORT = "data-report.txt"
FOLDER = "data"
# Trained parts first: of two rows that are alike the later one is named.
PARTS = ("train", "replay", "validation")

Writers = dict[str, RowWriter]


class Examined(NamedTuple):
    """The chats of a recipe before anything is written; `target` numbers the part of each row."""

    scans: list[Scan]
    findings: Findings
    target: U8
    verdict: Verdict
    faults: list[Fault]
    notes: list[str]
    draws: bool  # whether a share of what is trained on is held out

    def rows(self, *parts: str) -> Ints:
        """The rows of the table that are written to these parts."""
        return np.flatnonzero(np.isin(self.target, [_number(part) for part in parts]))

    def reworded(self) -> dict[str, int] | None:
        """How many held-out questions reword a trained one, or are new; None of a large set."""
        held, trained = self.rows("validation"), self.rows("train", "replay")
        if len(held) + len(trained) > MOST_COMPARED:
            return None
        taught_by = teachers(_chats(self.findings, held), _chats(self.findings, trained))
        reworded = sum(bool(rows) for rows in taught_by)
        return {"reworded": reworded, "new": len(held) - reworded}

    def places(self) -> dict[str, list[tuple[Path, int]]]:
        """The source and line of each row of each part; none of a large set."""
        if np.count_nonzero(self.target) > MOST_ROWS:
            return {}
        table = self.findings.table
        return {part: [table.place(row) for row in self.rows(part).tolist()] for part in PARTS}

    def remarks(self, seed: int, reworded: Mapping[str, int] | None) -> list[str]:
        """What a person should know of the files, and of what was held out."""
        lines = [f"{shown(scan.path)}: {note}" for scan in self.scans for note in scan.notes]
        if not self.draws:
            return lines
        held = len(self.rows("validation"))
        lines.append(
            f"held out: {held} of {held + len(self.rows('train'))} conversations, drawn with seed "
            f"{seed} (data.validation names no file)"
        )
        if reworded is not None:
            lines.append(
                f"held-out questions: {reworded['reworded']} reword what a training chat answers, "
                f"{reworded['new']} ask for something that no training chat answers"
            )
        return lines

    def inputs(self) -> dict[str, list[Input]]:
        """What was read for each part, for the manifest."""
        inputs: dict[str, list[Input]] = {}
        for scanned in self.scans:
            read = Input(
                path=str(scanned.path),
                sha256=scanned.sha256,
                bytes=scanned.size,
                rows=scanned.rows,
                formats=dict(scanned.formats),
            )
            inputs.setdefault(scanned.part, []).append(read)
        return inputs


def examine(
    data: DataSection,
    folder: Path,
    rules: TokenRules | None,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> Examined:
    """Read and judge all chats of a recipe; block files go to `folder`."""
    sources, faults, notes = chosen_sources({part: getattr(data, part) for part in PARTS})
    draws = all(part != "validation" for part, _ in sources)
    scans = scan(sources, folder, workers=workers, progress=progress)
    findings = Findings(scans, Rules(data.duplicates, data.near_duplicates))
    table = findings.table
    numbers = np.array([_number(scanned.part) for scanned in table.scans], np.uint8)
    target = np.where(findings.keep, numbers[table.source], 0).astype(np.uint8)
    verdict = judge(data, findings, target, {part: _number(part) for part in PARTS}, rules)
    target[verdict.rows] = 0
    rows = np.flatnonzero(target == _number("train"))
    if draws and len(rows):
        keys = findings.groups[rows]
        if len(rows) > MOST_COMPARED:
            chosen = held_out(keys, data.validation_share, data.seed)
        else:  # reworded questions first, where the set is small enough to compare its chats
            chats = _chats(findings, rows)
            taught_by = teachers(chats, chats)
            chosen = held_out_reworded(keys, data.validation_share, data.seed, taught_by)
        target[rows[chosen]] = _number("validation")
    faults += verdict.faults
    if not faults and not (target == _number("train")).any():
        faults = [Fault.at(place_of(data.train[0]), 0, wordings.NOTHING_TO_TRAIN())]
    if not faults and draws and not (target == _number("validation")).any():
        faults = [Fault.at(place_of(data.train[0]), 0, wordings.NOTHING_TO_HOLD_OUT())]
    return Examined(scans, findings, target, verdict, in_order(faults), notes, draws)


def prepare(
    data: DataSection,
    run: Run,
    *,
    tokenizer: Path | None = None,
    rules: TokenRules | None = None,
    workers: int | None = None,
    progress: Progress = no_progress,
) -> DatasetManifest:
    """Check, split and write the chats of a recipe; returns the manifest of the stage.

    `tokenizer` is a model folder to count tokens with; `rules` says which rows its model cannot
    be trained on. Raises DataError with every fault of every source; then the run's chats stay
    as they were.
    """
    started = time.monotonic()
    with _staging(run.path) as staging:
        examined = examine(data, staging, rules, workers, progress)
        findings, target, verdict = examined.findings, examined.target, examined.verdict
        if examined.faults:
            write_report(run.path / FAULTS, examined.faults)
            raise DataError(examined.faults, run.path / FAULTS)
        with ExitStack() as stack:
            writers = {
                part: stack.enter_context(RowWriter(staging / f"{part}.jsonl"))
                for part in ("train", "validation", "replay")
                if len(examined.rows(part))
            }
            numbered = {_number(part): writer for part, writer in writers.items()}
            distribute(findings.table, target, numbered)
        # Rows were copied after all were checked: their source must still be the same.
        for scanned in examined.scans:
            if scanned.has_changed():
                raise StageError(
                    f"{scanned.path} changed while it was being read; run the command again"
                )
        listed = write_findings(run.path / REPORT, findings, verdict.skipped, verdict.cut)
        stats = lengths(findings.table, np.flatnonzero(target), tokenizer)
        reworded = examined.reworded()
        folder = run.path / FOLDER
        folder.mkdir(exist_ok=True)
        # A part that this recipe does not have must not be left from an earlier one.
        for old in folder.glob("*.jsonl"):
            if old.stem not in writers:
                old.unlink()
        for part, writer in writers.items():
            writer.path.replace(folder / f"{part}.jsonl")
        write_origins(run.path / ORIGINS_FILE, examined.places())
    (run.path / FAULTS).unlink(missing_ok=True)
    counts = findings.counts()
    counts["removed"] |= verdict.removed()
    if verdict.cut:
        counts["warnings"]["cut to data.max_length"] = len(verdict.cut)
    inputs = examined.inputs()
    return DatasetManifest(
        inputs={part: inputs[part] for part in writers if part in inputs},
        outputs={
            part: Prepared(path=f"{FOLDER}/{part}.jsonl", sha256=writer.sha256, rows=writer.rows)
            for part, writer in writers.items()
        },
        seed=data.seed,
        settings=data.model_dump(mode="json", exclude={"train", "validation", "replay"}),
        removed=counts["removed"],
        warnings=counts["warnings"],
        report=REPORT if listed else None,
        tokens=stats,
        held_out=reworded,
        choices=[
            *examined.notes,
            *examined.remarks(data.seed, reworded),
            *sentences(counts, REPORT),
        ],
        seconds=round(time.monotonic() - started, 3),
    )


class Chosen(NamedTuple):
    """The sources to read, with their parts; faults of the choice, and what to know of it."""

    sources: list[tuple[str, Source]]
    faults: list[Fault]
    notes: list[str]


def chosen_sources(parts: Mapping[str, Sequence[Source]]) -> Chosen:
    """The sources to read, folders opened, and a fault for each that is named again.

    A folder's files that are named for validation, or else for test, are held out if no source of
    validation is named: they are never trained on.
    """
    chosen: list[tuple[str, Source]] = []
    faults, notes = [], []
    seen: dict[str, str] = {}
    for part, sources in parts.items():
        for source in sources:
            folder = expand(source)
            if not folder.all:
                faults.append(Fault.at(place_of(source), 0, wordings.NO_CHAT_FILES()))
            notes += [f"{shown(place_of(source))}: {note}" for note in folder.notes()]
            for taken, file in _by_part(part, folder, place_of(source), parts, notes):
                key = str(file.resolve() if isinstance(file, Path) else file)
                if key in seen:
                    problem = wordings.NAMED_TWICE(first=seen[key], second=taken)
                    faults.append(Fault.at(place_of(file), 0, problem))
                    continue
                seen[key] = taken
                chosen.append((taken, file))
    order = list(PARTS)
    chosen.sort(key=lambda file: order.index(file[0]))
    return Chosen(chosen, faults, notes)


def _by_part(
    part: str,
    folder: Folder,
    path: Path,
    parts: Mapping[str, Sequence[Source]],
    notes: list[str],
) -> list[tuple[str, Source]]:
    """The files of a folder that is named under `part`, and the part that each belongs to."""
    splits = {split: files for split, files in folder.splits.items() if files}
    if len(splits) < 2 and "test" not in splits and "validation" not in splits:
        return [(part, file) for file in folder.all]
    wanted = {"train": "train", "replay": "train"}.get(part)
    if wanted is None or wanted not in splits:  # held out, or explicitly named for it
        wanted = next(split for split in ("validation", "test", "train") if split in splits)
    taken = {wanted: part}
    held = next((split for split in ("validation", "test") if split in splits), None)
    if part == "train" and held not in (None, wanted) and not parts.get("validation"):
        taken[str(held)] = "validation"
    for split, files in splits.items():
        names = named([place_of(file).relative_to(path).as_posix() for file in files])
        what = {None: "not read", "validation": "held out"}.get(taken.get(split), "read")
        notes.append(f"{shown(path)}: {what}, as its name says ({split}): {names}")
    return [
        (taken[split], file) for split, files in splits.items() if split in taken for file in files
    ]


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


def _chats(findings: Findings, rows: Ints) -> list[Chat]:
    chats = []
    for row in rows.tolist():
        *before, answer = findings.table.conversation(row).messages
        # Without the passages of documents: they hold the answers of other questions as well.
        asked = [question_in(message.content) for message in before]
        chats.append(Chat("\n".join(asked), asked[-1], answer.content))
    return chats


def question_of(recipe: Recipe, run: Run) -> str:
    """What is asked at the end: the recipe's question, else the first that is held out.

    Raises StageError where the recipe has none and no chats are prepared.
    """
    if recipe.ask is not None:
        return recipe.ask
    for part in ("validation", "train"):
        path = run.path / "data" / f"{part}.jsonl"
        if path.is_file():
            with path.open(encoding="utf-8") as stream:
                messages = json.loads(stream.readline() or "{}").get("messages", [])
            for message in messages:
                if message["role"] == "user":
                    return str(message["content"])
    raise StageError(f"The run {run.name!r} has no prepared chats yet: phi3 data prepare")
