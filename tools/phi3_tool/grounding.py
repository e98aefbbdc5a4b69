"""Answers from documents: the standalone question, the prompt with its passages, the citations.

Shared by the flow `phi3_rag_chat`, `phi3 chat --rag` and `phi3 rag`: all of them
send the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from .embedders import embedder_of
from .index import Hit, LookupResult, hits_of, index_path, open_index
from .wire import SOURCES, read_turns, required_question

#: The whole answer where nothing fits, and what the prompt asks the model to say then.
NOT_IN_DOCUMENTS = "That is not in the documents."
#: Passages that score less are not shown to the model.
#: Measured on 1,190 questions about 240 paragraphs: 99 % of the best passages score above 0.42;
#: questions on things that the documents lack found 0.17 to 0.34.
MIN_SCORE = 0.35
#: The same for an index without vectors: there 99 % of the best passages score above 0.17.
MIN_WORDS_SCORE = 0.15

_INSTRUCTION = (
    "Answer the question from the passages below and cite them like [1]. "
    f'If they do not hold the answer, say "{NOT_IN_DOCUMENTS}"'
)
_ASKED = "Question: "
# What chat templates use as borders: Phi-3's and ChatML's <|…|>, Llama's <s>, [INST] and <<SYS>>.
_CONTROL = re.compile(r"<(?=\|[^|<>\s]{1,40}\|>|/?s>|<SYS>>|</SYS>>)|\[(?=/?INST\])")
_CITED = re.compile(r"\[(\d{1,2})\]")
# Words that lean on what was said before.
_LEANING = re.compile(
    r"\b(it|its|they|them|their|he|she|him|her|his|that|this|those|these|one|ones|there|then|same|"
    r"else|also|instead)\b",
    re.IGNORECASE,
)
_CONTINUED = re.compile(r"^\W*(and|but|or|so|what about|how about|why|when|where)\b", re.IGNORECASE)
_SHORT_WORDS = 3


class Grounded(TypedDict):
    """The message for the model, and the passages in it."""

    text: str
    passages: list[LookupResult]


class Citation(TypedDict):
    """What a `[n]` points to; `exists` is False for a number that no passage had."""

    number: int
    exists: bool
    source: str | None
    page: int | None
    heading: str | None
    text: str | None


def as_text(text: str) -> str:
    """Text of a document, with the borders that chat templates use broken up.

    A passage is not written by the user: `<|end|><|system|>` in it must not end the turn. A
    server that tokenizes the prompt as one text would read it so; a space after the first
    character keeps it readable and makes it ordinary text.
    """
    return _CONTROL.sub(lambda match: match.group() + " ", text)


def standalone_question(
    question: str | None, chat_history: Sequence[Mapping[str, Any]] | None
) -> tuple[str, str]:
    """What to look up for a question inside a conversation, and how it was made.

    A question that leans on what was said ("and how heavy is it?") is looked up together with the
    question before it: no model is asked. The second value is "question", or
    "previous question + question".
    """
    question = required_question(question)
    turns = read_turns(chat_history)
    words = re.findall(r"\w+", question)
    leans = (
        len(words) <= _SHORT_WORDS
        or _LEANING.search(question) is not None
        or (_CONTINUED.search(question) is not None and len(words) <= 2 * _SHORT_WORDS)
    )
    if not turns or not leans:
        return question, "question"
    return f"{turns[-1][0].strip()} {question}", "previous question + question"


def look_up(
    queries: str, index: str, folder: Path, *, query_type: str = "hybrid", top_k: int = 4
) -> list[LookupResult]:
    """The passages for a question as `{text, score, metadata}`, best first.

    `index` names the file, else $PHI3_INDEX, else the one in `folder` (`index_path`). Raises as
    `DocumentIndex.search` does.
    """
    opened = open_index(index_path(index, folder))
    embedder = None if query_type == "keyword" else embedder_of(opened.facts(), opened.path)
    hits = opened.search(queries, top_k=top_k, query_type=query_type, embedder=embedder)
    return [hit.as_lookup() for hit in hits]


def grounded(
    question: str, passages: Sequence[Mapping[str, Any]], min_score: float = 0.0
) -> Grounded:
    """The message for the model, and the passages in it, numbered from 1 by their order.

    `text` is empty where no passage scores `min_score`: then the model is not asked. 0 takes
    MIN_SCORE, or MIN_WORDS_SCORE where the index has no vectors.
    """
    every = hits_of(passages)
    by_words = any(hit.cosine is None for hit in every)
    least = min_score or (MIN_WORDS_SCORE if by_words else MIN_SCORE)
    hits = [hit for hit in every if hit.score >= least]
    shown = [hit.as_lookup() for hit in hits]
    return {"text": grounded_question(question, hits) if hits else "", "passages": shown}


def grounded_question(question: str, hits: Sequence[Hit]) -> str:
    """The user message: instruction, numbered passages, question."""
    passages = [
        f"[{number}] {as_text(hit.heading + ': ' if hit.heading else '')}{as_text(hit.text)}"
        for number, hit in enumerate(hits, 1)
    ]
    return "\n\n".join([_INSTRUCTION, *passages, f"{_ASKED}{question}"])


def question_in(message: str) -> str:
    """The question of a message that `grounded_question` made; any other message as it is."""
    if not message.startswith(_INSTRUCTION):
        return message
    return message.rpartition(f"\n\n{_ASKED}")[2]


def citations(answer: str, hits: Sequence[Hit]) -> list[Citation]:
    """What the answer's `[n]` point to, in the order of their first use."""
    numbers = list(dict.fromkeys(int(text) for text in _CITED.findall(answer)))
    listed: list[Citation] = []
    for number in numbers:
        hit = hits[number - 1] if 1 <= number <= len(hits) else None
        listed.append(
            {
                "number": number,
                "exists": hit is not None,
                "source": hit.source if hit else None,
                "page": hit.page if hit else None,
                "heading": hit.heading if hit else None,
                "text": hit.text if hit else None,
            }
        )
    return listed


def sources_note(answer: str, hits: Sequence[Hit]) -> str:
    """The lines under an answer that say where its citations point; empty without any.

    `wire.to_messages` takes them off again, so the model never sees them.
    """
    shown = [
        f"[{cited['number']}] {hits[cited['number'] - 1].place}"
        for cited in citations(answer, hits)
        if cited["exists"]
    ]
    return SOURCES + "\n".join(shown) if shown else ""


def with_sources(pieces: Iterator[str], hits: Sequence[Hit]) -> Iterator[str]:
    """A streamed answer, and after its last piece the sources that it cites."""
    answer = ""
    for piece in pieces:
        answer += piece
        yield piece
    note = sources_note(answer, hits)
    if note:
        yield note
