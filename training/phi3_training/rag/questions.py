"""Questions about documents, and which passages hold their answers.

Reads JSON lines. The same file serves `phi3 rag evaluate`, `make-chats` and `compare`: rows of the
split `train` are trained on, rows of the split `test` are asked.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phi3_tool.index import Hit

from ..errors import UsageError
from ..telling import Set, vocabulary

SPLITS = ("train", "test")
UNANSWERABLE = "unanswerable"
_KEYS = frozenset(
    ("id", "question", "answer", "source", "page", "heading", "answerable", "kind", "split")
)
# Of an answer's telling words: if there is nothing else, and next to a number or a name.
_WORDS_NEEDED, _WORDS_NEXT_TO = 2 / 3, 1 / 2


@dataclass(frozen=True)
class Question:
    """A question with what makes a passage right; `answerable` False: nothing should be found.

    `kind` is the user's own label, such as "paraphrased"; figures are also given for each kind.
    `split` is "train", "test", or empty where the file does not split.
    """

    line: int
    text: str
    answer: str = ""
    source: str | None = None
    page: int | None = None
    heading: str | None = None
    answerable: bool = True
    id: str = ""
    kind: str = ""
    split: str = ""

    @classmethod
    def of(cls, line: int, row: object) -> Question:
        """A row of the file; ValueError says what is wrong with it."""
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise ValueError("no text under `question`")  # noqa: TRY004 - one kind for a row
        # A misspelt key would be a question without its place, and every passage wrong for it.
        unknown = sorted(row.keys() - _KEYS)
        if unknown:
            raise ValueError(f"unknown key {', '.join(unknown)}; known: {', '.join(sorted(_KEYS))}")
        kind, split = str(row.get("kind") or ""), str(row.get("split") or "")
        if split and split not in SPLITS:
            raise ValueError(f"split {split!r} is neither train nor test")
        answerable = bool(row.get("answerable", kind != UNANSWERABLE))
        if answerable and not (row.get("source") or str(row.get("answer") or "").strip()):
            raise ValueError("neither `source` nor `answer` says what would be right")
        return cls(
            line=line,
            text=row["question"],
            answer=str(row.get("answer") or ""),
            source=row.get("source"),
            page=row.get("page"),
            heading=row.get("heading"),
            answerable=answerable,
            id=str(row.get("id") or ""),
            kind=kind,
            split=split,
        )

    def is_place_of(self, hit: Hit) -> bool:
        """Whether the passage lies where the question says."""
        return (
            hit.source == self.source
            and self.page in (None, hit.page)
            and (self.heading is None or self.heading in hit.heading)
        )


def read_questions(path: Path) -> list[Question]:
    """The questions of a file. Raises UsageError with every fault and its line."""
    questions: list[Question] = []
    faults: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); expected UTF-8 JSON lines") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            questions.append(Question.of(number, json.loads(line)))
        except ValueError as error:
            what = "not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            faults.append(f"  {path.name}:{number}: {what}")
    if faults:
        raise UsageError(
            f"{path} has {len(faults)} faults:\n" + "\n".join(faults) + "\nExpected rows like "
            '{"question": "…", "answer": "…", "source": "tents.md"}, or {"question": "…", '
            '"answerable": false}'
        )
    if not questions:
        raise UsageError(f"{path} has no questions")
    return questions


def of_split(questions: Sequence[Question], split: str) -> list[Question]:
    """The questions of a split; all of them where the file does not split."""
    # A file without splits is both: what is trained on is asked, and `compare` leaves it out.
    if not any(question.split for question in questions):
        return list(questions)
    return [question for question in questions if question.split == split]


def answers_of(questions: Sequence[Question]) -> Set:
    """What the answers share (greetings, a voice), which `tells` then does not look for."""
    known = [question for question in questions if question.answer]
    return Set.of([q.answer for q in known], [q.text for q in known])


def right_ids_of(questions: Sequence[Question], passages: Sequence[Hit]) -> list[set[int]]:
    """The passages at each question's place; of one without a place those with its answer."""
    # Grouped once: a question then looks at its own document's passages alone.
    by_source: defaultdict[str, list[Hit]] = defaultdict(list)
    for hit in passages:
        by_source[hit.source].append(hit)
    # Normalised once for all questions, not for each of them.
    texts = [(hit.id, _plain(hit.text)) for hit in passages]
    right: list[set[int]] = []
    for question in questions:
        if question.source is None:
            answer = _plain(question.answer)
            # The plain search first: a set of 10,000 passages takes seconds with it alone.
            right.append({n for n, text in texts if answer in text and holds(text, answer)})
        else:
            there = by_source[question.source]
            right.append({hit.id for hit in there if question.is_place_of(hit)})
    return right


def holds(text: str, answer: str) -> bool:
    """Whether a text has the answer in it as whole words, whatever its case and line ends.

    "5 dollars" is in neither "15 dollars" nor "1.5 dollars".
    """
    return (
        re.search(rf"(?<!\w)(?<!\d[.,]){re.escape(_plain(answer))}(?!\w)", _plain(text)) is not None
    )


def tells(hit: Hit, question: Question, among: Set) -> bool:
    """Whether a passage has the answer, or at least its numbers, names and telling words."""
    if not question.answer:
        return False
    text = f"{hit.heading}\n{hit.text}"
    telling = among.telling(question.answer, question.text)
    if not telling or holds(text, question.answer):
        return holds(text, question.answer)
    have = vocabulary(text)
    shared, wanted = len(telling.words & have), len(telling.words)
    needed = _WORDS_NEXT_TO if telling.values or telling.names else _WORDS_NEEDED
    return telling.names <= have and set(telling.values) <= have and shared >= needed * wanted


def right_passages(question: Question, passages: Sequence[Hit], among: Set) -> list[Hit]:
    """The passages that a right answer may cite.

    Those at the question's place that hold its answer; where none does, all at that place.
    """
    if not question.answerable:
        return []
    if question.source is None:
        return [hit for hit in passages if tells(hit, question, among)]
    there = [hit for hit in passages if question.is_place_of(hit)]
    # Where no passage at the place holds the answer, the place counts: the answer may be split
    # between two.
    return [hit for hit in there if tells(hit, question, among)] or there


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
