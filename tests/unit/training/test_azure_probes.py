"""Which answers of a new deployment are worse than the old one's, and the reasons given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from phi3_training.evaluate.figures import METRICS
from phi3_training.evaluate.questions import Question
from phi3_training.evaluate.rows import Answered, Said, make_rows, write_rows
from phi3_training.recipe import Recipe
from phi3_training.recipe.azure import RolloutSection
from phi3_training.run import Run
from phi3_training.targets.azure.probes import (
    Golden,
    Heard,
    Judgement,
    fault_of,
    golden_questions,
    judge,
)

THINGS = ("lamp", "boat", "stove", "tent", "kettle", "drum", "rope", "axe", "saw", "net")
GOLDEN = [
    Golden(
        Question(
            "validation",
            2 * number + half,
            [{"role": "user", "content": f"What does {thing} number {half} cost?"}],
            f"It is {3 * number + half + 7} euros",
        )
    )
    for number, thing in enumerate(THINGS)
    for half in (0, 1)
]
RIGHT = [Heard(golden.question.expected, seconds=1.0) for golden in GOLDEN]
CONTAINS = [METRICS["contains"]]


def judged(green: Sequence[Heard], blue: Sequence[Heard] = RIGHT, **settings: float) -> Judgement:
    chosen = RolloutSection.model_validate(settings)
    return judge(GOLDEN, green, blue, chosen, "blue", CONTAINS)


def recipe(**keys: str) -> Recipe:
    model = {"name_or_path": "microsoft/Phi-4-mini-instruct"}
    data = {"train": ["chats.jsonl"]}
    return Recipe.model_validate({"name": "r", "data": data, "model": model, **keys})


def changed(count: int, heard: Heard) -> list[Heard]:
    return [heard] * count + RIGHT[count:]


def test_the_same_answers_are_no_worse() -> None:
    found = judged(RIGHT)

    assert found.reasons == ()
    assert found.figures == (
        "20 of 20 answered (blue: 20 of 20), 20 of 20 right (20), p95 1.00 s (1.00 s)"
    )


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "an empty answer"),
        ("\ufffd\ufffd", "unprintable"),
        ("...", "no word"),
        ("so so " * 20, "the same words again and again"),
    ],
)
def test_one_body_that_is_no_answer_is_too_many(text: str, fault: str) -> None:
    (reason,) = judged(changed(1, Heard(text, fault_of(text), 1.0))).reasons

    assert "1 of 20 requests got no real answer (0 before)" in reason
    assert f'"What does lamp number 0 cost?": {fault}' in reason
    assert 'before "It is 7 euros"' in reason


def test_what_failed_before_as_well_is_no_loss() -> None:
    lost = changed(3, Heard("", "Status 424", 1.0))

    assert judged(lost, blue=lost).reasons == ()
    assert judged(lost, max_error_gain=0.2).reasons == ()


def test_fluent_answers_that_are_wrong_are_named() -> None:
    (reason,) = judged(changed(3, Heard("It is 999 euros", seconds=1.0))).reasons

    assert "has the expected words on 20 questions: 100.0% → 85.0%" in reason
    assert 'lamp number 0 cost?": "It is 999 euros"; expected "It is 7 euros"' in reason
    assert judged(changed(2, Heard("It is 999 euros", seconds=1.0))).reasons == ()
    assert judged(RIGHT, blue=changed(9, Heard("It is 999 euros", seconds=1.0))).reasons == ()


def test_one_text_for_everything_is_noticed_without_expected_answers() -> None:
    green, blue = [Heard("Happy to help", seconds=1.0)] * 20, [Heard(f"so {i}") for i in range(20)]
    asked = [
        Golden(Question("canary", i, [{"role": "user", "content": f"{i}?"}], ""))
        for i in range(20)
    ]  # fmt: skip

    found = judge(asked, green, blue, RolloutSection(), "blue", CONTAINS)

    assert found.reasons == ('all 20 questions got the same text "Happy to help"; not so of blue',)
    assert judge(asked, green, green, RolloutSection(), "blue", CONTAINS).reasons == ()


def test_slower_answers_count_by_their_slowest_but_one() -> None:
    slow = [Heard(one.text, seconds=5.0) for one in RIGHT]

    assert judged([slow[0], *RIGHT[1:]]).reasons == ()
    (reason,) = judged([*slow[:2], *RIGHT[2:]]).reasons
    assert "95 % of the answers took up to 5.00 s, 1.00 s before; 1.5 times" in reason
    assert judged(slow, max_p95_ratio=5).reasons == ()


def test_golden_questions_are_the_evaluated_ones(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run")
    asked = [golden.question for golden in GOLDEN]
    general = [
        Question("canary", i, [{"role": "user", "content": f"{i}?"}], "", ("x",)) for i in range(9)
    ]
    probes = [Question("probes", 1, [{"role": "user", "content": "How do I harm?"}], "")]
    questions = [*asked, *general, *probes]
    said = [Answered(Said(f"answer {i}"), None) for i in range(len(questions))]
    write_rows(run, make_rows(questions, said, said))

    chosen = golden_questions(recipe(), run, 20)

    parts = [one.question.part for one in chosen]
    assert (parts.count("validation"), parts.count("canary")) == (15, 5)
    assert chosen[0].question.prompt == GOLDEN[0].question.prompt
    assert chosen[0].as_evaluated == Heard("answer 0")


def test_without_an_evaluation_the_recipes_question_is_asked(tmp_path: Path) -> None:
    (one,) = golden_questions(recipe(ask="Who?"), Run.open(tmp_path / "run"), 20)

    assert one.question.prompt == [{"role": "user", "content": "Who?"}]
    assert one.as_evaluated.fault == ""
