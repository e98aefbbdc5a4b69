"""How the answers of the arms are scored: right words, citations, support, refusals, cost.

Right answers are counted by the rows and the paired bootstrap of `phi3 evaluate`. Works on
questions, passages and answers; reads and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TypedDict

from phi3_tool.grounding import NOT_IN_DOCUMENTS, citations
from phi3_tool.index import Hit

from ..evaluate.figures import compare, metrics_for, seed_of
from ..evaluate.metrics import refuses
from ..evaluate.questions import Question as Scored
from ..evaluate.rows import Answered, Row, Said, make_rows
from ..manifests import Comparison, Resampling
from ..telling import Set, vocabulary
from .arms import ARMS, Prompt
from .asking import Replies, Reply
from .questions import Question, tells
from .recommend import Change

_CITATION = re.compile(r"\s*\[\d{1,2}\]")
# Its core, whatever a model writes around it.
_DECLINED = NOT_IN_DOCUMENTS.rstrip(".").casefold().removeprefix("that is ")
_NOTHING = Set()
# In both directions where a rule asks for either (see recommend.RULES).
_PAIRS = (("rag", "base"), ("tuned", "base"), ("both", "base"), ("tuned", "rag"), ("rag", "tuned"),
          ("both", "rag"), ("both", "tuned"))  # fmt: skip


@dataclass(frozen=True)
class Cited:
    """Citations of an arm's answers: shares, None where there is nothing to share.

    `answers` with at least one, among those that do not decline; `exist` among all citations;
    `hold` the answer, among the citations of right answers; `support`: words, names and numbers of
    an answer that are in what it cites.
    """

    answers: float | None
    exist: float | None
    hold: float | None
    support: float | None

    @classmethod
    def of(cls, details: Sequence[ScoredAnswer], prompts: Sequence[Prompt]) -> Cited:
        """From an arm's scored answers and the prompts that they answer."""
        given = [(d, p) for d, p in zip(details, prompts, strict=True) if not d["declined"]]
        every = [cited for d, _ in given for cited in d["citations"]]
        of_right = [cited for d, _ in given if d["right"] for cited in d["citations"]]
        return cls(
            answers=_share([bool(d["citations"]) for d, _ in given]),
            exist=_share([cited["place"] is not None for cited in every]),
            hold=_share([cited["holds"] for cited in of_right]),
            support=_share([support(d["answer"], p.hits) for d, p in given if d["citations"]]),
        )


@dataclass(frozen=True)
class ArmFigures:
    """An arm: metrics as `phi3 evaluate` names them, each compared with the base model.

    Seconds and tokens are means for a question that the model was asked. `refused` is of the
    unanswerable questions (None: there are none, or the arm is not asked them), `declined` of the
    others. `kinds`: the share of right answers for each kind of question.
    """

    label: str
    metrics: Mapping[str, Comparison]
    kinds: Mapping[str, float]
    refused: float | None
    declined: float
    seconds: float
    prompt_tokens: float
    answer_tokens: float
    not_asked: int
    cited: Cited | None = None

    @property
    def right(self) -> float:
        """Share of the answers that have the expected words."""
        return self.metrics["contains"].after


@dataclass(frozen=True)
class ArmAnswers:
    """The prompts and replies of an arm; those of unanswerable questions apart."""

    prompts: Sequence[Prompt]
    replies: Replies
    unanswerable: Sequence[Reply] = field(default=())


class CheckedCitation(TypedDict):
    """A citation; `place` is None where it points to no passage."""

    number: int
    place: str | None
    holds: bool  # the expected answer


class ScoredAnswer(TypedDict):
    """An arm's answer to a question, for the report."""

    answer: str
    right: bool
    token_f1: float
    declined: bool
    citations: list[CheckedCitation]


def without_citations(answer: str) -> str:
    """The answer as it is scored: `[1]` is not one of its numbers."""
    return _CITATION.sub("", answer).strip()


def declines(answer: str) -> bool:
    """Whether an answer says that the documents do not have it, or refuses otherwise."""
    return _DECLINED in answer.casefold() or refuses(answer)


def rows_of(
    questions: Sequence[Question], before: Sequence[Reply], after: Sequence[Reply]
) -> list[Row]:
    """The rows of `phi3 evaluate` for two arms' answers to the same questions."""
    asked = [
        Scored("validation", q.line, [{"role": "user", "content": q.text}], q.answer)
        for q in questions
    ]
    return make_rows(asked, _answered(before), _answered(after))


def _answered(replies: Sequence[Reply]) -> list[Answered]:
    return [Answered(Said(without_citations(reply.text), reply.cut), None) for reply in replies]


def compared(
    rows: Sequence[Row], name: str, settings: Resampling, only: Collection[str] = ()
) -> dict[str, Comparison]:
    """Each metric of two arms (those of `only`, if given), with paired bootstrap intervals."""
    return compare(
        rows,
        [metric for metric in metrics_for(rows) if not only or metric.name in only],
        confidence=settings.confidence,
        resamples=settings.resamples,
        seed=seed_of(name, settings.seed),
    )


def differences(
    questions: Sequence[Question], answers: Mapping[str, ArmAnswers], settings: Resampling
) -> dict[str, dict[tuple[str, str], Change]]:
    """What the recommendation looks at: `facts` and `voice` of each pair of arms."""
    changes: dict[str, dict[tuple[str, str], Change]] = {"facts": {}, "voice": {}}
    for arm, other in _PAIRS:
        pair = (answers[name].replies.replies for name in (other, arm))
        rows = rows_of(questions, *pair)
        result = compared(rows, "validation", settings, _LOOKED_AT)
        for metric, kind in _LOOKED_AT.items():
            c = result[metric]
            changes[kind][arm, other] = Change(c.change, c.low, c.high)
    return changes


_LOOKED_AT = {"contains": "facts", "token_f1": "voice"}


def arm_figures(
    name: str,
    questions: Sequence[Question],
    answers: Mapping[str, ArmAnswers],
    right_ids: Sequence[Collection[int]],
    among: Set,
    settings: Resampling,
) -> tuple[ArmFigures, list[ScoredAnswer]]:
    """The figures of an arm, and for each question its answer with scores, for the report."""
    arm, own = ARMS[name], answers[name]  # type: ignore[index]
    replies = own.replies.replies
    rows = rows_of(questions, answers["base"].replies.replies, replies)
    details: list[ScoredAnswer] = []
    for question, prompt, reply, row, ids in zip(
        questions, own.prompts, replies, rows, right_ids, strict=True
    ):
        checked: list[CheckedCitation] = []
        for cited in citations(reply.text, prompt.hits):
            hit = prompt.hits[cited["number"] - 1] if cited["exists"] else None
            # A passage that nobody named may hold the answer as well.
            holds = hit is not None and (hit.id in ids or tells(hit, question, among))
            place = None if hit is None else hit.place
            checked.append({"number": cited["number"], "place": place, "holds": holds})
        details.append(
            {
                "answer": reply.text,
                "right": bool(row["after_right"]),
                "token_f1": row["after_scores"]["token_f1"],
                "declined": declines(reply.text),
                "citations": checked,
            }
        )
    asked = [reply for reply in replies if reply.asked]
    kinds = {
        kind: fmean(d["right"] for d, q in zip(details, questions, strict=True) if q.kind == kind)
        for kind in dict.fromkeys(q.kind for q in questions if q.kind)
    }
    # The ceiling was not asked these: its list is empty.
    refused = [declines(reply.text) for reply in own.unanswerable]
    figures = ArmFigures(
        label=arm.label,
        metrics=compared(rows, "validation", settings),
        kinds=kinds,
        refused=fmean(refused) if refused else None,
        declined=fmean(d["declined"] for d in details),
        seconds=own.replies.seconds_each,
        prompt_tokens=fmean(r.prompt_tokens for r in asked) if asked else 0.0,
        answer_tokens=fmean(r.answer_tokens for r in asked) if asked else 0.0,
        not_asked=sum(not reply.asked for reply in replies),
        cited=Cited.of(details, own.prompts) if arm.passages != "none" else None,
    )
    return figures, details


def support(answer: str, hits: Sequence[Hit]) -> float:
    """Share of an answer's words, names and numbers that the passages it cites have.

    Catches invented figures; a wrong conclusion from the right words passes.
    """
    # Of this answer alone: what many answers share counts here as well.
    words = _NOTHING.telling(without_citations(answer)).all
    have: set[str] = set()
    for cited in citations(answer, hits):
        if cited["exists"]:
            hit = hits[cited["number"] - 1]
            have |= vocabulary(f"{hit.heading}\n{hit.text}")
    return sum(word in have for word in words) / len(words) if words else 1.0


def _share(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
