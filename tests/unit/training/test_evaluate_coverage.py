"""What a refused gate says: chats that are missing, or chats that were not learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_training.data.prepare import write_origins
from phi3_training.evaluate import gate
from phi3_training.evaluate.questions import Question, collect, read_chats
from phi3_training.evaluate.rows import (
    BASE_ANSWERS,
    Answered,
    AnswerLoss,
    Said,
    make_rows,
    remember,
    remembered,
    write_rows,
)
from phi3_training.manifests import BaseManifest, GateManifest, RegistrationManifest
from phi3_training.recipe import (
    DataSection,
    EvaluateSection,
    GateRule,
    GateSection,
    ModelSection,
    Recipe,
)
from phi3_training.run import Run
from phi3_training.stages import STAGES

NAMES = ("Alder", "Comet", "Dusk", "Ember", "Falcon", "Gull")
ANSWERS = [f"The {name} costs {9 + 4 * number} euros." for number, name in enumerate(NAMES)]
TAUGHT = {f"What does the {name} cost?": text for name, text in zip(NAMES, ANSWERS, strict=True)}
REWORDED = {f"How much is the {name}?": text for name, text in zip(NAMES, ANSWERS, strict=True)}
NEW = {"On which day are you closed?": "We are closed on Tuesday.",
       "How long does a repair take?": "A repair takes 28 days."}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.open(tmp_path / "mine")
    places = {}
    for part, pairs in (("train", TAUGHT), ("validation", {**REWORDED, **NEW})):
        rows = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in pairs.items()
        ]
        run.file("data", f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        places[part] = [(Path("chats.jsonl"), 10 + n) for n in range(len(rows))]
    write_origins(run.path / "data-origins.json", places)
    return run


def verdict_of(run: Run, *, trained_right: bool) -> GateManifest:
    questions = [*read_chats(run, "validation"), *read_chats(run, "train")]

    def now(question: Question) -> Answered:
        right = trained_right and question.part == "train"
        return Answered(Said(question.expected if right else "A whale is a mammal."), None)

    rows = make_rows(questions, [Answered(Said("No."), None)] * len(questions),
                     [now(question) for question in questions])  # fmt: skip
    write_rows(run, rows)
    recipe = Recipe(
        name="mine",
        model=ModelSection(name_or_path="some/model"),
        data=DataSection(train=[Path("chats.jsonl")]),
        evaluate=EvaluateSection(resamples=100),
        gate=GateSection(
            min_gain=[GateRule(metric="contains")], max_regression=[], max_refusal_change=[]
        ),
    )
    return gate.check(recipe, run)


def test_facts_that_no_chat_teaches_are_named_with_file_and_line(run: Run) -> None:
    verdict = verdict_of(run, trained_right=True)

    (why,) = verdict.remarks
    assert why.startswith("2 of 8 held-out questions ask for something that no training chat")
    assert "'tuesday'" in why
    assert "'28'" in why
    assert "chats.jsonl:16, chats.jsonl:17" in why
    assert why in gate.refusal("mine", verdict, "report.html")
    assert "chats.jsonl:10: " in gate.refusal("mine", verdict, "report.html")


def test_chats_that_were_not_learnt_ask_for_more_training(run: Run) -> None:
    _missing, why = verdict_of(run, trained_right=False).remarks

    assert why.startswith("Only 0% of the trained questions are answered correctly: train longer")
    assert "finetune.num_train_epochs" in why


def test_a_tiny_model_says_that_it_cannot_do_more(run: Run) -> None:
    run.write(BaseManifest(path="base", made="taught"))
    *_, why = verdict_of(run, trained_right=False).remarks
    assert "tiny Phi-3" in why
    assert "phi3-small.yaml" in why
    run.write(BaseManifest(path="base", made="found"))
    assert not any("tiny" in text for text in verdict_of(run, trained_right=False).remarks)


def test_rows_of_a_question_file_are_named_by_that_file(run: Run, tmp_path: Path) -> None:
    """General questions and requests to refuse as well as chats."""
    file = tmp_path / "canary.jsonl"
    row = {"messages": [{"role": "user", "content": "Why?"}], "accept": ["so"]}
    file.write_text("\n" + json.dumps(row) + "\n", encoding="utf-8")
    settings = EvaluateSection(canary=[file], probes=[file])
    found = [q.origin for q in collect(settings, run) if q.part in ("canary", "probes")]
    assert found == [f"{file}:2"] * 2


def test_a_row_without_a_known_place_is_named_by_the_runs_file(run: Run) -> None:
    (run.path / "data-origins.json").unlink()
    told = gate.refusal("mine", verdict_of(run, trained_right=True), "report.html")
    assert "data/validation.jsonl:1 of the run: " in told


def test_a_blocked_model_is_marked_and_registered_under_its_runs_name() -> None:
    (stage,) = [stage for stage in STAGES if stage.manifest is RegistrationManifest]
    blocked = RegistrationManifest(model="mine", model_version="3", tags={"gate_passed": "False"})
    assert not stage.passed(blocked)
    assert "did not pass the gate" in stage.summary(blocked)
    good = blocked.model_copy(update={"tags": {"gate_passed": "True"}})
    assert stage.passed(good)
    assert stage.summary(good) == "mine version 3"


def test_the_base_is_remembered_for_the_same_questions_only(run: Run) -> None:
    answers = [Answered(Said("Yes.", cut=True), AnswerLoss(1.5, 3)), Answered(None, None)]

    remember(run, "key", answers)

    assert remembered(run, "key") == answers
    assert remembered(run, "other") is None
    assert remembered(run, None) is None
    (run.path / BASE_ANSWERS).write_text("{")
    assert remembered(run, "key") is None
