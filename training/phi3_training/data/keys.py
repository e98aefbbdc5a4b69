"""The numbers that compare conversations: equal for the same messages, or for the same question.

64 bits each: of 40 million sets of a million rows, one has two different rows that fall together.
"""

from __future__ import annotations

from typing import NamedTuple

import xxhash

_QUESTION = 2


class Keys(NamedTuple):
    """`identity`: exactly these messages. `question`: the same last question in the same context.

    Case, spacing and closing marks of the question do not count: a model that was trained on
    "who wrote hamlet" has seen "Who wrote Hamlet?". `system` is the size of the system
    message in front.
    """

    identity: int
    question: int
    system: int


def keys_of(joined: bytes, question_text: str, has_system: bool) -> Keys:
    """The keys of a checked conversation: its texts with a NUL between, and the last question.

    Its roles follow from `has_system`.
    """
    answer = joined.rfind(b"\0")
    question = joined.rfind(b"\0", 0, answer) + 1
    asked = " ".join(question_text.casefold().split()).rstrip("?.! ").encode()
    return Keys(
        xxhash.xxh3_64_intdigest(joined, has_system),
        xxhash.xxh3_64_intdigest(joined[:question] + asked, _QUESTION + has_system),
        joined.find(b"\0") + 1 if has_system else 0,
    )
