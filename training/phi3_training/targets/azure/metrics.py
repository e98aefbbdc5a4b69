"""What the service itself counted of an endpoint's requests: a rollout's second voice.

Reads Azure Monitor's metric RequestsPerMinute by deployment and class of status. It has one value a
minute and comes some minutes late, so a quiet endpoint has none, and nothing depends on it alone.
Not yet run against live Azure.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from .clients import ARM, Clients
from .failures import message_of

log = logging.getLogger(__name__)
_API = "2023-10-01"
_METRIC = "RequestsPerMinute"
# A rollout does not wait for what it can do without; seconds.
_LIMITS: Mapping[str, Any] = {"retry_total": 1, "connection_timeout": 10.0, "read_timeout": 10.0}
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
            response = pipeline.send_request(request, **_LIMITS)
            response.raise_for_status()
            return _read(response.json())
    except AzureError as error:
        log.info("no metrics of %s: %s", endpoint, message_of(error))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.info("the metrics of %s could not be read: %s", endpoint, type(error).__name__)
    return None


def _read(content: Mapping[str, object]) -> Counted | None:
    """The sums of an answer's time series, of which there is one for each class of status."""
    metrics = content["value"]
    if not isinstance(metrics, list):
        return None
    requests = failed = 0.0
    for series in [item for metric in metrics for item in metric["timeseries"]]:
        labels = {str(m["name"]["value"]).lower(): m["value"] for m in series["metadatavalues"]}
        # A value is a rate per minute, averaged over one minute: so many requests.
        count = sum(float(point.get("average") or 0.0) for point in series["data"])
        requests += count
        failed += 0.0 if str(labels.get("statuscodeclass", "")).startswith("2") else count
    return Counted(requests, failed) if requests else None
