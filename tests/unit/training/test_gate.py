"""The gate: lets a good model through, blocks planted regressions, names the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.unit.training.gate_rows import FACTS, Answerer, gate_of, right, rows_of, untaught

from phi3_training.errors import StageError
from phi3_training.evaluate import gate
from phi3_training.evaluate.questions import Question
from phi3_training.evaluate.rows import Row
from phi3_training.journey import Journey
from phi3_training.manifests import EndpointManifest, GatePassage, ModelManifest
from phi3_training.progress import Progress
from phi3_training.recipe import EvaluateSection, GateSection, Recipe
from phi3_training.run import Run
from phi3_training.stages import stages_of

SETTINGS = EvaluateSection(resamples=400)
RULES = GateSection.model_validate(
    gate_of(
        min_gain={"metric": "f1_over_lookalikes", "value": 0.05},
        max_regression={"metric": "exact_match", "part": "replay", "value": 0.1},
        max_refusal_change={"value": 0.2},
    )
)


def shuffled(question: Question) -> str:
    """Answers with another row's answer, in the right style."""
    if question.part != "validation":
        return right(question)
    order = np.random.default_rng(5).permutation(len(FACTS))
    return FACTS[order[question.line - 1]][1]


def lobotomised(question: Question) -> str:
    """Learnt the new chats and forgot the old ones."""
    return FACTS[0][1] if question.part == "replay" else right(question)


def obliging(question: Question) -> str:
    """Refuses nothing any more."""
    return "Sure, here is how." if question.part == "probes" else right(question)


def failed_kinds(rows: list[Row], rules: GateSection = RULES) -> list[str]:
    verdict = gate.decide(rows, rules, SETTINGS)
    assert verdict.passed == all(rule.passed for rule in verdict.rules)
    return [rule.kind for rule in verdict.rules if not rule.passed]


def test_good_model_passes() -> None:
    assert failed_kinds(rows_of(right)) == []


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (untaught, "min_gain"),
        (shuffled, "min_gain"),
        (lobotomised, "max_regression"),
        (obliging, "max_refusal_change"),
    ],
)
def test_planted_regression_is_blocked(model: Answerer, kind: str) -> None:
    assert failed_kinds(rows_of(model)) == [kind]


def test_rows_that_sank_it_are_named() -> None:
    """Of three lost old chats exactly those are named, with what was said before and is now."""

    def forgetful(question: Question) -> str:
        lost = question.part == "replay" and question.line in (4, 9, 20)
        return "Hello!" if lost else right(question)

    rules = RULES.model_copy(
        update={"max_regression": [RULES.max_regression[0].model_copy(update={"value": 0.01})]}
    )
    verdict = gate.decide(rows_of(forgetful), rules, SETTINGS)
    told = gate.refusal("mine", verdict, "report.html")

    (failed,) = [rule for rule in verdict.rules if not rule.passed]
    assert sorted(row.line for row in failed.rows_named) == [4, 9, 20]
    assert 'data/replay.jsonl:4 of the run: "Which letter is number 4?"' in told
    assert 'before "It is the letter d.", now "Hello!"' in told
    assert "--force" in told
    assert "report.html" in told


def test_refusing_everything_is_a_change_too() -> None:
    rules = GateSection.model_validate(gate_of(max_refusal_change={"part": "replay", "value": 0.1}))

    def prim(question: Question) -> str:
        return "I can't help with that." if question.part == "replay" else right(question)

    assert failed_kinds(rows_of(prim), rules) == ["max_refusal_change"]


def test_gain_must_be_sure_not_only_seen() -> None:
    """Three right answers of 36 are a gain in this sample, but not one to rely on."""

    def lucky(question: Question) -> str:
        return right(question) if question.line <= 3 else untaught(question)

    rules = GateSection.model_validate(gate_of(min_gain={"metric": "exact_match", "value": 0.05}))
    verdict = gate.decide(rows_of(lucky), rules, SETTINGS)

    assert (verdict.rules[0].change or 0) > 0.05
    assert not verdict.passed


def test_lower_confidence_decides_sooner() -> None:
    def better(question: Question) -> str:
        return right(question) if question.line <= 5 else untaught(question)

    verdicts = [
        gate.decide(
            rows_of(better),
            GateSection.model_validate(
                gate_of(min_gain={"metric": "exact_match", "value": 0.05, "confidence": sure})
            ),
            SETTINGS,
        ).passed
        for sure in (0.99, 0.6)
    ]
    assert verdicts == [False, True]


def test_lower_perplexity_is_the_gain() -> None:
    rules = GateSection.model_validate(gate_of(min_gain={"metric": "perplexity", "value": 5}))

    assert failed_kinds(rows_of(right), rules) == []
    assert failed_kinds(rows_of(untaught, before=right), rules) == ["min_gain"]


def test_no_gain_at_all_never_passes() -> None:
    """Not even where the recipe asks for a gain of 0."""
    rules = GateSection.model_validate(gate_of(min_gain={"metric": "exact_match", "value": 0}))

    assert failed_kinds(rows_of(untaught), rules) == ["min_gain"]


def test_too_few_rows_cannot_pass() -> None:
    rows = [row for row in rows_of(right) if row["part"] != "validation"]

    verdict = gate.decide(rows, RULES, SETTINGS)

    assert not verdict.passed
    assert "0 rows are too few to decide" in verdict.rules[0].reason
    assert "gate.min_gain=[]" in verdict.rules[0].reason


def test_no_rules_ask_nothing() -> None:
    verdict = gate.decide(rows_of(untaught), GateSection.model_validate(gate_of()), SETTINGS)

    assert verdict.passed
    assert "no gate rules" in gate.summary(verdict)


def test_unlucky_samples_seldom_block_a_good_model() -> None:
    """A model that is right on 80 % is measured on 60 other samples of its rows."""
    chance = np.random.default_rng(11)

    def good(question: Question) -> str:
        slips = question.part == "validation" and chance.random() < 0.2
        return untaught(question) if slips else right(question)

    rows = rows_of(good)
    parts = [[r for r in rows if r["part"] == part] for part in ("validation", "replay", "probes")]
    settings = EvaluateSection(resamples=100)
    blocked = 0
    for sample in range(60):
        draw = np.random.default_rng(sample)
        again = [part[i] for part in parts for i in draw.integers(0, len(part), len(part))]
        blocked += not gate.decide(again, RULES, settings).passed
    assert blocked <= 3


@pytest.mark.parametrize("force", [False, True])
def test_deploy_is_refused_unless_forced(tmp_path: Path, force: bool) -> None:
    run = Run.open(tmp_path / "mine")
    verdict = gate.decide(rows_of(shuffled), RULES, SETTINGS)
    run.write(verdict.model_copy(update={"report": "evaluate/report.html"}))

    if not force:
        with pytest.raises(StageError, match=r"data/validation\.jsonl:"):
            gate.require_passed(run, force=False)
        return
    recorded = gate.require_passed(run, force=True)
    assert recorded.passed is False
    assert recorded.forced is True
    assert recorded.failed[0].startswith("FAILED min_gain")


class Served:
    """A target that deploys whatever it is asked to."""

    def deploy(self, _recipe: Recipe, _run: Run, _progress: Progress) -> EndpointManifest:
        return EndpointManifest(endpoint="http://127.0.0.1:1/score")


def test_force_is_remembered_for_the_same_model_and_the_same_failed_rules(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "mine")
    deploy = next(stage for stage in stages_of(in_cloud=False) if stage.title == "deploy")

    def up(*, force: bool = False) -> EndpointManifest:
        target: Any = Served()
        journey = Journey(Recipe.model_construct(name="mine"), run, target, tmp_path, force=force)
        manifest: EndpointManifest = deploy.work(journey)
        run.write(manifest)
        return manifest

    def judge(model: Answerer) -> None:
        run.write(gate.decide(rows_of(model), RULES, SETTINGS))

    run.write(ModelManifest(path="model", done_id="first"))
    judge(shuffled)
    with pytest.raises(StageError, match="--force"):
        up()
    assert up(force=True).gate == up().gate  # the second time nobody has to say it again
    assert "deployed by --force: FAILED min_gain" in up().choices[0]

    judge(lobotomised)  # another rule fails: that was not forced
    with pytest.raises(StageError, match="--force"):
        up()
    judge(shuffled)
    run.write(ModelManifest(path="model", done_id="second"))
    with pytest.raises(StageError, match="--force"):
        up()


def test_force_is_not_recorded_where_it_was_not_needed(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "mine")
    verdict = gate.decide(rows_of(right), RULES, replace_seed(SETTINGS, 3))
    run.write(verdict.model_copy(update={"report": "evaluate/report.html"}))

    assert gate.require_passed(run, force=True) == GatePassage(passed=True, forced=False, failed=[])


def replace_seed(settings: EvaluateSection, seed: int) -> EvaluateSection:
    return settings.model_copy(update={"seed": seed})
