"""Which chats teach what another one asks: the same answer, or one that tells the same.

Works on questions and answers alone; used where a set is small enough to compare.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from ..telling import Set, has_expected_words, names_in

MOST_COMPARED = 5000  # chats of a set; that many of 50 words take some 5 seconds
MOST_CANDIDATES = 50  # of one chat; a set where more share a rare word is compared with these


class Chat(NamedTuple):
    """All that was said before the last answer, its last question, and that answer."""

    before: str
    question: str
    answer: str


def teachers(asked: Sequence[Chat], taught: Sequence[Chat]) -> list[list[int]]:
    """For each chat of `asked` the chats of `taught` that teach its answer, itself aside.

    One does where its own answer would count as right for the question, and it speaks of what the
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
    found: list[list[int]] = []
    for place, chat in enumerate(asked):
        known = {
            word: counts[word] for word in among.subject(chat.question) if counts[word] > itself
        }
        rarest = {word for word, count in known.items() if count == min(known.values())}
        if not names_in(chat.question) <= known.keys() | among.asked_common:
            found.append([])  # asks about something that no other chat speaks of
            continue
        lists = sorted(
            (by_word.get(word, []) for word in among.telling(chat.answer, chat.before).all), key=len
        )
        # The rarest word may be among those that an answer need not have.
        near = [number for numbers in lists[:2] for number in numbers[:MOST_CANDIDATES]]
        candidates = {*near, *by_answer[chat.answer][:MOST_CANDIDATES]}
        found.append(
            sorted(
                number
                for number in candidates - ({place} if itself else set())
                if (not rarest or rarest & subjects[number])
                and has_expected_words(taught[number].answer, chat.answer, chat.before, among)
            )
        )
    return found
