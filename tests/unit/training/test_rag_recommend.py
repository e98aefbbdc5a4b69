"""RAG, tuning, or both: the recommendation on planted cases, and that the docs list its rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from phi3_training.rag.recommend import HEADLINES, RULES, Change, Evidence, recommend

DOCS = Path(__file__).parents[3] / "docs" / "rag-or-tuning.md"
PAIRS = (("rag", "base"), ("tuned", "base"), ("both", "base"), ("tuned", "rag"), ("rag", "tuned"),
         ("both", "rag"), ("both", "tuned"))  # fmt: skip


def evidence(
    right: dict[str, float],
    voice: dict[str, float] | None = None,
    *,
    half: float = 0.1,
    questions: int = 100,
    **more: object,
) -> Evidence:
    """Arms with these shares; intervals reach `half` to both sides."""

    def changes(of: dict[str, float]) -> dict[tuple[str, str], Change]:
        found = {}
        for arm, other in PAIRS:
            change = of[arm] - of[other]
            found[arm, other] = Change(change, change - half, change + half)
        return found

    voice = voice or right
    return Evidence(questions, right, changes(right), changes(voice), **more)  # type: ignore[arg-type]


def arms(base: float, rag: float, tuned: float, both: float) -> dict[str, float]:
    return {"base": base, "rag": rag, "tuned": tuned, "both": both}


CASES = {
    # The answers are a voice: documents add nothing.
    "style": (evidence(arms(0.5, 0.5, 0.55, 0.55), arms(0.2, 0.2, 0.8, 0.8)), "tuning"),
    # Tuning knows the facts by heart, until they change.
    "changing facts": (
        evidence(arms(0.1, 0.8, 0.7, 0.8), changed=10, lost=9, kept={"rag": 8, "both": 8}),
        "rag",
    ),
    "changing facts in a voice": (
        evidence(
            arms(0.1, 0.8, 0.7, 0.82), arms(0.1, 0.3, 0.7, 0.8), changed=10, lost=9,
            kept={"rag": 8, "both": 8},
        ),
        "both",
    ),
    "facts and voice": (evidence(arms(0.1, 0.5, 0.5, 0.8)), "both"),
    "RAG's facts in tuning's voice": (
        evidence(arms(0.1, 0.8, 0.3, 0.8), arms(0.1, 0.3, 0.7, 0.7)), "both",
    ),
    "few questions": (evidence(arms(0.1, 0.8, 0.3, 0.9), questions=12), "undecided"),
    "few training rows": (evidence(arms(0.2, 0.7, 0.25, 0.7), training_rows=40), "rag"),
    "nothing helps": (evidence(arms(0.3, 0.32, 0.31, 0.35)), "neither"),
    "RAG before voice": (
        evidence(arms(0.1, 0.8, 0.4, 0.8), arms(0.1, 0.3, 0.7, 0.3)), "rag",
    ),
    "no difference": (evidence(arms(0.1, 0.6, 0.6, 0.6)), "rag"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_planted_cases(case: str) -> None:
    figures, take = CASES[case]
    found = recommend(figures)
    assert found.take == take, found
    assert found.headline == HEADLINES[take]  # type: ignore[index]
    assert any(digit in found.because for digit in "0123456789"), "no figure"


def test_every_rule_decides_a_case() -> None:
    assert {recommend(figures).rule for figures, _ in CASES.values()} == {r.name for r in RULES}


def test_little_data_is_reported() -> None:
    assert "too few" in recommend(CASES["few questions"][0]).because
    assert "40 training rows are little data" in recommend(CASES["few training rows"][0]).because


def test_remarks_are_tied_to_figures() -> None:
    right = {**arms(0.1, 0.4, 0.1, 0.5), "ceiling": 0.8}
    found = recommend(
        evidence(right, refused={"both": 0.25}, prompt_tokens={"tuned": 20, "both": 400})
    )
    index, refused, cost = found.remarks
    assert "80%" in index
    assert "50%" in index
    assert "25%" in refused
    assert "20 times" in cost
    low = recommend(evidence({**right, "ceiling": 0.55}))
    assert "a larger model" in low.remarks[0]


def test_the_docs_list_every_rule() -> None:
    page = " ".join(DOCS.read_text(encoding="utf-8").split())
    for rule in RULES:
        assert f"| `{rule.name}` | {rule.says} |" in page, rule.name
