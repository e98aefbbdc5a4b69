"""Why a model was not good enough: chats that are missing, or chats that were not learnt.

Reads the evaluated rows and run/data/train.jsonl; writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..data.facts import MOST_COMPARED, Chat, teachers
from ..run import Run
from ..telling import vocabulary
from .figures import Row
from .questions import Question, read_chats
from .rows import asked_in

_LEARNT = 0.9  # of the trained questions: with fewer right, more training comes first
_SHOWN = 6


def remarks(rows: Sequence[Row], run: Run) -> list[str]:
    """What stands in the way of the held-out questions, and what to add or to change."""
    trained = read_chats(run, "train")[:MOST_COMPARED]
    return [*_not_taught(rows, trained), *_not_learnt(rows)]


def _not_taught(rows: Sequence[Row], trained: Sequence[Question]) -> list[str]:
    asked = [row for row in rows if row["part"] == "validation" and row["expected"]]
    found = teachers([_of_row(row) for row in asked], [_of_question(one) for one in trained])
    answers = [vocabulary(one.expected) for one in trained]
    new = [
        row
        for row, known in zip(asked, found, strict=True)
        if not known and not _spoken_of(row, answers)
    ]
    if not new or not trained:
        return []
    wrong = [row for row in new if not row["after_right"]] or new
    words = [word for row in wrong for word in row.get("telling", ())[:2]]
    shown = ", ".join(repr(word) for word in list(dict.fromkeys(words))[:_SHOWN])
    named = [row["origin"] for row in wrong if row.get("origin")][:_SHOWN]
    places = f"; they are {', '.join(named)}" if named else ""
    more = ", …" if len(wrong) > len(named) and named else ""
    return [
        f"{len(new)} of {len(asked)} held-out questions ask for something that no training chat "
        f"answers{f' (the words {shown})' if shown else ''}{places}{more}. Tuning cannot teach "
        "these: add chats with the same facts in other words to data.train, or hold back "
        "rewordings of trained facts (data.validation=[] chooses them where there are some)."
    ]


def _spoken_of(row: Row, answers: Sequence[frozenset[str]]) -> bool:
    """Whether one training answer has the figures of what is expected, or most of its words.

    Less than teaching it: an answer that says more, or the same in other words, is not missing.
    """
    told = set(row.get("telling", ()))
    figures = {word for word in told if any(sign.isdigit() for sign in word)}
    if figures:
        return any(figures <= words for words in answers)
    return bool(told) and any(2 * len(told & words) >= len(told) for words in answers)


def _not_learnt(rows: Sequence[Row]) -> list[str]:
    trained = [row for row in rows if row["part"] == "train" and row["after_right"] is not None]
    if not trained:
        return []
    share = sum(row["after_right"] for row in trained) / len(trained)
    if share >= _LEARNT:
        return []
    return [
        f"The trained questions themselves are only {share:.0%} right: train longer "
        "(finetune.max_steps where it is set, else finetune.num_train_epochs), with a higher "
        "finetune.learning_rate or finetune.lora_r, or take a larger model (model.name_or_path)."
    ]


def _of_row(row: Row) -> Chat:
    turns = [*row["earlier_turns"], {"role": "user", "content": row["question"]}]
    return Chat(asked_in(turns), row["question"], row["expected"])


def _of_question(one: Question) -> Chat:
    return Chat(asked_in(one.prompt), one.prompt[-1]["content"], one.expected)
