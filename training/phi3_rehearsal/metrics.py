"""Azure Monitor's metric RequestsPerMinute of an endpoint, counted from the journal of calls.

Names, dimensions and filter as in "Supported metrics for
Microsoft.MachineLearningServices/workspaces/onlineEndpoints" and "Metrics - List"
(learn.microsoft.com). Azure's figures come some minutes late; these are there at once. They go by
the machine's time, as the clients' time spans do. Copies of requests are not counted.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections import Counter

from .cloud import Cloud, route
from .endpoints import ENDPOINT, need_endpoint
from .wire import ARM, AzureError, Json, Reply, Request, bad

_METRIC = "RequestsPerMinute"
# modelStatusCode is what the container answered, which is not distinguished here.
_DIMENSIONS = ("deployment", "statusCode", "statusCodeClass")
_CLAUSE = re.compile(r"(\w+) (eq|ne) '([^']*)'")
_MINUTE = dt.timedelta(minutes=1)


@route("GET", ARM, ENDPOINT + "/providers/Microsoft.Insights/metrics")
def get_metrics(cloud: Cloud, request: Request) -> Reply:
    """One value a minute for each combination of the dimensions that the filter names."""
    endpoint, query = need_endpoint(cloud, request), request.query
    if query.get("metricnames") != _METRIC:
        raise AzureError(501, "NotRehearsed", f"The metrics {query.get('metricnames')}")
    if query.get("interval", "PT1M") != "PT1M" or query.get("aggregation") != "Average":
        raise AzureError(501, "NotRehearsed", "Metrics other than an average of each minute")
    begins, ends = _span(query.get("timespan", ""))
    # `NAME eq 'VALUE' and NAME ne 'VALUE'`; '*' stands for every value.
    known = {name.lower(): name for name in _DIMENSIONS}
    clauses = []
    for part in query["$filter"].split(" and ") if query.get("$filter") else ():
        match = _CLAUSE.fullmatch(part.strip())
        if match is None or match[1].lower() not in known:
            raise bad(f"The filter '{part}' names no dimension of {_METRIC}.", "BadRequest")
        clauses.append((known[match[1].lower()], match[2], match[3]))
    asked = list(dict.fromkeys(name for name, _operator, _value in clauses))
    counts: Counter[tuple[tuple[str, ...], dt.datetime]] = Counter()
    for minute, values in _requests(cloud, endpoint, begins, ends):
        if all(
            (wanted == "*" or values[name].lower() == wanted.lower()) == (operator == "eq")
            for name, operator, wanted in clauses
        ):
            counts[tuple(values[name] for name in asked), minute] += 1
    series = [
        {
            "metadatavalues": [
                {"name": {"value": name.lower(), "localizedValue": name.lower()}, "value": value}
                for name, value in zip(asked, label, strict=True)
            ],
            "data": [
                {"timeStamp": f"{minute:%Y-%m-%dT%H:%M:%SZ}", "average": float(count)}
                for (own, minute), count in sorted(counts.items())
                if own == label
            ],
        }
        for label in sorted({label for label, _minute in counts})
    ]
    metric = {
        "id": f"{endpoint['id']}/providers/Microsoft.Insights/metrics/{_METRIC}",
        "type": "Microsoft.Insights/metrics",
        "name": {"value": _METRIC, "localizedValue": "Requests Per Minute"},
        "unit": "Count",
        "timeseries": series,
    }
    about = {"timespan": query["timespan"], "interval": "PT1M", "cost": 0}
    return Reply(200, {**about, "value": [metric]})


def _span(text: str) -> tuple[dt.datetime, dt.datetime]:
    """Begin, at the full minute as Azure Monitor takes it, and end. Raises AzureError."""
    try:
        begins, ends = (
            dt.datetime.fromisoformat(part.replace("Z", "+00:00")) for part in text.split("/")
        )
    except ValueError:
        raise bad(f"The timespan '{text}' is invalid.", "BadRequest") from None
    if begins.tzinfo is None or ends.tzinfo is None or begins >= ends:
        raise bad(f"The timespan '{text}' is invalid.", "BadRequest")
    return begins.replace(second=0, microsecond=0), ends


def _requests(
    cloud: Cloud, endpoint: Json, begins: dt.datetime, ends: dt.datetime
) -> list[tuple[dt.datetime, dict[str, str]]]:
    """The minute and the dimensions of each request that a deployment of the endpoint answered."""
    host = str(endpoint["properties"]["scoringUri"]).split("/")[2]
    found = []
    with (cloud.folder / "calls.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            # Few of the journal's lines are answers of a deployment: the others are not parsed.
            if '"deployment"' not in line:
                continue
            call = json.loads(line)
            moment = dt.datetime.fromtimestamp(call["time"], dt.timezone.utc)
            if call["host"] != host or not begins <= moment < ends:
                continue
            status = str(call["status"])
            # Azure's classes are 2xx, 4xx and 5xx; an answer that was lost counts as what it was.
            values = (call["deployment"], status, f"{status[0]}xx")
            minute = moment.replace(second=0, microsecond=0)
            found.append((minute, dict(zip(_DIMENSIONS, values, strict=True))))
    return found
