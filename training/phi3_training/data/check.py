"""`phi3 data check`: reads chats and reports what is in them. Writes nothing permanent."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ..errors import FIX_HINT, FIXABLE, SHOWN_FAULTS, DataError, UsageError, counted, folded
from ..manifests import TokenLengths
from ..prompt import ChatFormat
from ..recipe import DataSection
from .conversation import Conversation
from .faults import Fault, in_order, shown
from .findings import Findings, Rules, TokenRules, Verdict, judge_tokens, lengths
from .prepare import chosen_sources, examine
from .scan import Scan, Table, scan, scan_start
from .sources import source_of

# Chats as Conversations: for callers that want a few of them in memory. A small set, all of it.


def read_conversations(paths: Sequence[Path]) -> list[Conversation]:
    """All conversations of all sources. Raises DataError with every fault of every one."""
    sources, faults, _ = chosen_sources({"train": [source_of(path) for path in paths]})
    with tempfile.TemporaryDirectory() as folder:
        # Callers want all of what they named: a repeated row is an error of theirs.
        findings = Findings(scan(sources, Path(folder)), Rules("refuse", "warn"))
        if faults := [*faults, *findings.faults()]:
            raise DataError(faults)
        return [findings.table.conversation(row) for row in range(len(findings.table))]


def show(source: Path | str, count: int) -> list[Conversation]:
    """The first sound conversations of a source; reads no further than it must.

    Raises DataError with every fault found if no row is valid.
    """
    sources, faults, _ = chosen_sources({"train": [source_of(source)]})
    conversations: list[Conversation] = []
    with tempfile.TemporaryDirectory() as folder:
        for _, origin in sources:
            scanned = scan_start(origin, Path(folder), count - len(conversations))
            table = Table([scanned])
            wanted = range(min(len(table), count - len(conversations)))
            conversations += [table.conversation(row) for row in wanted]
            faults += scanned.faults
            if len(conversations) == count:
                return conversations
    if not conversations and faults:
        raise DataError(in_order(faults))
    return conversations


@dataclass(frozen=True)
class FileReport:
    """What one file holds; `rows` are its sound conversations."""

    path: Path
    rows: int
    several_turns: int
    formats: dict[str, int]
    size: int
    sha256: str
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()
    unused_keys: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        faults = counted(len(self.faults), "fault") if self.faults else "no fault"
        formats = f" ({', '.join(self.formats)}; {self.several_turns} with several turns)"
        rows = counted(self.rows, "conversation") + (formats if self.rows else "")
        return f"{shown(self.path)}: {rows}, {faults}"

    def as_dict(self) -> dict[str, object]:
        """For `-o json`."""
        return {
            "file": str(self.path),
            "rows": self.rows,
            "several_turns": self.several_turns,
            "formats": self.formats,
            "bytes": self.size,
            "sha256": self.sha256,
            "faults": len(self.faults),
            "notes": list(self.notes),
            "unused_keys": self.unused_keys,
        }


@dataclass(frozen=True)
class CheckReport:
    """All sources of one check, all their faults and warnings in order, and how long rows are."""

    files: tuple[FileReport, ...]
    faults: list[Fault]
    warnings: list[Fault]
    tokens: TokenLengths | None
    skipped: Sequence[Fault] = ()  # by data.bad_rows and data.too_long of a recipe
    cut: Sequence[Fault] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people: one line per file, the lengths, then the first faults and warnings."""
        lines = [f"note: {note}" for note in self.notes]
        for file in self.files:
            lines += [str(file), *(f"  note: {note}" for note in file.notes)]
        lines += [str(self.tokens)] if self.tokens else []
        lines += _first(self.faults)
        lines += [FIX_HINT] if any(fault.kind in FIXABLE for fault in self.faults) else []
        for done, rows in (("skipped", self.skipped), ("cut", self.cut)):
            if rows:
                count = len({(fault.path, fault.line, fault.row) for fault in rows})
                lines += [f"{counted(count, 'row')} will be {done}:", *_first(rows)]
        if self.warnings:
            lines += [counted(len(self.warnings), "warning") + ":", *_first(self.warnings)]
        return lines

    def every_line(self) -> str:
        """Every fault and warning, one line each, for a file."""
        faults = [f"fault: {fault}\n" for fault in self.faults]
        for done, rows in (("skipped", self.skipped), ("cut", self.cut)):
            faults += [f"{done}: {fault.place}: {fault.what}\n" for fault in rows]
        return "".join([*faults, *(f"warning: {warning}\n" for warning in self.warnings)])

    def as_dict(self) -> dict[str, object]:
        """For `-o json`: nothing is left out."""
        return {
            "files": [file.as_dict() for file in self.files],
            "faults": [fault.as_dict() for fault in self.faults],
            "warnings": [warning.as_dict() for warning in self.warnings],
            "skipped": [fault.as_dict() for fault in self.skipped],
            "cut": [fault.as_dict() for fault in self.cut],
            "tokens": self.tokens.model_dump() if self.tokens else None,
            "notes": list(self.notes),
        }


def check(
    paths: Sequence[Path | str],
    tokenizer: Path | None = None,
    *,
    rules: TokenRules | None = None,
    workers: int | None = None,
) -> CheckReport:
    """Read all sources to their ends and report what is in them, every fault and every warning.

    `tokenizer` is a model folder to count tokens with. What its `rules` say of rows is a warning
    here, because no recipe says how long they may be.
    """
    sources, faults, notes = chosen_sources({"train": [source_of(path) for path in paths]})
    with tempfile.TemporaryDirectory(prefix="phi3-check-") as folder:
        scans = scan(sources, Path(folder), workers=workers)
        findings = Findings(scans, Rules(duplicates="refuse", near_duplicates="warn"))
        faults = in_order([*faults, *findings.faults()])
        table = findings.table
        verdict = Verdict()
        if rules is not None:
            target = np.ones(len(table), np.uint8)  # every row is of the one part
            train = [source for _, source in sources]
            judge_tokens(DataSection(train=train), table, target, {"train": 1}, rules, verdict)
        return CheckReport(
            files=tuple(_file_report(scanned, faults) for scanned in scans),
            faults=faults,
            warnings=in_order([*findings.warnings(), *verdict.faults]),
            tokens=lengths(table, np.arange(len(table)), tokenizer),
            notes=tuple(notes),
        )


def check_recipe(
    data: DataSection,
    rules: TokenRules | None,
    tokenizer: Path | None = None,
    *,
    workers: int | None = None,
) -> CheckReport:
    """What `prepare` would say of a recipe's chats; writes nothing that stays."""
    with tempfile.TemporaryDirectory(prefix="phi3-check-") as folder:
        examined = examine(data, Path(folder), rules, workers)
        scans, findings, target, verdict, faults, notes, _ = examined
        return CheckReport(
            files=tuple(_file_report(scanned, faults) for scanned in scans),
            faults=faults,
            warnings=in_order(findings.warnings()),
            tokens=lengths(findings.table, np.flatnonzero(target), tokenizer),
            skipped=in_order(verdict.skipped),
            cut=in_order(verdict.cut),
            notes=tuple(notes),
        )


def _file_report(scanned: Scan, faults: Sequence[Fault]) -> FileReport:
    # A row that repeats another one was read without a fault, but is not trained on.
    repeated = sum(fault.path == scanned.path and fault.kind == "duplicate" for fault in faults)
    return FileReport(
        path=scanned.path,
        rows=scanned.rows - repeated,
        several_turns=scanned.several_turns,
        formats=dict(scanned.formats),
        size=scanned.size,
        sha256=scanned.sha256,
        faults=tuple(fault for fault in faults if fault.path == scanned.path),
        notes=tuple(scanned.notes),
        unused_keys=dict(scanned.unused),
    )


def _first(faults: Sequence[Fault]) -> list[str]:
    folded_lines = folded(faults)
    lines = [f"  {line}" for line in folded_lines[:SHOWN_FAULTS]]
    if len(folded_lines) > SHOWN_FAULTS:
        lines.append(f"  … and {len(folded_lines) - SHOWN_FAULTS} more lines")
    if len(lines) < len(faults):
        lines.append("  (every row: --report FILE, or -o json)")
    return lines


# A conversation as the exact text that is trained on, cut where trained and other tokens meet.
# Reads a model folder's tokenizer through ChatFormat; writes nothing.


@dataclass(frozen=True)
class Stretch:
    """Tokens that follow on each other and are all trained on, or all not."""

    trained: bool
    text: str


@dataclass(frozen=True)
class TokenView:
    """What the model sees of one conversation."""

    place: str
    ids: list[int]
    mask: list[int]
    stretches: list[Stretch]

    @property
    def trained(self) -> int:
        """How many tokens are trained on."""
        return sum(self.mask)

    def as_dict(self) -> dict[str, object]:
        """For `-o json`."""
        return {
            "place": self.place,
            "tokens": len(self.ids),
            "trained": self.trained,
            "input_ids": self.ids,
            "assistant_mask": self.mask,
            "stretches": [{"trained": s.trained, "text": s.text} for s in self.stretches],
        }


class TokenViewer:
    """Shows conversations as one model folder writes them. Raises UsageError for other folders."""

    def __init__(self, folder: Path) -> None:
        try:
            self._chat = ChatFormat.from_folder(folder)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def view(self, conversation: Conversation) -> TokenView:
        """The conversation as the trainer is given it, before it is cut to `max_length`.

        Raises UsageError for a conversation that the model's template cannot write.
        """
        place = f"{conversation.source.name}:{conversation.line}"
        messages = [message.to_dict() for message in conversation.messages]
        try:
            example = self._chat.encode_example(messages)
        except ValueError as error:
            raise UsageError(f"{place}: {error}") from None
        ids, mask = example.input_ids, example.assistant_mask
        stretches: list[Stretch] = []
        end, before = 0, ""
        for trained, run in groupby(mask):
            end += len(list(run))
            # Decoded from the start each time: alone, tokens may lose a space or half a character.
            text = str(self._tokenizer.decode(ids[:end], skip_special_tokens=False))
            stretches.append(Stretch(bool(trained), text[len(before) :]))
            before = text
        return TokenView(place, ids, mask, stretches)
