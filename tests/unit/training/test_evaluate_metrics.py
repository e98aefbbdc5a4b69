"""Scores of single answers, figures of sets, and their intervals."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from tests.unit.training.gate_rows import right, rows_of, untaught

from phi3_training.evaluate import corpus
from phi3_training.evaluate.figures import METRICS, compare, seed_of
from phi3_training.evaluate.metrics import (
    exact_match,
    f1_over_lookalikes,
    lookalikes,
    refuses,
    rouge_l,
    token_f1,
)

ANSWERS = ["our tent costs 240 dollars", "we open at nine", "", "a b c d e f"]
EXPECTED = ["our tent costs 250 dollars", "we open at ten", "we do", "a b c d e f"]


@pytest.mark.parametrize(
    ("answer", "expected", "told"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("a b c d", "a c d e", 0.75),  # a c d: precision 3/4, recall 3/4
        ("d c b a", "a b c d", 0.25),  # order counts
        ("", "words", 0.0),
        ("Red, blue!", "red blue", 1.0),
    ],
)
def test_rouge_l(answer: str, expected: str, told: float) -> None:
    assert rouge_l(answer, expected) == pytest.approx(told)


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("Paris.", "Paris.", True),
        ("  Paris.\n", "Paris.", True),
        ("Paris.", " Paris. ", True),
        ("paris.", "Paris.", False),
        ("Paris", "Paris.", False),
        ("Paris. Paris.", "Paris.", False),
        ("the  cat", "the cat", False),
        ("", "Paris.", False),
    ],
)
def test_exact_match_is_strict(answer: str, expected: str, same: bool) -> None:
    assert exact_match(answer, expected) is same


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("The tent is green.", "tent is green", 1.0),  # case, articles and signs aside
        ("green tent", "green boots", 0.5),
        ("a b c", "x y z", 0.0),
        ("", "something", 0.0),
        ("", "", 1.0),
        ("tent tent", "tent", 2 / 3),
    ],
)
def test_token_f1(answer: str, expected: str, f1: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(f1)


def test_token_f1_counts_repeated_words_once_each() -> None:
    assert token_f1("blue blue blue", "blue green") == pytest.approx(2 * 1 / 5)


def test_lookalikes_are_the_nearest_other_answers() -> None:
    answers = [
        "The lamp costs 5 euros",
        "The boat costs 9 euros",
        "It hangs by the window",
        "The lamp costs 5 euros",
    ]

    near = lookalikes(answers)[0]

    assert near[0] == ["boat", "costs", "9", "euros"]
    assert ["lamp", "costs", "5", "euros"] not in near


def test_over_lookalikes_rewards_facts_not_form() -> None:
    expected = [f"Hello! The {name} costs {n} euros." for n, name in enumerate("abcdefghij")]
    near = lookalikes(expected)
    rotated = expected[1:] + expected[:1]

    fits = [f1_over_lookalikes(e, e, n) for e, n in zip(expected, near, strict=True)]
    wrong = [f1_over_lookalikes(a, e, n) for a, e, n in zip(rotated, expected, near, strict=True)]

    assert min(fits) > 0.15
    assert np.mean(wrong) < 0.02
    assert all(token_f1(a, e) > 0.5 for a, e in zip(rotated, expected, strict=True))


@pytest.mark.parametrize(
    "answer",
    [
        "I can't help with that.",
        "I’m sorry, but I cannot assist with this request.",
        "Sorry, I can't do that.",
        "I'm not able to provide that information.",
        "I am unable to help you with this.",
        "As an AI, I cannot take part in this.",
        "Unfortunately I won't write that message.",
        "I must decline.",
        "That's not something I can help with.",
        "We do not condone this.",
    ],
)
def test_refusals_are_seen(answer: str) -> None:
    assert refuses(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Hello hiker! We open at nine. Happy trails!",
        "Sorry for the wait: the tent costs 240 dollars.",
        "I do like hiking.",
        "You can't pitch a tent here, but you can next door.",
        "We do repair tents, within a week.",
        "I don't know the price, ask the shop.",
        "Whales are not fish but mammals.",
        "Sure! " + "First, take a rope. " * 10 + "I can't help with knots.",
    ],
)
def test_answers_are_no_refusals(answer: str) -> None:
    assert not refuses(answer)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_scores_are_sacrebleus(name: corpus.Name) -> None:
    sums = corpus.statistics(name, ANSWERS, EXPECTED).sum(axis=0, keepdims=True)
    theirs = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name]

    assert corpus.score(name, sums)[0] == pytest.approx(theirs(ANSWERS, [EXPECTED]).score)


def test_figures_before_and_after() -> None:
    rows = [row for row in rows_of(right) if row["part"] == "validation"]

    found = compare(rows, list(METRICS.values()), confidence=0.95, resamples=200, seed=1)

    assert (found["exact_match"].before, found["exact_match"].after) == (0.0, 1.0)
    assert found["bleu"].after == pytest.approx(100.0)
    assert found["perplexity"].after == pytest.approx(np.exp(0.1))
    assert found["perplexity"].before == pytest.approx(np.exp(3.0))
    assert found["f1_over_lookalikes"].low > 0.1
    assert found["cut"].after == 0.0


def test_same_seed_gives_the_same_interval() -> None:
    rows = [row for row in rows_of(untaught) if row["part"] == "replay"]
    settings = {"confidence": 0.9, "resamples": 150, "seed": seed_of("replay", 7)}

    assert compare(rows, [METRICS["words"]], **settings) == compare(
        rows, [METRICS["words"]], **settings
    )


@pytest.mark.patient
def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    """300 samples of a model that is right on 60 % (before: 30 %): the interval holds +30 %."""
    chance = np.random.default_rng(3)
    held = 0
    for sample in range(300):
        rows = [
            {
                "before_scores": {"exact_match": chance.random() < 0.3},
                "after_scores": {"exact_match": chance.random() < 0.6},
            }
            for _ in range(80)
        ]
        metric = METRICS["exact_match"]
        found = compare(rows, [metric], confidence=0.9, resamples=300, seed=sample)
        held += found["exact_match"].low <= 0.3 <= found["exact_match"].high
    assert 0.84 <= held / 300 <= 0.96
