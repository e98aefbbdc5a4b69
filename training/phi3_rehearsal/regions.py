"""The regions of Azure, and where a request is: its region and its resource group."""

from __future__ import annotations

from typing import Any

from .cloud import Cloud
from .wire import GROUP, AzureError, Json, Request, bad

REGIONS = (
    *("eastus", "eastus2", "westus", "westus2", "westus3", "centralus", "northcentralus"),
    *("southcentralus", "northeurope", "westeurope", "uksouth", "francecentral", "polandcentral"),
    *("germanywestcentral", "swedencentral", "switzerlandnorth", "italynorth", "japaneast"),
    *("australiaeast", "canadacentral", "brazilsouth", "southeastasia", "eastasia"),
    *("koreacentral", "centralindia"),
)


def need_group(cloud: Cloud, request: Request) -> Json:
    """The resource group of the request. Raises AzureError (404)."""
    found = cloud.get(request.id(GROUP))
    if found is None:
        name = request.args["rg"]
        raise AzureError(
            404, "ResourceGroupNotFound", f"Resource group '{name}' could not be found."
        )
    return found


def check_location(value: Any) -> str:
    """The region, in Azure's own spelling. Raises AzureError (400)."""
    location = str(value or "").replace(" ", "").lower()
    if location not in REGIONS:
        raise bad(
            f"The provided location '{value}' is not available for resource type "
            "'Microsoft.MachineLearningServices/workspaces'.",
            "LocationNotAvailableForResourceType",
        )
    return location
