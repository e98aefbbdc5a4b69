"""What a machine costs per hour where that is known; a dated table, no call.

Only rows with a source are here: for anything else the price page is named, not a guess.
"""

from __future__ import annotations

from dataclasses import dataclass

PRICE_PAGE = "https://azure.microsoft.com/pricing/details/machine-learning/"
# US dollars per hour and machine, Linux, pay as you go, without reservations or discounts.
TABLE_REGION, TABLE_DATE = "eastus", "2026-11-09"
TABLE = {
    "standard_nc24ads_a100_v4": 3.673,
    "standard_nc40ads_h100_v5": 6.98,
}
_HOURS_PER_MONTH = 730


@dataclass(frozen=True)
class Price:
    """What some machines cost together; `per_hour` None where it is not known."""

    size: str
    count: int
    region: str
    per_hour: float | None

    def text(self) -> str:
        """A few words for a line of the plan or of the status."""
        if self.per_hour is None:
            return f"price of {self.size} not known here: see {PRICE_PAGE}"
        month = self.per_hour * _HOURS_PER_MONTH
        said = f"{self.per_hour:.2f} USD per hour, {month:,.0f} per month if left on"
        where = f"list price of {TABLE_REGION}, {TABLE_DATE}"
        return f"{said} ({where})"


def price_of(size: str, count: int, region: str) -> Price:
    """The price of `count` machines; known for the table's region alone."""
    each = TABLE.get(size.lower()) if region == TABLE_REGION else None
    return Price(size, count, region, None if each is None else each * count)
