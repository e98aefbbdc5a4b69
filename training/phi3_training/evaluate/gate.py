"""The gate: whether the tuned model may be deployed, decided by paired bootstrap intervals.

Reads run/evaluate/rows.jsonl; its verdict is the manifest `gate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from ..data.prepare import MOST_COMPARED, Chat, teachers
from ..errors import StageError
from ..manifests import BaseManifest, GateManifest, GatePassage, NamedRow, RuleVerdict
from ..recipe import EvaluateSection, GateRule, GateSection, Recipe, RefusalRule
from ..run import Run
from ..telling import vocabulary
from .figures import METRICS, Metric, compare, seed_of
from .questions import PARTS, Question, read_chats
from .rows import Row, Side, asked_in, read_rows, scores_of

# Why a model was not good enough: chats that are missing, or chats that were not learnt.
# Reads the evaluated rows and run/data/train.jsonl; writes nothing.

_LEARNT = 0.9  # of the trained questions: with fewer right, more training comes first
_SHOWN_ROWS = 6


def remarks(rows: Sequence[Row], run: Run) -> list[str]:
    """What keeps the held-out questions from being answered, and what to add or change."""
    trained = read_chats(run, "train")[:MOST_COMPARED]  # comparing all takes seconds
    reasons = _not_taught(rows, trained)
    asked = [row for row in rows if row["part"] == "train" and row["after_right"] is not None]
    share = sum(bool(row["after_right"]) for row in asked) / max(1, len(asked))
    if asked and share < _LEARNT:
        reasons.append(
            f"Only {share:.0%} of the trained questions are answered correctly: train longer "
            "(finetune.max_steps if set, else finetune.num_train_epochs), with a higher "
            "finetune.learning_rate or finetune.lora_r, or use a larger model (model.name_or_path)."
        )
    base = run.read(BaseManifest)
    if base is not None and base.made == "taught":
        reasons.append(
            "The base model is the tiny Phi-3 that phi3 trains for tests: it repeats sentences "
            "that it was trained on and can hardly answer in other words, whatever the settings. "
            "For chats of your own use a pretrained model: phi3 up "
            "training/recipes/phi3-small.yaml data.train=FILE --run NAME"
        )
    return reasons


def _not_taught(rows: Sequence[Row], trained: Sequence[Question]) -> list[str]:
    asked = [row for row in rows if row["part"] == "validation" and row["expected"]]
    chats = [
        Chat(
            asked_in([*row["earlier_turns"], {"role": "user", "content": row["question"]}]),
            row["question"],
            row["expected"],
        )
        for row in asked
    ]
    known = [Chat(asked_in(q.prompt), q.prompt[-1]["content"], q.expected) for q in trained]
    taught_by = teachers(chats, known)
    answers = [vocabulary(question.expected) for question in trained]

    def is_mentioned(row: Row) -> bool:
        """Whether one training answer has the numbers of the expected one, or half of its words.

        Less than teaching it: an answer that says more, or the same in other words, is not missing.
        """
        telling = set(row["telling"])
        figures = {word for word in telling if any(sign.isdigit() for sign in word)}
        if figures:
            return any(figures <= words for words in answers)
        return bool(telling) and any(2 * len(telling & words) >= len(telling) for words in answers)

    new = [
        row
        for row, teacher in zip(asked, taught_by, strict=True)
        if not teacher and not is_mentioned(row)
    ]
    if not new or not trained:
        return []
    wrong = [row for row in new if not row["after_right"]] or new
    words = [word for row in wrong for word in row["telling"][:2]]
    shown = ", ".join(repr(word) for word in list(dict.fromkeys(words))[:_SHOWN_ROWS])
    named = [row["origin"] for row in wrong if row["origin"]][:_SHOWN_ROWS]
    places = f"; they are {', '.join(named)}" if named else ""
    more = ", …" if len(wrong) > len(named) and named else ""
    return [
        f"{len(new)} of {len(asked)} held-out questions ask for something that no training chat "
        f"answers{f' (the words {shown})' if shown else ''}{places}{more}. Tuning cannot teach "
        "these: add chats with the same facts in other words to data.train, or hold back "
        "rewordings of trained facts (data.validation=[] chooses them where there are some)."
    ]


FEWEST_ROWS = 5  # with fewer, resampling says nothing about rows that were not drawn
_NAMED_ROWS = 5
_SHOWN = 70  # characters of a text in a message


def check(recipe: Recipe, run: Run) -> GateManifest:
    """Hold the evaluated rows of a run against the recipe's gate; the manifest, without a report.

    Raises StageError where the rows are not there.
    """
    rows = read_rows(run)
    verdict = decide(rows, recipe.gate, recipe.evaluate)
    # A metric shows that a model is not good enough; these say why, and what to do.
    why = [] if verdict.passed else remarks(rows, run)
    return verdict.model_copy(update={"remarks": why})


def decide(rows: Sequence[Row], gate: GateSection, settings: EvaluateSection) -> GateManifest:
    """Whether every rule holds; each rule with its interval and, if it fails, its worst rows."""
    rules = [
        *(_judged("min_gain", rule, rows, settings) for rule in gate.min_gain),
        *(_judged("max_regression", rule, rows, settings) for rule in gate.max_regression),
        *(_judged("max_refusal_change", rule, rows, settings) for rule in gate.max_refusal_change),
    ]
    return GateManifest(passed=all(rule.passed for rule in rules), rules=rules)


def summary(verdict: GateManifest) -> str:
    """The verdict in a few words."""
    failed = sum(not rule.passed for rule in verdict.rules)
    count = len(verdict.rules)
    if not count:
        return "passed: the recipe has no gate rules"
    return (
        f"passed, {count} of {count} rules"
        if not failed
        else f"NOT passed: {failed} of {count} rules failed"
    )


def line(rule: RuleVerdict) -> str:
    """One rule and how it came out, for people."""
    mark = "passed" if rule.passed else "FAILED"
    return f"{mark} {rule.kind}: {rule.reason}"


def refusal(run_name: str, verdict: GateManifest, report: str) -> str:
    """Why a model is not deployed, the rows that failed it, and what to do."""
    lines = [f"The model of run {run_name!r} did not pass the gate, so it is not deployed:"]
    for rule in verdict.rules:
        if rule.passed:
            continue
        lines.append(f"  {rule.kind}: {rule.reason}")
        for row in rule.rows_named:
            expected = f", expected {_cut(row.expected)}" if row.expected else ""
            # Without origins (very large sets, older rows): the prepared file in the run folder.
            place = row.origin or f"data/{row.part}.jsonl:{row.line} of the run"
            lines.append(
                f"    {place}: {_cut(row.question)}{expected}, before {_cut(row.before)}, "
                f"now {_cut(row.after)}"
            )
    lines += [f"  {text}" for text in verdict.remarks]
    lines += [
        f"Side by side in the report: {report}",
        "Improve the chats or the recipe (see the gate in docs/evaluation.md) and train again, or "
        "deploy anyway with --force, which is recorded.",
    ]
    return "\n".join(lines)


def require_passed(run: Run, *, force: bool) -> GatePassage:
    """What the endpoint's manifest records of the gate.

    Raises StageError unless it passed or is forced.
    """
    verdict = run.require(GateManifest)
    failed = [line(rule) for rule in verdict.rules if not rule.passed]
    if not verdict.passed and not force:
        raise StageError(refusal(run.name, verdict, str(run.path / verdict.report)))
    return GatePassage(passed=verdict.passed, forced=bool(failed), failed=failed)


def _judged(
    kind: str, rule: GateRule | RefusalRule, rows: Sequence[Row], settings: EvaluateSection
) -> RuleVerdict:
    metric = METRICS[rule.metric]
    # Perplexity is no column of a row: it is computed from the loss of all rows together.
    key = "nll" if metric.name == "perplexity" else metric.name
    chosen = [row for row in rows if row["part"] == rule.part]
    chosen = [row for row in chosen if row["after_scores"].get(key) is not None]
    head = {"kind": kind, **rule.model_dump(mode="json"), "rows": len(chosen)}
    if len(chosen) < FEWEST_ROWS:
        reason = (
            f"{metric.label} on {PARTS[rule.part]}: {len(chosen)} rows are too few to decide; "
            f"expected at least {FEWEST_ROWS} (or drop the rule: gate.{kind}=[])"
        )
        return RuleVerdict.model_validate(
            {**head, "passed": False, "reason": reason, "rows_named": []}
        )
    compared = compare(
        chosen,
        [metric],
        confidence=rule.confidence,
        resamples=settings.resamples,
        seed=seed_of(rule.part, settings.seed),
    )[metric.name]
    # The end of the interval that speaks against the model, in a scale where more is better.
    worst, value = min(metric.sign * compared.low, metric.sign * compared.high), rule.value
    allowed = f"{metric.change(value, '')}{metric.unit}"
    if kind == "min_gain":  # the worse end must reach the gain, and be above 0
        bound = metric.change(metric.sign * value)
        demand = f"at {'least' if metric.sign > 0 else 'most'} {bound}" if value else "a gain"
        passed, demand = worst >= value and worst > 0, f"{demand} required"
    elif kind == "max_regression":
        passed, demand = worst >= -value, f"a loss of at most {allowed} is allowed"
    else:
        passed = compared.low >= -value and compared.high <= value
        demand = f"a change of at most {allowed} in either direction is allowed"
    named = [] if passed else _worst(chosen, metric, kind)
    low, high = metric.change(compared.low), metric.change(compared.high)
    reason = (
        f"{metric.label} on {PARTS[rule.part]}: {metric.text(compared.before)} → "
        f"{metric.text(compared.after)}, {metric.change(compared.change)}{metric.unit} "
        f"({rule.confidence * 100:g} % interval {low} to {high}); {demand}"
    )
    result = {**asdict(compared), "passed": passed, "reason": reason, "rows_named": named}
    return RuleVerdict.model_validate({**head, **result})


def _worst(rows: Sequence[Row], metric: Metric, kind: str) -> list[NamedRow]:
    """The rows that did most to break the rule, worst first."""

    def change(row: Row) -> float:
        return float(metric.sign * (_one(row, metric, "after") - _one(row, metric, "before")))

    if kind == "max_refusal_change":
        worst = [row for row in rows if change(row)]
    else:
        worst = sorted(rows, key=lambda r: (change(r), metric.sign * _one(r, metric, "after")))
        if kind == "max_regression":
            worst = [row for row in worst if change(row) < 0]
    return [NamedRow.model_validate(row) for row in worst[:_NAMED_ROWS]]


def _one(row: Row, metric: Metric, side: Side) -> float:
    scores = scores_of(row, side)
    if metric.name == "perplexity":
        return float(scores["nll"] / max(1, scores["tokens"]))
    return float(scores[metric.name])


def _cut(text: str) -> str:
    plain = " ".join(text.split())
    return f'"{plain if len(plain) <= _SHOWN else plain[: _SHOWN - 1] + "…"}"'
