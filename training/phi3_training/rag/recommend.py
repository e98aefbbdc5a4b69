"""RAG, tuning, or both: what the figures of a comparison say, by rules that docs/rag-or-tuning.md
lists in the same words.

A pure function of the figures. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Take = Literal["tuning", "rag", "both", "neither", "undecided"]

#: With fewer questions an interval of a share is wider than 35 points.
FEW_QUESTIONS = 30
#: So many changed facts must be lost by tuning before they decide anything.
FEW_CHANGES = 3
#: Training sets below this rarely teach facts; only said where tuning gained nothing.
FEW_ROWS = 200
LOW_CEILING = 0.6  # of right answers with the right passage given: below, the model cannot read
GAP = 0.1  # between that and RAG's: above, retrieval is what loses the answers
REFUSED = 0.8  # of the unanswerable questions

HEADLINES: dict[Take, str] = {
    "tuning": "Take tuning alone.",
    "rag": "Take RAG alone.",
    "both": "Take both: tune, and answer from the documents.",
    "neither": "Take neither yet: nothing is clearly better than the base model.",
    "undecided": "Too little data to say.",
}


class Change(NamedTuple):
    """The difference of two arms on the same questions, with its interval; 0.1 is ten points."""

    change: float
    low: float
    high: float

    @property
    def points(self) -> str:
        """For people: "+31 points (22 to 40)"."""
        return f"{100 * self.change:+.0f} points ({100 * self.low:.0f} to {100 * self.high:.0f})"


@dataclass(frozen=True)
class Evidence:
    """What the rules look at.

    `right` is the share of answers with the expected words, for each arm. `facts` and `voice` are
    differences of two arms, (arm, other arm): in that share, and in token F1, which also counts
    the wording. `lost` are the changed facts that tuning alone answers wrongly, `kept` how many of
    these RAG and both answer rightly. `refused` is of the unanswerable questions, for each arm.
    """

    questions: int
    right: Mapping[str, float]
    facts: Mapping[tuple[str, str], Change]
    voice: Mapping[tuple[str, str], Change]
    training_rows: int | None = None
    changed: int = 0
    lost: int = 0
    kept: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, float] = field(default_factory=dict)
    prompt_tokens: Mapping[str, float] = field(default_factory=dict)

    def better(self, arm: str, other: str) -> bool:
        """Clearly better in facts or voice, and clearly worse in neither."""
        pairs = self.facts[arm, other], self.voice[arm, other]
        return any(p.low > 0 for p in pairs) and not any(p.high < 0 for p in pairs)

    def shown(self, arm: str, other: str) -> str:
        """Both differences in words."""
        facts, voice = self.facts[arm, other], self.voice[arm, other]
        return (
            f"{NAMES[arm]} against {NAMES[other]}: right answers {facts.points}, "
            f"wording (token F1) {voice.points}"
        )

    @property
    def has_few_rows(self) -> bool:
        """Whether it is known that the model was tuned on too little."""
        return self.training_rows is not None and self.training_rows < FEW_ROWS

    @property
    def facts_change(self) -> bool:
        """Whether changed facts are lost by tuning, and mostly kept by RAG or both."""
        kept = max(self.kept.values(), default=0)
        return self.lost >= FEW_CHANGES and kept > self.lost / 2


NAMES = {"base": "the base model", "rag": "RAG", "tuned": "tuning", "both": "both",
         "ceiling": "the right passage given"}  # fmt: skip


class Recommendation(NamedTuple):
    """What to take, the rule that decided, its figures, and what else the figures say."""

    take: Take
    rule: str
    because: str
    remarks: tuple[str, ...]

    @property
    def headline(self) -> str:
        """In one sentence."""
        return HEADLINES[self.take]


class Rule(NamedTuple):
    """The first rule that applies decides; `says` is what the page of the docs says."""

    name: str
    says: str
    applies: Callable[[Evidence], bool]
    take: Callable[[Evidence], Take]
    because: Callable[[Evidence], str]


RULES = (
    Rule(
        "few-questions",
        f"fewer than {FEW_QUESTIONS} questions: too little data to say",
        lambda e: e.questions < FEW_QUESTIONS,
        lambda _: "undecided",
        lambda e: f"{e.questions} questions are too few: ask at least {FEW_QUESTIONS}, better 100.",
    ),
    Rule(
        "no-gain",
        "no way is clearly better than the base model: neither",
        lambda e: not any(e.better(arm, "base") for arm in ("rag", "tuned", "both")),
        lambda _: "neither",
        lambda e: "; ".join(e.shown(arm, "base") for arm in ("rag", "tuned", "both")) + ".",
    ),
    Rule(
        "both-better",
        "both is clearly better than RAG and than tuning: both",
        lambda e: e.better("both", "rag") and e.better("both", "tuned"),
        lambda _: "both",
        lambda e: f"{e.shown('both', 'rag')}; {e.shown('both', 'tuned')}.",
    ),
    Rule(
        "facts-change",
        "tuning loses the facts that change and RAG keeps them: RAG, or both where both is clearly "
        "better than RAG",
        lambda e: e.facts_change,
        lambda e: "both" if e.better("both", "rag") else "rag",
        lambda e: f"{_changes(e)} {e.shown('both', 'rag')}.",
    ),
    Rule(
        "little-data",
        "tuning is not clearly better than the base model: RAG; more or other training data first",
        lambda e: not e.better("tuned", "base"),
        lambda e: "rag" if e.better("rag", "base") else "both",
        lambda e: (
            (f"{e.training_rows} training rows are little data. " if e.has_few_rows else "")
            + f"{e.shown('tuned', 'base')}; {e.shown('rag', 'base')}."
        ),
    ),
    Rule(
        "style",
        "tuning is clearly better than RAG, in wording or in facts: tuning",
        lambda e: e.better("tuned", "rag"),
        lambda _: "tuning",
        lambda e: f"{e.shown('tuned', 'rag')}; {e.shown('both', 'tuned')}.",
    ),
    Rule(
        "facts-first",
        "RAG has clearly more right answers than tuning: RAG",
        lambda e: e.facts["rag", "tuned"].low > 0,
        lambda _: "rag",
        lambda e: f"{e.shown('rag', 'tuned')}.",
    ),
    Rule(
        "no-difference",
        "no clear difference between RAG and tuning: RAG, which needs no training and shows its "
        "sources",
        lambda _: True,
        lambda _: "rag",
        lambda e: f"{e.shown('rag', 'tuned')}.",
    ),
)


def recommend(evidence: Evidence) -> Recommendation:
    """The recommendation of the first rule that applies, and remarks on the other figures."""
    e = evidence
    # The order is part of the rules; the last one always applies.
    rule = next(rule for rule in RULES if rule.applies(e))
    remarks: list[str] = []
    if e.changed and rule.name != "facts-change":
        remarks.append(_changes(e))
    ceiling, reading = e.right.get("ceiling"), max(e.right["rag"], e.right["both"])
    if ceiling is not None and ceiling < LOW_CEILING:
        remarks.append(
            f"Even with the right passage given only {ceiling:.0%} of the answers are right: a "
            "larger model gains more than a better index."
        )
    elif ceiling is not None and ceiling - reading > GAP:
        remarks.append(
            f"With the right passage given {ceiling:.0%} of the answers are right, with what the "
            f"index finds {reading:.0%}: work on the documents and the index."
        )
    if e.refused.get("both") is not None and e.refused["both"] < REFUSED:
        remarks.append(
            f"Of the unanswerable questions both refuses {e.refused['both']:.0%}: train with more "
            "withheld rows (phi3 rag make-chats --withheld 0.4)."
        )
    plain, grounded = e.prompt_tokens.get("tuned"), e.prompt_tokens.get("both")
    if plain and grounded:
        remarks.append(
            f"A prompt with passages has {grounded:.0f} tokens, without {plain:.0f}: "
            f"{grounded / plain:.0f} times as many to read for each answer."
        )
    return Recommendation(rule.take(e), rule.name, rule.because(e), tuple(remarks))


def _changes(e: Evidence) -> str:
    return (
        f"Of {e.changed} facts that changed after tuning, tuning alone gets {e.lost} wrong; of "
        f"these RAG answers {e.kept.get('rag', 0)} and both {e.kept.get('both', 0)}."
    )
