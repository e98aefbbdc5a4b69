"""A budget on the resource group that mails: the second belt where no deadline can be made.

It stops nothing and comes late: Azure's figures are 8 to 24 hours old, and budgets are looked at
once a day ("Cost Management: budgets"). Never verified on live Azure.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any

from ...errors import UsageError
from .clients import Clients
from .failures import explained

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

    def notification(kind: str, threshold: int) -> dict[str, Any]:
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
