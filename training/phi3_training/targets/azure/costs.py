"""What a machine costs per hour by Azure's public price list, and a budget that mails.

Asks the Retail Prices API (anonymous) and keeps its answers for a day in <cache>/azure-prices.json;
never waits longer than ten seconds in all, and never takes "not found" for a price of 0. The dated
table of sizes.py is the fallback.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from ...errors import UsageError
from ...models.catalogue import cache_folder
from ...run import write_atomically
from .clients import Clients
from .failures import explained
from .sizes import PRICE_DATE, PRICE_PAGE, PRICE_REGION, TABLE

log = logging.getLogger(__name__)

# learn.microsoft.com/rest/api/cost-management/retail-prices/azure-retail-prices
PRICES_API = "https://prices.azure.com/api/retail/prices"
_VERSION = "2023-01-01-preview"  # from here on values are compared with their case
_KEPT_SECONDS = 24 * 3600.0
LIMIT_SECONDS = 10.0  # for all that one command asks
_PAGES = 5  # the pages hold 100 rows; one size in one region has about ten
_HOURS_PER_MONTH = 730
# In product, meter or SKU of what is not a plain Linux machine.
_OTHER_OFFERS = ("windows", "spot", "low priority", "cloud services", "cloudservices")
Ask = Callable[[str, dict[str, str], float], Any]  # URL, query, seconds: the JSON of the answer


@dataclass(frozen=True)
class Price:
    """US dollars per hour of one machine, Linux, pay as you go; a range where Azure lists two."""

    low: float
    high: float
    source: str

    def text(self, count: int) -> str:
        """What `count` machines cost together, in a few words."""
        return f"{self.per_hour(count)} USD per hour, {self.per_month(count)} ({self.source})"

    def per_month(self, count: int) -> str:
        """`2,681 per month if left on`."""
        return f"{self.high * count * _HOURS_PER_MONTH:,.0f} per month if left on"

    def per_hour(self, count: int) -> str:
        """`3.67`, or `3.67 to 4.10`."""
        low, high = f"{self.low * count:.2f}", f"{self.high * count:.2f}"
        return low if low == high else f"{low} to {high}"


class _Entry(TypedDict):
    """What the file keeps of one size in one region: when it was asked, and the prices."""

    asked: float  # seconds since 1970
    prices: list[float]


class Prices:
    """Prices by size and region; `ask` reaches Azure's list."""

    def __init__(self, ask: Ask, path: Path | None = None) -> None:
        self._ask = ask
        self._path = path or cache_folder() / "azure-prices.json"
        self._left = LIMIT_SECONDS

    def hourly(self, size: str, region: str) -> Price | None:
        """The price of a machine; None where neither Azure nor the table knows it."""
        known = TABLE.get(size.lower())
        name = known.name if known else size  # Azure ML answers sizes in capitals
        live = self._live(name, region)
        if live is not None:
            return live
        if known is None or known.usd_per_hour is None or region != PRICE_REGION:
            return None
        usd = known.usd_per_hour
        return Price(usd, usd, f"list price of {PRICE_REGION}, {PRICE_DATE}")

    def text(self, size: str, count: int, region: str) -> str:
        """What `count` machines cost together, or where to look it up."""
        price = self.hourly(size, region)
        return price.text(count) if price else f"price of {size} unknown: see {PRICE_PAGE}"

    def _live(self, size: str, region: str) -> Price | None:
        key = f"{region}/{size}"
        # What was asked within the last day; nothing where the file is not ours to read.
        kept: dict[str, _Entry] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            content = json.loads(self._path.read_text(encoding="utf-8"))
            oldest = time.time() - _KEPT_SECONDS
            kept = {
                name: {"asked": float(one["asked"]), "prices": [float(p) for p in one["prices"]]}
                for name, one in content.items()
                if oldest < float(one["asked"]) <= time.time()
            }
        entry = kept.get(key)
        if entry is None:
            try:
                found = self._rows(size, region)
            except Exception as error:  # noqa: BLE001 - no price is worth a failed command
                log.info("no live price of %s: %s", size, type(error).__name__)
                self._left = 0.0  # whatever it was, the next size would wait for it again
                return None
            prices = plain_prices(found, size, region, dt.datetime.now(dt.timezone.utc).date())
            # An empty list is kept as well: the size is not sold there, or not by that name.
            entry = {"asked": time.time(), "prices": prices}
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._path, json.dumps({**kept, key: entry}, indent=1) + "\n")
            except OSError as error:
                log.info("prices are not kept: %s", error)
        if not entry["prices"]:
            return None
        day = dt.datetime.fromtimestamp(entry["asked"], dt.timezone.utc).date()
        return Price(entry["prices"][0], entry["prices"][-1], f"list price of {region}, {day}")

    def _rows(self, size: str, region: str) -> list[dict[str, object]]:
        """All rows of Azure's list. Raises what the transport raises; ValueError for other JSON."""
        query = {
            "api-version": _VERSION,
            "currencyCode": "'USD'",
            "$filter": f"serviceName eq 'Virtual Machines' and armRegionName eq '{region}' and "
            f"armSkuName eq '{size}' and priceType eq 'Consumption'",
        }
        rows: list[dict[str, object]] = []
        for page in range(_PAGES):
            if self._left <= 0:
                raise TimeoutError("the time for prices is used up")
            started = time.monotonic()
            try:
                answer = self._ask(PRICES_API, {**query, "$skip": str(100 * page)}, self._left)
            finally:
                self._left -= time.monotonic() - started
            items = answer.get("Items")
            if not isinstance(items, list):
                raise ValueError("the answer has no list of items")  # noqa: TRY004 - of its content
            rows += [item for item in items if isinstance(item, dict)]
            # NextPageLink was empty with 100 items on the page in 2023, so the count decides.
            if len(items) < 100:
                break
        return rows


def plain_prices(
    rows: list[dict[str, object]], size: str, region: str, today: dt.date
) -> list[float]:
    """The prices per hour of a plain Linux machine that hold today, lowest first."""
    latest: dict[str, list[float]] = {}
    for row in rows:
        words = " ".join(str(row.get(k, "")) for k in ("productName", "meterName", "skuName"))
        price, since = row.get("retailPrice"), str(row.get("effectiveStartDate", ""))[:10]
        if (
            row.get("type") == "Consumption"
            and row.get("isPrimaryMeterRegion", True)
            and row.get("armSkuName") == size
            and row.get("armRegionName") == region
            and row.get("currencyCode", "USD") == "USD"
            and row.get("unitOfMeasure") == "1 Hour"
            and not any(other in words.lower() for other in _OTHER_OFFERS)
            and isinstance(price, int | float)
            and price > 0
            and since <= today.isoformat()
        ):
            latest.setdefault(since, []).append(float(price))
    return sorted(set(latest[max(latest)])) if latest else []


# --- a budget that mails: the second belt where no deadline can be made ---
# It stops nothing and comes late: Azure's figures are 8 to 24 hours old, and budgets are looked at
# once a day ("Cost Management: budgets"). Never verified on live Azure.

BUDGETS_API = "2024-08-01"
_NAME = "phi3-promptflow"


def set_budget(clients: Clients, amount: float, mails: Sequence[str]) -> str:
    """Make or change the group's budget; a line for a person.

    `amount` is per month, in the billing account's currency. Raises UsageError for what is none,
    StageError where Azure refuses.
    """
    wrong = [mail for mail in mails if "@" not in mail]
    if amount <= 0 or wrong:
        raise UsageError("Expected an amount above 0 and addresses such as me@example.com")
    place, month = clients.place, dt.datetime.now(dt.timezone.utc).replace(day=1)

    def notification(kind: str, threshold: int) -> dict[str, object]:
        return {
            "enabled": True,
            "operator": "GreaterThan",
            "threshold": threshold,
            "thresholdType": kind,
            "contactEmails": list(mails),
        }

    body: Any = {
        "properties": {
            "category": "Cost",
            "amount": amount,
            "timeGrain": "Monthly",
            "timePeriod": {
                "startDate": f"{month:%Y-%m-%d}T00:00:00Z",
                "endDate": f"{month.replace(year=month.year + 5):%Y-%m-%d}T00:00:00Z",
            },
            "notifications": {
                "actual80": notification("Actual", 80),
                "forecast100": notification("Forecasted", 100),
            },
        }
    }
    arm_id = place.resource_id("Microsoft.Consumption/budgets", _NAME)
    resources = clients.resources.resources
    with explained(f"Setting the budget of {place.resource_group}"):
        resources.begin_create_or_update_by_id(arm_id, body, api_version=BUDGETS_API).result()
    return (
        f"budget of {place.resource_group}: {amount:g} per month mails {', '.join(mails)} at 80 % "
        "spent and 100 % forecast. It comes up to a day late and stops nothing"
    )
