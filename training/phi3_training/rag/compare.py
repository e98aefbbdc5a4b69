"""`phi3 rag compare`: base, RAG, tuning and both on the same held-out questions.

Reads a run with its models, an index, questions and changes; writes run/rag/comparison.json,
comparison-rows.jsonl and comparison.html. Answers are saved: see asking.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import jinja2

from phi3_tool.grounding import question_in
from phi3_tool.index import DocumentIndex, Embedder, Hit

from .. import evaluate
from ..errors import StageError, UsageError
from ..manifests import ModelManifest, Resampling
from ..progress import Progress, note
from ..run import Run, write_atomically
from .arms import ARMS, ArmName, Prompts
from .asking import Asker, Replies
from .changes import FactChange, changed_index
from .figures import Retrieval, measure
from .questions import Question, answers_of, of_split, right_passages
from .recommend import RULES, Evidence, Recommendation, recommend
from .scores import ArmAnswers, ArmFigures, ScoredAnswer, arm_figures, differences, rows_of

FILE = "rag/comparison.json"
ROWS = "rag/comparison-rows.jsonl"
PAGE = "rag/comparison.html"
_SHOWN = 15  # wrong answers side by side, on the page
_CHANGED_INDEX = "rag/changed.sqlite"
#: Asked again after documents changed; the tuned model alone has nothing to look it up in.
_AFTER_CHANGES: tuple[ArmName, ...] = ("rag", "tuned", "both")


@dataclass(frozen=True)
class Changed:
    """Facts that were changed in the documents after tuning: how many answers are right then.

    `lost` are those that tuning alone gets wrong, `kept` how many of them another arm gets right.
    """

    facts: int
    right: Mapping[str, int]
    lost: int
    kept: Mapping[str, int]

    @classmethod
    def of(cls, questions: Sequence[Question], after: Mapping[str, Replies]) -> Changed:
        """From the answers of each arm to the questions whose answers have changed."""
        right: dict[str, list[bool]] = {}
        for name, replies in after.items():
            rows = rows_of(questions, replies.replies, replies.replies)
            right[name] = [bool(row["after_right"]) for row in rows]
        lost = [number for number, was in enumerate(right["tuned"]) if not was]
        return cls(
            facts=len(questions),
            right={name: sum(rows) for name, rows in right.items()},
            lost=len(lost),
            kept={name: sum(right[name][n] for n in lost) for name in ("rag", "both")},
        )


class WrongAnswer(TypedDict):
    """A question that `both` answered wrongly, with every arm's answer."""

    question: str
    line: int
    kind: str
    expected: str
    arms: Mapping[str, ScoredAnswer]


@dataclass(frozen=True)
class Comparison:
    """All figures; `left_out`: questions that the model was trained on word for word."""

    questions: int
    unanswerable: int
    left_out: int
    top_k: int
    answered_by: str
    training_rows: int | None
    retrieval: Retrieval
    arms: Mapping[str, ArmFigures]
    changed: Changed | None
    recommendation: Recommendation
    settings: Resampling
    worst: Sequence[WrongAnswer]

    def as_json(self) -> dict[str, Any]:
        """Everything but the rows."""
        return {
            **{key: getattr(self, key) for key in ("questions", "unanswerable", "left_out",
                                                   "top_k", "answered_by", "training_rows")},
            "retrieval": asdict(self.retrieval),
            "arms": {
                name: {"right": round(figures.right, 6), **asdict(figures)}
                for name, figures in self.arms.items()
            },
            "changed": asdict(self.changed) if self.changed else None,
            "recommendation": {
                "headline": self.recommendation.headline, **self.recommendation._asdict(),
            },
            "settings": self.settings.model_dump(),
        }  # fmt: skip


def compare_arms(
    run: Run,
    index: DocumentIndex,
    embedder: Embedder | None,
    questions: Sequence[Question],
    changes: Sequence[FactChange],
    asking: Asker,
    settings: Resampling,
    *,
    top_k: int,
    progress: Progress,
) -> Comparison:
    """Ask every arm everything and write the files.

    Raises UsageError where questions or changes do not fit, and what `asking` raises.
    """
    among = answers_of(questions)
    chosen, left_out = _not_trained_on(of_split(questions, "test"), run)
    asked = [question for question in chosen if question.answerable and question.answer]
    none = [question for question in chosen if not question.answerable]
    if not asked and left_out:
        raise UsageError(
            f"The run {run.name!r} was trained on these questions ({left_out} of them word for "
            'word): mark others with "split": "test" before phi3 rag make-chats, and train again'
        )
    if not asked:
        raise UsageError("No question has an `answer` to compare with: add some to the file")
    by_id = {question.id: question for question in questions if question.id}
    missing = [change.id for change in changes if change.id not in by_id]
    if missing:
        raise UsageError(
            f"No question has the id of these changes: {', '.join(missing)}. A change names its "
            "question by `id`"
        )
    # Those of any split, since none is trained on with its new answer.
    again = [replace(by_id[change.id], answer=change.answer) for change in changes]
    note(progress, "looking the questions up")
    passages = index.passages()
    right = [right_passages(question, passages, among) for question in asked]
    right_ids = [{hit.id for hit in hits} for hits in right]
    prompts = Prompts(index, embedder, top_k)
    # The same index with some facts edited: what a run of `phi3 rag index` would have made of them.
    edited = None
    if changes:
        target = run.file(_CHANGED_INDEX)
        edited = Prompts(changed_index(index, embedder, changes, target), embedder, top_k)
    total = len(ARMS) * len(asked) + (len(ARMS) - 1) * len(none)
    total += len(again) * len(_AFTER_CHANGES)
    asking.expect(total)  # of all arms at once, so that the time left is of the whole command
    answers: dict[str, ArmAnswers] = {}
    after: dict[str, Replies] = {}
    for name, arm in ARMS.items():
        answered = [
            prompts.of(arm, question.text, hits)
            for question, hits in zip(asked, right, strict=True)
        ]
        # The ceiling has no right passage to give for an unanswerable question.
        unanswerable = [] if arm.passages == "right" else [prompts.of(arm, q.text) for q in none]
        replies = asking.ask(name, arm, [*answered, *unanswerable])
        # Seconds count for answerable questions alone, in proportion: an arm's answers are written
        # in one go, and a refusal is shorter than an answer.
        said = replies.replies[: len(answered)]
        answers[name] = ArmAnswers(
            answered, Replies(said, replies.seconds_each * sum(reply.asked for reply in said)),
            replies.replies[len(answered):],
        )  # fmt: skip
        if edited is not None and name in _AFTER_CHANGES:
            now = [edited.of(arm, question.text) for question in again]
            after[name] = asking.ask(f"{name}-changed", arm, now)
    arms: dict[str, ArmFigures] = {}
    details: dict[str, list[ScoredAnswer]] = {}
    for name in ARMS:
        note(progress, f"counting: {ARMS[name].label}")
        arms[name], details[name] = arm_figures(name, asked, answers, right_ids, among, settings)
    changed = Changed.of(again, after) if edited is not None else None
    model = run.read(ModelManifest)
    rows = model.conversations.get("train") if model else None
    between = differences(asked, answers, settings)
    evidence = Evidence(
        questions=len(asked),
        right={name: figures.right for name, figures in arms.items()},
        facts=between["facts"],
        voice=between["voice"],
        training_rows=rows,
        changed=changed.facts if changed else 0,
        lost=changed.lost if changed else 0,
        kept=changed.kept if changed else {},
        refused={n: figures.refused for n, figures in arms.items() if figures.refused is not None},
        prompt_tokens={name: figures.prompt_tokens for name, figures in arms.items()},
    )
    # Retrieval is measured on the unanswerable ones too: nothing should score enough there.
    ids = iter(right_ids)
    looked_up = [*asked, *none]
    comparison = Comparison(
        questions=len(asked),
        unanswerable=len(none),
        left_out=left_out,
        top_k=top_k,
        answered_by=asking.sentence,
        training_rows=rows,
        retrieval=measure(index, embedder, looked_up, [next(ids, set()) for _ in looked_up]),
        arms=arms,
        changed=changed,
        recommendation=recommend(evidence),
        settings=settings,
        worst=_worst(asked, details),
    )
    _write(run, comparison, asked, right, details)
    return comparison


def _not_trained_on(questions: Sequence[Question], run: Run) -> tuple[list[Question], int]:
    """The questions that are in no training row, and how many are."""
    path = run.path / "data" / "train.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise StageError(
            f"{path} cannot be read ({error.strerror}); run: phi3 data prepare"
        ) from None
    # In chats with passages the question is inside a prompt, and was trained on as well.
    trained = {
        question_in(turn["content"]).casefold()
        for line in lines
        if line
        for turn in json.loads(line)["messages"]
        if turn["role"] == "user"
    }
    unseen = [question for question in questions if question.text.casefold() not in trained]
    return unseen, len(questions) - len(unseen)


def _worst(
    questions: Sequence[Question], details: Mapping[str, Sequence[ScoredAnswer]]
) -> list[WrongAnswer]:
    """Wrong answers of `both`, those first that another arm has right."""
    rows: list[WrongAnswer] = [
        {
            "question": question.text,
            "line": question.line,
            "kind": question.kind,
            "expected": question.answer,
            "arms": {name: rows[number] for name, rows in details.items()},
        }
        for number, question in enumerate(questions)
    ]
    wrong = [row for row in rows if not row["arms"]["both"]["right"]]
    return sorted(wrong, key=lambda row: -sum(arm["right"] for arm in row["arms"].values()))


def _write(
    run: Run,
    comparison: Comparison,
    questions: Sequence[Question],
    right: Sequence[Sequence[Hit]],
    details: Mapping[str, Sequence[ScoredAnswer]],
) -> None:
    rows = [
        {
            **asdict(question),
            "right_passages": [hit.place for hit in hits],
            "arms": {name: rows[number] for name, rows in details.items()},
        }
        for number, (question, hits) in enumerate(zip(questions, right, strict=True))
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_atomically(run.file(ROWS), "\n".join([*lines, ""]))
    text = json.dumps(comparison.as_json(), indent=2, ensure_ascii=False)
    write_atomically(run.file(PAGE), page(run.name, comparison.as_json(), comparison.worst))
    write_atomically(run.file(FILE), text + "\n")


def page(name: str, figures: Mapping[str, Any], worst: Sequence[Mapping[str, Any]]) -> str:
    """The report on the run `name`, one self-contained file; `figures` as in comparison.json."""
    folders = [Path(__file__).parent, Path(evaluate.__file__).parent]
    # What models, people and documents wrote is text, never markup.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, keep_trailing_newline=True
    )
    environment.filters["form"] = format
    rule = next(r for r in RULES if r.name == figures["recommendation"]["rule"])
    return environment.get_template("comparison.html").render(
        name=name, f=figures, arms=figures["arms"], rule=rule, worst=worst, shown=_SHOWN
    )
