"""Questions and answers from passages by templates: headings, tables, sentences. No model is asked.

Every answer is copied from the passage: a sentence, the end of one, or the cell of a table. What a
small model learns from them is to find the place and to copy it. English.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from phi3_tool.index import Hit

from ..telling import NUMBERS, Set

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"“(])")
_TABLE_LINE = re.compile(r"^\s*\|.*\|\s*$")
_TABLE_RULE = re.compile(r"^[\s|:-]+$")
_LIST_MARK = re.compile(r"^\s*(?:[-*+•]|\d+[.)])\s+")
_MARKS = re.compile(r"[*_`]{1,3}(?=\S)|(?<=\S)[*_`]{1,3}")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# A subject of up to four words, then what is said of it.
_DOES = re.compile(
    r"^((?:An? |The |Our )?(?:[\w'’-]+ ){0,3}[\w'’-]+) "
    r"(cost|weigh|need|hold|contain|last)(s?) (.+)$"
)
_IS = re.compile(r"^((?:The|Our) (?:[\w'’-]+ ){0,3}[\w'’-]+?) (is|are) (?!not\b)(.+)$")
_COUNTED = re.compile(r"\b(\d[\d.,]*\d|\d|" + "|".join(NUMBERS) + r") ([a-z]{3,})\b", re.IGNORECASE)
_PRONOUNS = frozenset(re.findall(r"\w+", "it its they them this that these those he she we both"))
_CLAUSES = frozenset(("who", "which", "that", "whose"))
_PLAIN = Set()
_SHORTEST, _LONGEST = 4, 40  # words of a sentence worth an answer
_KEYWORDS = 4  # of a question made of words
_MANY_CELLS = 24  # of one table; a price list would drown the sentences otherwise


class Pair(NamedTuple):
    """A question and the answer that the passage gives.

    `kind`: heading, table, sentence (its end is the answer), number, words (of a sentence).
    """

    question: str
    answer: str
    kind: str


def sentences(text: str) -> list[str]:
    """The sentences of a passage without its tables, headings and list marks."""
    usable: list[str] = []
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*+•]|\d+[.)])\s)", text):
        lines = [line for line in block.splitlines() if not _TABLE_LINE.match(line)]
        plain = _MARKS.sub("", _LIST_MARK.sub("", " ".join(" ".join(lines).split())))
        for sentence in _SENTENCE_END.split(plain):
            words = sentence.split()
            # "It is free." says nothing away from its place.
            shortest = 2 * _SHORTEST if words and words[0].lower() in _PRONOUNS else _SHORTEST
            if shortest <= len(words) <= _LONGEST and sentence[-1] in ".!":
                usable.append(sentence)
    return usable


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and rows of each Markdown table that is whole in the passage."""
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if _TABLE_LINE.match(line):
            lines.append(line)
            continue
        if len(lines) > 2 and _TABLE_RULE.match(lines[1]):
            cells = (line.strip().strip("|").split("|") for line in lines)
            header, *rows = ([_MARKS.sub("", " ".join(c.split())) for c in row] for row in cells)
            yield header, [row for row in rows[1:] if len(row) == len(header)]
        lines = []


class Templates:
    """Makes the pairs of passages; knows which words are rare in all of them."""

    def __init__(self, passages: Sequence[Hit]) -> None:
        self._counts = Counter(
            word for hit in passages for word in {w.lower() for w in _WORD.findall(hit.text)}
        )

    def pairs(self, hit: Hit, chance: random.Random, most: int) -> list[Pair]:
        """At most `most` pairs of a passage, of every kind that it has, in random order."""
        by_kind: dict[str, list[Pair]] = {}
        for pair in (*_of_heading(hit), *_of_tables(hit, chance), *self._of_sentences(hit)):
            by_kind.setdefault(pair.kind, []).append(pair)
        kinds = list(by_kind.values())
        chance.shuffle(kinds)
        for pairs in kinds:
            chance.shuffle(pairs)
        # In turns: a passage with a long table would have questions on its cells alone.
        chosen: list[Pair] = []
        while len(chosen) < most and any(kinds):
            chosen += [pairs.pop() for pairs in kinds if pairs]
        return chosen[:most]

    def _of_sentences(self, hit: Hit) -> Iterator[Pair]:
        subject = hit.heading.split(" | ")[-1].strip()
        for sentence in sentences(hit.text):
            yield from _of_verbs(sentence)
            # The words that few passages have, in the order of the sentence; no numbers.
            words = dict.fromkeys(w for w in _WORD.findall(sentence) if not re.search(r"\d", w))
            telling = [word for word in words if len(word) > 2 and _PLAIN.subject(word)]
            rarest = sorted(telling, key=lambda w: (self._counts[w.lower()], -len(w), w))
            asked = [word for word in telling if word in rarest[:_KEYWORDS]]
            about = f"{subject}: " if subject and not subject.endswith("?") else ""
            counted = _COUNTED.findall(sentence)
            if len(counted) == 1 and len(asked) > 1:
                ((number, unit),) = counted
                others = " ".join(word for word in asked if word.lower() not in (unit, number))
                how = "how many" if about else "How many"
                yield Pair(f"{about}{how} {unit}, {others}?", f"{number} {unit}", "number")
            elif len(asked) > 1:
                yield Pair(f"{about}{' '.join(asked)}?", sentence, "words")


def _of_heading(hit: Hit) -> Iterator[Pair]:
    heading = hit.heading.split(" | ")[-1].strip()
    lines = sentences(hit.text)
    if not heading or not lines:
        return
    if heading.endswith("?"):  # a page of questions and answers has the question as heading
        yield Pair(heading, lines[0], "heading")
    elif lines[0].split()[0].lower().strip(",") not in _PRONOUNS:
        yield Pair(f'What do you say under "{heading}"?', lines[0], "heading")


def _of_verbs(sentence: str) -> Iterator[Pair]:
    does, is_ = _DOES.match(sentence), _IS.match(sentence)
    match = does or is_
    if match is None or {word.lower() for word in match[1].split()} & (_PRONOUNS | _CLAUSES):
        return
    subject = _inside(match[1])
    if does:
        helper = "does" if does[3] else "do"
        yield Pair(f"What {helper} {subject} {does[2]}?", _clause(does[4]), "sentence")
    else:
        yield Pair(f"What {match[2]} {subject}?", _clause(match[3]), "sentence")


def _clause(text: str) -> str:
    """The end of a sentence up to where another clause starts."""
    return re.split(r"[;:]|, (?:and|but|or|so|which|who|because)\b", text.rstrip(".!"))[0].strip()


def _of_tables(hit: Hit, chance: random.Random) -> list[Pair]:
    pairs = []
    for header, rows in tables(hit.text):
        for row in rows:
            for column, value in zip(header[1:], row[1:], strict=True):
                # A question about an empty cell would teach an empty answer.
                if not (row[0] and column and value):
                    continue
                about = _inside(column)
                question = f"{row[0]}: {about}?"
                if len(about.split()) == 1 and chance.random() < 0.5:
                    question = f"What is the {about} of {row[0]}?"
                pairs.append(Pair(question, value, "table"))
    # A sample, not the first ones: those are all of the table's first rows.
    return chance.sample(pairs, min(len(pairs), _MANY_CELLS))


def _inside(text: str) -> str:
    """The text inside a sentence: an article or a lone first word loses its capital."""
    first = text.split(" ", 1)[0]
    lone = first[1:].islower() and first in ("A", "An", "The", "Our")
    common = first[1:].islower() and " " in text and not text.split(" ", 1)[1][:1].isupper()
    return text[0].lower() + text[1:] if lone or common or len(text.split()) == 1 else text
