"""`phi3 rag make-chats`: training rows from an index of documents, without another model.

Two kinds of rows. `passages`: the prompt that a question gets when it is answered from documents,
made by the same function, with the answer and its citation; in a share of them the passages that
hold the answer are withheld and the answer is NOT_IN_DOCUMENTS (RAFT, arXiv 2403.10131).
`plain`: the question alone with the answer. Questions come from templates and from the user.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from phi3_tool.grounding import NOT_IN_DOCUMENTS, grounded, grounded_question
from phi3_tool.index import DocumentIndex, Embedder, Hit, hits_of

from ..errors import UsageError
from ..progress import Progress
from ..telling import Set
from .questions import Question, answers_of, of_split, right_passages, tells
from .templates import Templates

Kind = Literal["passages", "withheld", "plain"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SHUFFLED = 0.5  # of the prompts: else the best hit is nearly always [1], and [1] is what is learnt
# Prompts of a user's own question: they are few, and nearer to what will be asked than templates.
_OWN_PROMPTS = 2


@dataclass(frozen=True)
class Chat:
    """A row: `prompt_id` says its kind, and where its question is from."""

    prompt_id: str
    prompt: str
    answer: str
    kind: Kind

    def as_row(self) -> dict[str, object]:
        """As `phi3 data` reads it."""
        messages = [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.answer},
        ]
        return {"prompt_id": self.prompt_id, "messages": messages}


@dataclass(frozen=True)
class Making:
    """How rows are made. `per_passage` bounds the templates' questions, `withheld` is a share."""

    top_k: int = 4
    per_passage: int = 2
    withheld: float = 0.2
    with_plain: bool = True
    with_passages: bool = True
    seed: int = 42


@dataclass(frozen=True)
class _Known:
    """A question with its right passages; the best to cite is the first."""

    question: Question
    right: list[Hit]
    name: str


def make_chats(
    index: DocumentIndex,
    embedder: Embedder | None,
    questions: Sequence[Question],
    making: Making,
    progress: Progress,
) -> list[Chat]:
    """The rows, in random order; the same for the same index, questions and seed.

    Of `questions` those of the split `test` are left out. Raises UsageError where nothing can be
    asked about the documents.
    """
    passages = index.passages()
    # One stream for all choices: the same seed gives the same file, byte for byte.
    chance = random.Random(making.seed)  # noqa: S311 - chooses rows, guards nothing
    own = of_split(questions, "train")
    reserved = {_key(q.text) for q in questions if q.split == "test"}
    among = answers_of(own)
    known = [
        _Known(question, right_passages(question, passages, among), f"question-{question.line}")
        for question in own
        if question.answer or not question.answerable
    ]
    templates = Templates(passages)
    for hit in passages:
        for number, pair in enumerate(templates.pairs(hit, chance, making.per_passage), 1):
            question = Question(0, pair.question, pair.answer, kind=pair.kind)
            known.append(_Known(question, [hit], f"{pair.kind}-{hit.id}-{number}"))
    # Two rows with the same question and other answers would teach neither.
    first = {_key(each.question.text): each for each in reversed(known)}
    known = [each for key, each in reversed(first.items()) if key not in reserved]
    if not any(each.right for each in known):
        raise UsageError(
            "No question could be made from these documents: they need sentences or tables under "
            "headings. Give your own with --questions FILE"
        )
    answerable = [each for each in known if each.right]
    # A share of the questions, drawn once: a question is either answered or refused.
    share = round(making.withheld * len(answerable))
    withheld = {id(each) for each in chance.sample(answerable, share)}
    chats: list[Chat] = []
    for done, each in enumerate(known):
        progress(done, len(known), "looking the questions up")
        if making.with_passages:
            # Twice as many as are shown: where the right ones are withheld, others take their
            # places.
            hits = index.search(each.question.text, top_k=2 * making.top_k, embedder=embedder)
            chats += _with_passages(each, hits, id(each) in withheld, among, making.top_k, chance)
        if making.with_plain and each.question.answerable:
            name = f"plain-{each.name}"
            chats.append(Chat(name, each.question.text, each.question.answer, "plain"))
    chance.shuffle(chats)
    return chats


def write_chats(chats: Sequence[Chat], path: Path) -> dict[Kind, int]:
    """Write the rows as JSON lines; how many there are of each kind."""
    lines = [json.dumps(chat.as_row(), ensure_ascii=False) for chat in chats]
    # A training that starts meanwhile reads the old file or the new one.
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text("\n".join([*lines, ""]), encoding="utf-8")
    scratch.replace(path)
    return {kind: sum(chat.kind == kind for chat in chats) for kind in KINDS}


def _with_passages(
    known: _Known,
    hits: Sequence[Hit],
    withheld: bool,
    among: Set,
    top_k: int,
    chance: random.Random,
) -> Iterator[Chat]:
    """The rows with passages; none where all that was found scores too little to be shown."""
    question, right = known.question, {hit.id for hit in known.right}
    shown = hits_of(grounded(question.text, [hit.as_lookup() for hit in hits])["passages"])
    if withheld:
        shown = [hit for hit in shown if hit.id not in right and not tells(hit, question, among)]
    shown = shown[:top_k]
    if right and not withheld and not any(hit.id in right for hit in shown):
        shown = [*shown[: top_k - 1], known.right[0]]  # the search missed it; the row must not
    if not shown:
        return
    cited = None if withheld else next((hit for hit in shown if hit.id in right), None)
    kind: Kind = "withheld" if cited is None else "passages"
    orders: list[list[Hit]] = []
    for copy in range(_OWN_PROMPTS if question.line else 1):
        if copy or chance.random() < _SHUFFLED:
            chance.shuffle(shown)
        if shown in orders:
            shown.reverse()
        if shown in orders:
            return  # a single passage
        orders.append([*shown])
        answer = f"{question.answer} [{shown.index(cited) + 1}]" if cited else NOT_IN_DOCUMENTS
        prompt = grounded_question(question.text, shown)
        yield Chat(f"{kind}-{known.name}-{copy + 1}", prompt, answer, kind)


def _key(text: str) -> str:
    return " ".join(text.casefold().split())
