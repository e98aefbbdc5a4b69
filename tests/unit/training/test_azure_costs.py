"""What bills, how much so far and until when; prices from Azure's list and from the table."""

from __future__ import annotations

import datetime as dt
import json
import os
from pathlib import Path
from typing import Any

import pytest

from phi3_training.targets.azure.costs import Price, Prices, plain_prices
from phi3_training.targets.azure.deadline import Deadline
from phi3_training.targets.azure.status import (
    Cluster,
    Deployment,
    Endpoint,
    Inventory,
    sum_of,
)

GPU, REGION = "Standard_NC24ads_A100_v4", "eastus"
TODAY = dt.date(2026, 11, 29)
NOW = dt.datetime(2026, 11, 29, 10, tzinfo=dt.timezone.utc)
HOUR = dt.timedelta(hours=1)
PRICE = Price(3.673, 3.673, "list price of eastus, 2026-11-29")


def row(price: float = 3.673, **more: Any) -> dict[str, Any]:
    """A row as Azure's list has it."""
    values = {
        "currencyCode": "USD",
        "retailPrice": price,
        "armRegionName": REGION,
        "armSkuName": GPU,
        "productName": "Virtual Machines NCads A100 v4 Series",
        "meterName": "NC24ads A100 v4",
        "skuName": "NC24ads A100 v4",
        "unitOfMeasure": "1 Hour",
        "type": "Consumption",
        "isPrimaryMeterRegion": True,
        "effectiveStartDate": "2023-01-01T00:00:00Z",
    }
    return {**values, **more}


class Listed:
    """Azure's list: answers with these rows, page by page, and counts what it was asked."""

    def __init__(self, rows: list[dict[str, Any]] | Exception) -> None:
        self.rows = rows
        self.asked: list[dict[str, str]] = []

    def __call__(self, _url: str, query: dict[str, str], _seconds: float) -> dict[str, Any]:
        self.asked.append(query)
        if isinstance(self.rows, Exception):
            raise self.rows
        start = int(query["$skip"])
        return {"Items": self.rows[start : start + 100], "NextPageLink": None}


@pytest.mark.parametrize(
    "other",
    [
        {"productName": "Virtual Machines NCads A100 v4 Series Windows"},
        {"skuName": "NC24ads A100 v4 Spot"},
        {"meterName": "NC24ads A100 v4 Low Priority"},
        {"type": "Reservation"},
        {"type": "DevTestConsumption"},
        {"isPrimaryMeterRegion": False},
        {"armRegionName": "westus"},
        {"armSkuName": "Standard_NC48ads_A100_v4"},
        {"unitOfMeasure": "1/Month"},
        {"effectiveStartDate": "2027-01-01T00:00:00Z"},
        {"retailPrice": 0},
        {"retailPrice": None},
    ],
)
def test_only_a_plain_linux_machine_counts(other: dict[str, Any]) -> None:
    assert plain_prices([row(0.5, **other), row()], GPU, REGION, TODAY) == [3.673]
    assert plain_prices([row(0.5, **other)], GPU, REGION, TODAY) == []


def test_the_latest_price_counts_and_two_of_them_are_a_range() -> None:
    newer = {"effectiveStartDate": "2026-01-01T00:00:00Z"}
    assert plain_prices([row(9), row(4, **newer), row(3, **newer)], GPU, REGION, TODAY) == [3, 4]
    assert Price(3, 4, "here").per_hour(2) == "6.00 to 8.00"


def test_a_price_is_asked_once_a_day(tmp_path: Path) -> None:
    listed, path = Listed([row(3.5)]), tmp_path / "prices.json"
    for size in (GPU, GPU.upper()):
        price = Prices(listed, path).hourly(size, REGION)
        assert price is not None
        assert (price.low, price.high) == (3.5, 3.5)
        assert f"list price of {REGION}, {dt.datetime.now(dt.timezone.utc):%Y-%m-%d}" in price.text(
            1
        )
    assert len(listed.asked) == 1
    assert f"armSkuName eq '{GPU}'" in listed.asked[0]["$filter"]
    content = json.loads(path.read_text())
    content[f"{REGION}/{GPU}"]["asked"] -= 25 * 3600
    path.write_text(json.dumps(content))
    Prices(listed, path).hourly(GPU, REGION)
    assert len(listed.asked) == 2


def test_all_pages_are_read_without_a_link(tmp_path: Path) -> None:
    windows = row(productName="X Windows")
    listed = Listed([windows] * 100 + [row(3.5)])
    price = Prices(listed, tmp_path / "prices.json").hourly(GPU, REGION)
    assert price is not None
    assert price.high == 3.5


@pytest.mark.parametrize("rows", [[], ConnectionError("no network"), ValueError("no JSON")])
def test_without_azures_list_the_table_speaks_for_its_region(tmp_path: Path, rows: Any) -> None:
    listed = Listed(rows)
    prices = Prices(listed, tmp_path / "prices.json")
    assert prices.text(GPU, 2, REGION).startswith("7.35 USD per hour, 5,363 per month")
    assert "2026-11-09" in prices.text(GPU, 2, REGION)
    asked = len(listed.asked)
    assert "unknown: see" in prices.text(GPU, 1, "westeurope")
    assert "unknown: see" in prices.text("Standard_NC4as_T4_v3", 1, REGION)
    if isinstance(rows, Exception):
        assert len(listed.asked) == asked  # not waited for again


def test_an_unreadable_cache_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text('{"eastus/x": {"asked": "never"}}')
    price = Prices(Listed([row(3.5)]), path).hourly(GPU, REGION)
    assert price is not None
    if os.name == "posix" and os.geteuid() != 0:
        folder = tmp_path / "shut"
        folder.mkdir(mode=0o500)
        assert Prices(Listed([row(3.5)]), folder / "x.json").hourly(GPU, REGION) is not None


def deployment(name: str, **more: Any) -> Deployment:
    values = {"state": "succeeded", "size": GPU, "count": 1, "traffic": 0, "price": PRICE}
    return Deployment(name=name, **{**values, **more})


def test_what_bills_names_state_size_price_and_end() -> None:
    ends = Deadline("ep", NOW + 2 * HOUR)
    found = Inventory(
        endpoints=[
            Endpoint(
                *("ep", "succeeded", "key", "my-run"),
                (
                    deployment("good", since=NOW - 3 * HOUR),
                    deployment("bad", state="failed", count=2, size="Odd", price=None),
                ),
                ends,
            ),
            Endpoint(
                "free", "succeeded", "key", "my-run", (deployment("old"),), Deadline("x", None)
            ),
        ],
        clusters=[
            Cluster("idle", "succeeded", GPU, 0, 1, 0, PRICE),
            Cluster("busy", "succeeded", GPU, 0, 4, 3, PRICE),
            Cluster("dark", "succeeded", GPU, 0, 1, None, PRICE),
        ],
    )

    bills = found.bills(now=NOW)
    good, bad, old, busy, dark = (bill.text for bill in bills)

    assert "1 x Standard_NC24ads_A100_v4; 3.67 USD per hour (list price" in good
    assert "about 11.02 so far, at most 7.35 more until 2026-11-29 12:00 UTC (in 2 h)" in good
    assert "failed: still bills; price of Odd unknown: see https://azure" in bad
    assert "2,681 per month if left on" in old
    assert busy.startswith(f"cluster busy: 3 x {GPU}; 11.02 USD")
    assert "dark: bills while it has nodes" in dark
    assert sum_of(bills) == (
        "sum: 18.37 USD per hour, about 11.02 so far by deployments, at most 7.35 more until the "
        "deadlines; 14.69 per hour of it without a deadline; not counted: 2 without a known price"
    )
    assert len(found.bills("another-run", NOW)) == 0
    assert len(found.bills("my-run", NOW)) == 3


def test_a_deadline_that_does_not_hold_promises_nothing() -> None:
    broken = Deadline("ep", NOW + HOUR, "the workflow has no role")
    found = Inventory(endpoints=[Endpoint("ep", "s", "key", "r", (deployment("d"),), broken)])
    (bill,) = found.bills(now=NOW)
    assert bill.until_deadline is None
    assert any("NO deadline holds: the workflow has no role" in line for line in found.lines())


def test_an_inventory_says_whose_and_what_it_could_not_read() -> None:
    found = Inventory(
        endpoints=[
            Endpoint("a", "succeeded", "key", "my-run"),
            Endpoint("b", "succeeded", "key", "another-run"),
            Endpoint("c", "succeeded", "key", None),
        ],
        unknown=["clusters (no right)"],
    )

    told = found.lines(["my-run"])

    assert "endpoint b: succeeded, key, owner another-run" in told
    assert "endpoint c: succeeded, key, owner somebody else" in told
    assert not any("endpoint a" in line for line in told)
    assert "bills now: nothing by the hour" in told
    assert "could not be read: clusters (no right)" in told
