"""How answers are scored."""

from __future__ import annotations

import pytest

from phi3_training.evaluate.metrics import exact_match, score, token_f1


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("Paris.", "Paris.", True),
        ("  Paris.\n", "Paris.", True),
        ("paris.", "Paris.", False),
        ("Paris", "Paris.", False),
        ("Paris. Paris.", "Paris.", False),
        ("", "Paris.", False),
    ],
)
def test_exact_match_is_strict(answer: str, expected: str, same: bool) -> None:
    assert exact_match(answer, expected) is same


@pytest.mark.parametrize(
    ("answer", "expected", "f1"),
    [
        ("The tent is green.", "tent is green", 1.0),
        ("green tent", "green boots", 0.5),
        ("a b c", "x y z", 0.0),
        ("", "something", 0.0),
        ("", "", 1.0),
        ("tent tent", "tent", 2 / 3),
    ],
)
def test_token_f1(answer: str, expected: str, f1: float) -> None:
    assert token_f1(answer, expected) == pytest.approx(f1)


def test_score_counts_rows() -> None:
    figures = score(["yes", "no", "green tent"], ["yes", "yes", "green boots"])
    assert figures == {
        "rows": 3,
        "correct": 1,
        "exact_match": pytest.approx(1 / 3),
        "token_f1": pytest.approx(0.5),
    }


def test_score_of_nothing_is_nought() -> None:
    assert score([], []) == {"rows": 0, "correct": 0, "exact_match": 0.0, "token_f1": 0.0}


def test_score_refuses_unequal_lists() -> None:
    with pytest.raises(ValueError, match="longer"):
        score(["a"], ["a", "b"])
