"""The figures of a whole run: scores, latency, failed lines. A failed line counts as all wrong.

Reads the record of the scored run where it is named; logs metrics, returns what failed and why.
"""

import logging

from base_run import record_of, runs_are_kept_here
from promptflow.core import log_metric, tool
from score_line import NO_ANSWER

log = logging.getLogger(__name__)

SCORES = ("exact_match", "token_f1", "rouge_l")
PERCENTILES = (50, 90, 95, 99)
NAMED = 20  # failed lines in a metric, which is one line of `pf run show-metrics`


@tool
def aggregate(lines: list, base_run: list) -> dict:
    if lines and all(line["error"] == NO_ANSWER for line in lines):
        raise ValueError(
            "No line has an answer: map its column, --column-mapping "
            "answer='${run.outputs.answer}', or '${data.answer}' for rows of `phi3 batch`"
        )
    name = next((run for run in base_run if run), "")
    record = record_of(name) if name else None
    if name and record is None:
        unseen = f"The run {name!r} has no record on this machine: failed lines are not counted"
        if runs_are_kept_here():  # a name that is wrong must not pass for a run without failures
            raise ValueError(f"{unseen}; see `pf run list` for its name")
        log.warning(unseen)
    if record is None:
        counted = len(lines)
        failures = [(line["line_number"], line["error"]) for line in lines if line["error"]]
        seconds = [line["seconds"] for line in lines if line["seconds"] is not None]
    else:
        counted = len(record)
        failures = [(line.number, line.error) for line in record if line.error]
        seconds = [line.seconds for line in record if line.seconds is not None and not line.error]
    metrics = {"lines": counted, "failed": len(failures)}
    # A failed line counts as all wrong: a mean over the others would reward failing.
    metrics["error_rate"] = len(failures) / counted if counted else 0.0
    for score in SCORES:
        metrics[score] = sum(line[score] for line in lines) / counted if counted else 0.0
    for share in PERCENTILES if seconds else ():
        metrics[f"latency_p{share}_ms"] = round(1000 * percentile(seconds, share), 1)
    for key, value in metrics.items():
        log_metric(key, value)
    if failures and runs_are_kept_here():  # elsewhere a metric can only be a number
        log_metric("failed_lines", shortened([str(number) for number, _ in failures]))
    return {"metrics": metrics, "failed": {str(number): error for number, error in failures}}


def shortened(names: list) -> str:
    """The first names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def percentile(values: list, share: int) -> float:
    """The value below which this share of the values is, interpolated between two of them."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
