"""Faults of chats: where one is, and how each is worded: what is wrong, and what fixes it.

Every sentence that `phi3 data check` and `prepare` say of a fault is in the table below, but those
of the label audit (finetune/audit.py). Writes the full report of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..run import write_atomically


class Problem(NamedTuple):
    """What is wrong with a row, and the fix; `column` counts characters from 1.

    It does not know its file and line yet: a `Fault` does.
    """

    kind: str
    what: str
    fix: str
    column: int | None = None


@dataclass(frozen=True)
class Fault:
    """One fault of one file. Line 0 means the file as a whole; `kind` is a stable name."""

    path: Path
    line: int
    kind: str
    what: str
    fix: str
    column: int | None = None
    row: int | None = None  # its number, from 1, where several rows may share a line

    @classmethod
    def at(cls, path: Path, line: int, problem: Problem, row: int = 0) -> Fault:
        """The problem, found at this place."""
        details = problem.kind, problem.what, problem.fix, problem.column
        return cls(path, line, *details, row or None)

    def __str__(self) -> str:
        return f"{self.place}: {self.what}; {self.fix}"

    @property
    def place(self) -> str:
        """`file`, `file:line` or `file:line:column`, as editors open it, and the row's number."""
        return place(self.path, self.line, self.row or 0, self.column)

    def as_dict(self) -> dict[str, object]:
        """For `-o json`."""
        return {
            "file": str(self.path),
            "line": self.line or None,
            "row": self.row,
            "column": self.column,
            "kind": self.kind,
            "what": self.what,
            "fix": self.fix,
        }


def place(path: Path, line: int, row: int = 0, column: int | None = None) -> str:
    """A place as a person reads it; the row is named where it is not the line."""
    where = ":".join([shown(path), *(str(n) for n in (line, column) if n)])
    return f"{where} (row {row})" if row and row != line else where


def shown(path: Path) -> str:
    """The path as a person would type it: relative if it is below the current folder."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except (ValueError, FileNotFoundError):
        return str(path)


def in_order(faults: Iterable[Fault]) -> list[Fault]:
    """Faults by file (in the order first met), then by line and column."""
    faults = list(faults)
    rank: dict[Path, int] = {}
    for fault in faults:
        rank.setdefault(fault.path, len(rank))
    return sorted(
        faults, key=lambda fault: (rank[fault.path], fault.line, fault.row or 0, fault.column or 0)
    )


def write_report(path: Path, faults: Sequence[Fault]) -> None:
    """Every fault, one line each, in one file."""
    write_atomically(path, "".join(f"{fault}\n" for fault in faults))


@dataclass(frozen=True)
class Wording:
    """The two sentences of a fault; called with what fills their {names}, it is the problem.

    `kind` is a stable name for scripts (`-o json`): several wordings may share one.
    """

    kind: str
    what: str
    fix: str

    def __call__(self, column: int | None = None, **details: object) -> Problem:
        what, fix = self.what.format_map(details), self.fix.format_map(details)
        return Problem(self.kind, what, fix, column)


# Files as a whole. "the rest was not read" is looked for by `findings.ends_reading`: where it is
# said, more than one row is lost, and no row may be skipped.

NO_FILE = Wording("no-such-file", "no such file", "check its path and spelling")
UNREADABLE = Wording("unreadable", "cannot be read ({why})", "name a file that you can read")
EMPTY_FILE = Wording("no-rows", "the file is empty", "write one conversation per line")
NO_ROWS = Wording("no-rows", "the file contains no conversation", "write one conversation per line")
NO_CHAT_FILES = Wording(
    "no-chat-files", "a folder without chats", "add .jsonl, .json, .csv or .parquet files"
)
NAMED_TWICE = Wording(
    "named-twice", "named twice, under data.{first} and data.{second}", "name it once"
)
NOT_TEXT_FILE = Wording("not-text", "{start} {what}", "{fix}")
BROKEN_GZIP = Wording(
    "broken-gzip",
    "the gzip file is damaged or incomplete ({why}); the rest was not read",
    "copy or download it again",
)
GZIP_TOO_LARGE = Wording(
    "gzip-too-large",
    "the gzip file unpacks to more than {most} MiB",
    "unpack it yourself if that is right (chats rarely shrink {times} times)",
)
WRONG_ENCODING = Wording(
    "not-utf8",
    "the file starts as {name}, but is not valid {name}; the rest was not read",
    "save it as UTF-8",
)
NOT_UTF8_NOR_1252 = Wording(
    "not-utf8",
    "the file is neither UTF-8 nor Windows-1252, as Excel writes Western languages",
    "save it as CSV UTF-8",
)
NOT_UTF8 = Wording("not-utf8", "the file is not UTF-8", "save it as UTF-8")
BROKEN_COLUMNS = {
    kind: Wording(f"broken-{kind}", f"not a complete {kind} file ({{why}})", "write the file again")
    for kind in ("parquet", "arrow")
}
HUB_FOLDER = Wording(
    "hub-set", "the folder cannot be read as a data set ({why})", "check its files"
)
HUB_SET = Wording(
    "hub-set",
    "could not download the data set from the Hugging Face hub: {error}: {why}",
    "check its name, its split and the network (HF_HUB_OFFLINE, proxy, HF_TOKEN for gated data "
    "sets), or download it and name the files",
)

# Lines, cells and JSON values.

LINE_TOO_LONG = Wording(
    "line-too-long",
    "the line has {size:.1f} MB; the limit is {limit} MiB",
    "split the conversation, or check for missing line endings",
)
ROW_TOO_LONG = Wording(
    "line-too-long", "the row is broken or larger than {limit} MiB", "split the conversation"
)
LINE_NOT_UTF8 = Wording(
    "not-utf8",
    "not UTF-8: byte 0x{byte:02x} at byte {at} of the line (byte {in_file} of the file)",
    "save the file as UTF-8",
)
CONTROL_BYTE = Wording(
    "control-character", "{name} at byte {at} of the line (byte {in_file} of the file)", "remove it"
)
CONTROL_CHARACTER = Wording(
    "control-character", "{place} holds {name} U+{code:04X} at character {at}", "remove it"
)
BROKEN_JSON = Wording(
    "broken-json",
    "broken JSON {where} ({why})",
    "write one whole JSON object on one line, with double quotes",
)
UNREADABLE_JSON = Wording(
    "broken-json", "unreadable JSON: {why}", 'write {{"messages": […]}} as plain JSON'
)
REPEATED_KEY = Wording(
    "repeated-key",
    "the key {key!r} occurs twice in one object",
    "keep one of them: JSON does not define which one counts",
)
NOT_A_NUMBER = Wording(
    "not-a-number", "{name} is not a JSON value", "write null or leave the key out"
)
NOT_AN_OBJECT = Wording(
    "not-an-object", "the line is {kind}, not an object", 'write {{"messages": […]}}'
)
TEXT_AFTER_ARRAY = Wording("broken-json", "there is text after the JSON array", "remove it")
BROKEN_ARRAY = Wording(
    "broken-json",
    "the JSON array is broken {where}; the rest was not read",
    "write rows with commas between them, and ] at the end",
)
BROKEN_WRAPPER = Wording(
    "broken-json", "the JSON object is broken after its list of rows", "close it with }}"
)
SECOND_LIST = Wording(
    "broken-json",
    "a second list of rows, under the key {key!r}",
    "keep each list in a file of its own",
)
BROKEN_CSV = Wording(
    "broken-csv",
    "broken CSV; the rest was not read ({why})",
    'put texts with {mark}, quotes or line breaks in quotes, and double each "',
)
WRONG_COLUMNS = Wording(
    "broken-csv",
    "the row has {has} columns, the header has {wanted}",
    "write a value, or nothing between commas, for each column",
)
REPEATED_COLUMN = Wording(
    "repeated-key",
    "the column {name!r} occurs twice",
    "keep one of them: it is undefined which one counts",
)

# What a row means: its format.

UNKNOWN_FORMAT = Wording(
    "unknown-format",
    "unknown format: {what}",
    'expected \'messages\' (a list of {{"role", "content"}}), a question and its answer '
    "('prompt' + 'completion', 'question' + 'answer', 'instruction' + 'output', 'input' + "
    "'output'), 'conversations', or 'chosen'",
)
CHOSEN_WITHOUT_QUESTION = Wording(
    "unknown-format",
    "unknown format: 'chosen' is a text and the row has no question",
    "add its 'prompt', or write 'chosen' as a list of messages",
)
KEY_TWICE = Wording(
    "two-formats",
    "the row has the key {key!r} twice, with different contents",
    "keep the right one",
)
TWO_CONVERSATIONS = Wording(
    "two-formats",
    "the row holds two conversations that differ, under {keys}",
    "keep the right one",
)
TWO_SYSTEMS = Wording(
    "two-formats",
    "the row holds two system messages that differ, under {keys}",
    "keep the right one",
)
SYSTEM_DIFFERS = Wording(
    "two-formats",
    "{key!r} differs from the system message of the conversation",
    "keep the right one",
)
CHOSEN_DIFFERS = Wording(
    "two-formats", "{key!r} and 'chosen' hold different conversations", "keep the right one"
)
SEVERAL_FORMATS = Wording(
    "two-formats", "the keys fit several formats: {keys} differ", "keep the right one"
)
PLAIN_TEXT = Wording(
    "rendered-text",
    "{key!r} is plain text: it does not say what is asked and what is answered",
    "write the conversation as 'messages'",
)
RENDERED_TEXT = Wording(
    "rendered-text",
    "{key!r} {why}",
    "write the conversation as 'messages' and let the model's template render it",
)
MEANING = Wording(
    "meaning",
    "{key!r} belongs to the conversation but is not in its messages",
    "write what the model should see into the messages, or remove the key",
)
FALSE_LABEL = Wording(
    "meaning", "'label' is false: it marks an answer that must not be learnt", "leave the row out"
)
FAILED_LINE = Wording(
    "failed-line",
    "{key} is {text!r}: the line of the batch run has no answer",
    "leave the row out",
)

# Messages: their types, roles, texts and weights.

WRONG_TYPE = Wording("wrong-type", "{place} is {kind}", "expected {expected}")
WRONG_ACCEPT = Wording(
    "wrong-type",
    "'accept' is not a list of texts",
    'write "accept": ["a text that a correct answer contains"]',
)
EMPTY_CONTENT = Wording("empty-content", "{place} is {how}", "write its text, or remove the {drop}")
NO_MESSAGES = Wording(
    "no-messages", "{key!r} is an empty list", "write at least a question and its answer"
)
NO_ROLE = Wording("missing-role", "{place} has no 'role'", "add one of {roles}")
NO_CONTENT = Wording("missing-content", "{place} has no {key!r}", "add the text of the message")
UNKNOWN_ROLE = Wording("unknown-role", "{place} has the unknown role {role!r}", "{fix}")
TOOLS = Wording(
    "tools",
    "{place} uses tools ({how})",
    "leave the row out, by hand or with: phi3 data fix FILE -o NEW",
)
NOT_TEXT_PART = Wording(
    "not-text",
    "{place} has a part of the kind {kind!r}",
    "the model reads text alone: leave the row out, or write the part as text",
)
WEIGHT = Wording(
    "weight",
    "{place} is {value}",
    "write 1 (learn this answer) or 0 (context only); shares are not supported",
)
WEIGHTS_DIFFER = Wording(
    "weight", "{place} has contradictory weights: {keys} differ", "keep the right one"
)
WEIGHT_OF_PARTS = Wording(
    "weight",
    "{place} marks parts of an answer as not learnt",
    'answers are learnt whole or not at all: remove the key, or write "weight": 0',
)
WEIGHT_OF_ROW = Wording(
    "weight",
    "the row has the weight {value}",
    "leave the row out, or repeat it; rows are learnt equally",
)
NOT_TO_LEARN = Wording(
    "weight", "the row has {key!r}: false, so it is not to be learnt", "leave the row out"
)
NOTHING_TO_LEARN = Wording(
    "nothing-to-learn",
    "every answer has the weight 0, so there is nothing to learn",
    "remove the row, or a weight",
)
ROLE_ORDER = Wording(
    "role-order",
    "wrong order of roles: {what}",
    "{fix}, or repair the file: phi3 data fix FILE -o NEW",
)

# Rows compared with others, and what a whole set lacks.

DUPLICATE = Wording(
    "duplicate",
    "the same conversation as {first}",
    "keep one of the two, or set data.duplicates=remove",
)
# Found by exactly equal questions, so it stops a run; NEAR_LEAK is a likeness, and a warning.
LEAK = Wording(
    "leak",
    "held out, but {first} trains on the same question in the same context",
    "remove it from one of the two sets: a score on trained questions means nothing",
)
NEAR_LEAK = Wording(
    "near-leak",
    "held out, but nearly the same as {first}, which is trained on",
    "remove it from one of the two sets",
)
NEAR_DUPLICATE = Wording(
    "near-duplicate",
    "nearly the same conversation as {first}",
    "keep one of the two, or set data.near_duplicates=remove",
)
# Never the value itself: reports are sent around, and kept for longer than the chats.
PERSONAL_DATA = Wording(
    "personal-data",
    "it seems to contain {name} ({masked})",
    "remove it, or replace it with a made-up one",
)
TOO_MANY_SKIPPED = Wording(
    "too-many-skipped", "{reason}", "correct them, or raise data.max_skipped"
)
NOTHING_TO_TRAIN = Wording(
    "too-few",
    "no conversation is left to train on",
    "correct its rows, or name another file",
)
NOTHING_TO_HOLD_OUT = Wording(
    "too-few",
    "all conversations ask the same question, so none can be held out",
    "add conversations, or name a file of held-out ones under data.validation",
)

# What a model's tokenizer and chat template say of a row.

UNWRITABLE = Wording(
    "unwritable",
    "the model's chat template or tokenizer refuses it: {why}",
    "change or remove the row, or set data.bad_rows=skip",
)
# `copy`: of a casual or reworded copy, which may be longer than its row.
TOO_LONG = Wording(
    "too-long",
    "it has {size} tokens{copy}, {name} is {limit}",
    "shorten it, {more}or set data.too_long=skip or cut",
)
