"""What tells whether a new deployment is worse: golden questions, and what Azure Monitor counted.

Every deployment is asked through its header, past the traffic rules, and every body is read: a
model's failure may come with status 200 (`{}`, `"None"`, an error object, an empty text). Reads
run/evaluate/rows.jsonl: the questions, and what the model answered when it was evaluated.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from phi3_tool.client import Phi3Client
from phi3_tool.errors import Phi3Error, one_line

from ...data import question_of
from ...errors import StageError
from ...evaluate.figures import METRICS, Metric, compare
from ...evaluate.gate import FEWEST_ROWS
from ...evaluate.questions import Question
from ...evaluate.rows import Answered, Row, Said, make_rows, read_rows
from ...recipe import Recipe
from ...recipe.azure import RolloutSection
from ...run import Run
from ..base import Access
from .clients import ARM, Clients
from .failures import message_of

log = logging.getLogger(__name__)

# The held-out chats first: the model has not seen their answers. Some general questions as
# well show what it forgot. Refusal probes have no right answer that could be counted.
_PARTS = ("validation", "canary", "train", "replay")
_GENERAL_SHARE = 0.25
# An answer that takes 0.2 s longer is not slower in a way that anybody notices (seconds).
_P95_SLACK = 0.2
_LOOP_WORDS, _LOOP_VOCABULARY = 20, 2  # so many words of so few: a model that is stuck
_NAMED = 5
_SHOWN = 70  # characters of a text in a message


@dataclass(frozen=True)
class Heard:
    """A text, and what is wrong with it or kept it from coming; `seconds` until it was complete."""

    text: str = ""
    fault: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Golden:
    """A question, and what the evaluated model answered; None where it was not evaluated."""

    question: Question
    evaluated: str | None = None

    @property
    def as_evaluated(self) -> Heard:
        """The evaluated answer, as if it had just come; no fault where there is none."""
        text = self.evaluated
        return Heard() if text is None else Heard(text, fault_of(text))


@dataclass(frozen=True)
class Judgement:
    """How a new deployment stands against the old one; `reasons` say why it must not go on."""

    figures: str
    reasons: tuple[str, ...] = ()


def golden_questions(recipe: Recipe, run: Run, count: int) -> list[Golden]:
    """The run's evaluated questions, at most `count`; at least the recipe's own question."""
    try:
        rows = read_rows(run)
    except StageError:  # deployed without an evaluation
        rows = []
    by_part: dict[str, list[Golden]] = {part: [] for part in _PARTS}
    for row in rows:
        if row["part"] in by_part:
            by_part[row["part"]].append(_golden(row))
    general = _spread(by_part["canary"], math.ceil(_GENERAL_SHARE * count))
    chosen = [*_spread(by_part["validation"], count - len(general)), *general]
    for part in ("train", "replay"):
        chosen += _spread(by_part[part], count - len(chosen))
    if not chosen:
        prompt = [{"role": "user", "content": question_of(recipe, run)}]
        chosen = [Golden(Question("validation", 1, prompt, ""))]
    return chosen


def _golden(row: Row) -> Golden:
    prompt = [*row["earlier_turns"], {"role": "user", "content": row["question"]}]
    question = Question(
        row["part"], row["line"], prompt, row["expected"], tuple(row["accept"]), row["origin"]
    )
    return Golden(question, row["after"])


def _spread(rows: Sequence[Golden], limit: int) -> list[Golden]:
    """At most `limit`, spread evenly."""
    if len(rows) <= limit:
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


class Panel:
    """The golden questions, and how two deployments of one endpoint are asked them."""

    def __init__(self, access: Access, recipe: Recipe, golden: Sequence[Golden]) -> None:
        self._access = access
        self._settings = recipe.azure.rollout
        self._longest = recipe.evaluate.max_new_tokens
        # What the gate judged the model by, where texts alone and a share of right are enough.
        rules = (*recipe.gate.min_gain, *recipe.gate.max_regression)
        names = dict.fromkeys(["contains", *(rule.metric for rule in rules)])
        self._metrics = [METRICS[name] for name in names if METRICS[name].unit]
        self._golden = golden
        # A small set is asked more than once: whether it answers needs numbers.
        self._turns = max(self._settings.questions, len(golden))

    def look(self, new: str, old: str | None, step: Callable[[int, int], None]) -> Judgement:
        """Ask both in turn, so that both meet the same moment; `step(done, all)` shows how far.

        Ends early once the new one has failed too often. Without an old one that answers, the new
        one must do what the model did when it was evaluated.
        """
        asked: list[Golden] = []
        green: list[Heard] = []
        blue: list[Heard] = []
        # 200 s: a little more than Azure lets a request take (180 s).
        client = partial(self._access.client, max_retries=4, deadline=200.0)
        with client(deployment=new) as new_client, client(deployment=old or new) as old_client:
            for golden in itertools.islice(itertools.cycle(self._golden), self._turns):
                asked.append(golden)
                green.append(self._ask(new_client, golden.question))
                before = self._ask(old_client, golden.question) if old else golden.as_evaluated
                blue.append(before)
                step(len(asked), self._turns)
                if _faults(green) - _faults(blue) > self._settings.max_error_gain * self._turns:
                    break
        if old is None or _faults(blue) == len(blue):
            old, blue = "its evaluation", [golden.as_evaluated for golden in asked]
        return judge(asked, green, blue, self._settings, old, self._metrics)

    def _ask(self, client: Phi3Client, question: Question) -> Heard:
        messages = [{"role": m["role"], "content": m["content"]} for m in question.prompt]
        started = time.monotonic()
        try:
            # Greedy: a difference between two answers is one between the models.
            reply = client.chat(messages, temperature=0.0, max_new_tokens=self._longest)
        except Phi3Error as error:
            return Heard("", one_line(str(error)), time.monotonic() - started)
        return Heard(reply.text, fault_of(reply.text), time.monotonic() - started)


def fault_of(text: str) -> str:
    """Why a text is no answer of a model of chats; empty where it may be one."""
    shown = "".join(text.split())
    if not shown:
        return "an empty answer"
    # U+FFFD stands for bytes that were no UTF-8; the others are control characters, halves of a
    # pair and private use. Not Cf: emoji are joined with one of those.
    if any(c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cs", "Co") for c in shown):
        return "unprintable characters"
    if not any(c.isalnum() for c in shown):
        return "no word in it"
    words = text.lower().split()
    if len(words) >= _LOOP_WORDS and len(set(words)) <= _LOOP_VOCABULARY:
        return "the same words again and again"
    return ""


def judge(
    asked: Sequence[Golden],
    green: Sequence[Heard],
    blue: Sequence[Heard],
    settings: RolloutSection,
    against: str,
    metrics: Sequence[Metric],
) -> Judgement:
    """Whether the answers of the new deployment, `green`, are worse than those of `against`."""
    # The questions may repeat; what is no answer counts as that, not as a wrong one as well.
    answered_in_both = [i for i in range(len(asked)) if not green[i].fault and not blue[i].fault]
    once = {id(asked[i]): i for i in answered_in_both}.values()
    rows = make_rows(
        [asked[i].question for i in once],
        [Answered(Said(blue[i].text), None) for i in once],
        [Answered(Said(green[i].text), None) for i in once],
    )
    lost, failed = _losses(rows, settings.max_loss, metrics), _failed(asked, green, blue, settings)
    # One text for all questions, where there were different ones before.
    texts, before_texts = ({row[side].strip() for row in rows} for side in ("after", "before"))
    same = ""
    if len(rows) >= FEWEST_ROWS and len(texts) == 1 and texts != {""} and len(before_texts) > 1:
        same = (
            f"all {len(rows)} questions got the same text {_cut(min(texts))}; not so of {against}"
        )
    # Times are compared only where both answered: a fault may come at once, or after a timeout.
    slow, times = "", []
    both = [
        (g.seconds, b.seconds) for g, b in zip(green, blue, strict=True) if not (g.fault or b.fault)
    ]
    if any(seconds for _, seconds in both):  # the evaluation's answers have none
        now_p95, was_p95 = (
            sorted(side)[math.ceil(0.95 * len(side)) - 1] for side in zip(*both, strict=True)
        )
        times = [f"p95 {now_p95:.2f} s ({was_p95:.2f} s)"]
        if now_p95 > settings.max_p95_ratio * was_p95 + _P95_SLACK:
            slow = (
                f"95 % of the answers took up to {now_p95:.2f} s, {was_p95:.2f} s before; "
                f"{settings.max_p95_ratio:g} times as long is allowed (azure.rollout.max_p95_ratio)"
            )
    answered, before = (f"{len(h) - _faults(h)} of {len(h)}" for h in (green, blue))
    right = [row for row in rows if row["after_right"] is not None]
    shown = [f"{answered} answered ({against}: {before})"]
    if right:
        now = sum(bool(row["after_right"]) for row in right)
        was = sum(bool(row["before_right"]) for row in right)
        shown.append(f"{now} of {len(right)} right ({was})")
    return Judgement(
        ", ".join([*shown, *times]), tuple(text for text in (failed, lost, same, slow) if text)
    )


def _faults(heard: Sequence[Heard]) -> int:
    return sum(bool(one.fault) for one in heard)


def _failed(
    asked: Sequence[Golden],
    green: Sequence[Heard],
    blue: Sequence[Heard],
    settings: RolloutSection,
) -> str:
    """Too many requests without a real answer."""
    gain = (_faults(green) - _faults(blue)) / len(asked)
    if gain <= settings.max_error_gain:
        return ""
    pairs = zip(asked, green, blue, strict=True)
    named = [
        f"{_cut(golden.question.prompt[-1]['content'])}: {now.fault}"
        f"{f' {now.text[:_SHOWN]!r}' if now.text else ''}; before {_cut(was.text)}"
        for golden, now, was in pairs
        if now.fault and not was.fault
    ]
    return _with_named(
        f"{_faults(green)} of {len(asked)} requests got no real answer ({_faults(blue)} before); "
        f"{settings.max_error_gain:.0%} more are allowed (azure.rollout.max_error_gain)",
        named,
    )


def _losses(rows: Sequence[Row], allowed: float, metrics: Sequence[Metric]) -> str:
    """Fewer right answers than before, by the gate's metrics."""
    for metric in metrics:
        chosen = [row for row in rows if row["after_scores"].get(metric.name) is not None]
        if len(chosen) < FEWEST_ROWS:
            continue
        gain = compare(chosen, [metric], confidence=0.95, resamples=1000, seed=0)[metric.name]
        if gain.change >= -allowed:
            continue
        worse = sorted(
            chosen,
            key=lambda r: (
                float(r["after_scores"][metric.name]) - float(r["before_scores"][metric.name])
            ),
        )
        named = [
            f"{_cut(row['question'])}: {_cut(row['after'])}; expected {_cut(row['expected'])}, "
            f"before {_cut(row['before'])}"
            for row in worse
            if row["after_scores"][metric.name] < row["before_scores"][metric.name]
        ]
        return _with_named(
            f"{metric.label} on {len(chosen)} questions: {metric.text(gain.before)} → "
            f"{metric.text(gain.after)} (95 % interval of the change {metric.change(gain.low)} to "
            f"{metric.change(gain.high)}{metric.unit}); a loss of at most "
            f"{metric.change(allowed, '')}{metric.unit} is allowed (azure.rollout.max_loss)",
            named,
        )
    return ""


def _with_named(text: str, named: Sequence[str]) -> str:
    more = [f"… and {len(named) - _NAMED} more"] if len(named) > _NAMED else []
    return "\n    ".join([text, *named[:_NAMED], *more])


def _cut(text: str) -> str:
    plain = " ".join(text.split())
    return f'"{plain if len(plain) <= _SHOWN else plain[: _SHOWN - 1] + "…"}"'


# --- Azure Monitor: what the service itself counted, a second voice ---
# Its metric RequestsPerMinute has one value a minute for each deployment and class of status, and
# comes some minutes late: a quiet endpoint has none, so nothing depends on it alone. Not yet run
# against live Azure.

_API = "2023-10-01"
_METRIC = "RequestsPerMinute"
# Seconds to connect and to read: a rollout does not wait for what it can do without.
_PATIENCE = 10.0
# Fewer say nothing about a share of a few percent.
FEWEST_REQUESTS = 50


@dataclass(frozen=True)
class Counted:
    """Requests of one deployment, and those of them without a status of 2xx."""

    requests: float
    failed: float

    @property
    def share(self) -> float:
        """The share that failed."""
        return self.failed / self.requests if self.requests else 0.0


def counted(
    clients: Clients, endpoint: str, deployment: str, minutes: float, now: datetime | None = None
) -> Counted | None:
    """A deployment's requests of the last `minutes`; None where Azure Monitor has none to give."""
    from azure.core.exceptions import AzureError
    from azure.core.rest import HttpRequest

    ends = now or datetime.now(UTC)
    span = [(ends - timedelta(minutes=minutes)), ends]
    path = f"{clients.place.workspace_id()}/onlineEndpoints/{endpoint}"
    request = HttpRequest(
        "GET",
        f"{ARM}{path}/providers/Microsoft.Insights/metrics",
        params={
            "api-version": _API,
            "metricnames": _METRIC,
            "aggregation": "Average",
            "interval": "PT1M",
            "timespan": "/".join(f"{moment:%Y-%m-%dT%H:%M:%SZ}" for moment in span),
            "$filter": f"deployment eq '{deployment}' and statusCodeClass eq '*'",
        },
    )
    try:
        with clients.arm() as pipeline:
            response = pipeline.send_request(
                request, retry_total=1, connection_timeout=_PATIENCE, read_timeout=_PATIENCE
            )
            response.raise_for_status()
            metrics = response.json()["value"]
        if not isinstance(metrics, list):
            return None
        requests = failed = 0.0
        # One time series for each class of status.
        for series in [item for metric in metrics for item in metric["timeseries"]]:
            labels = {str(m["name"]["value"]).lower(): m["value"] for m in series["metadatavalues"]}
            # A value is a rate per minute, averaged over one minute: so many requests.
            count = sum(float(point.get("average") or 0.0) for point in series["data"])
            requests += count
            is_good = str(labels.get("statuscodeclass", "")).startswith("2")
            failed += 0.0 if is_good else count
        return Counted(requests, failed) if requests else None
    except AzureError as error:
        log.info("no metrics of %s: %s", endpoint, message_of(error))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.info("the metrics of %s could not be read: %s", endpoint, type(error).__name__)
    return None
