"""Budgets of a resource group, as far as Azure checks them; none of them ever mails here.

learn.microsoft.com/rest/api/consumption/budgets.
"""

from __future__ import annotations

from .cloud import Cloud, need_group, on_get, public, route
from .wire import ARM, GROUP, AzureError, Reply, Request, bad

_KIND = "Microsoft.Consumption/budgets"
_BUDGET = GROUP + f"/providers/{_KIND}/{{budget}}"
_NOTIFICATIONS = 5  # the most that a budget has


@route("PUT", ARM, _BUDGET)
def put_budget(cloud: Cloud, request: Request) -> Reply:
    """Make a budget or change it."""
    need_group(cloud, request)
    given = request.json().get("properties") or {}
    start = str((given.get("timePeriod") or {}).get("startDate", ""))
    if given.get("category") != "Cost" or given.get("timeGrain") != "Monthly":
        raise AzureError(501, "NotRehearsed", "Budgets other than of a month's costs")
    if not isinstance(given.get("amount"), int | float) or given["amount"] <= 0:
        raise bad("The amount of a budget must be greater than 0.", "400")
    if start[8:10] != "01":
        raise bad("The start date of a budget must be the first of a month.", "400")
    notifications = given.get("notifications") or {}
    if len(notifications) > _NOTIFICATIONS:
        raise bad(f"A budget has at most {_NOTIFICATIONS} notifications.", "400")
    for name, notification in notifications.items():
        kinds = notification.get("thresholdType"), notification.get("operator")
        if kinds[0] not in ("Actual", "Forecasted") or kinds[1] != "GreaterThan":
            raise bad(f"The notification '{name}' is invalid.", "400")
        if not notification.get("contactEmails"):
            raise bad(f"The notification '{name}' has nobody to mail to.", "400")
    before = cloud.get(request.id(_BUDGET))
    budget = cloud.put(request.id(_BUDGET), _KIND, {"properties": given})
    return Reply(200 if before else 201, public(budget))


on_get(_BUDGET, lambda cloud, request: cloud.need(request.id(_BUDGET), "budget"))


@route("DELETE", ARM, _BUDGET)
def delete_budget(cloud: Cloud, request: Request) -> Reply:
    """Delete it."""
    return cloud.delete_now(request.id(_BUDGET))
