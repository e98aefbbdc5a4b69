"""Machine sizes: how many GPUs and cores, which quota family, and which exist no more.

What Azure lists for the region counts; the dated table here fills what it leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...errors import StageError
from .clients import Clients
from .failures import explained

TABLE_DATE = "2026-11-21"


@dataclass(frozen=True)
class Size:
    """One machine size. `extra_quota`: online deployments need a fifth more quota than they use."""

    name: str
    cores: int
    gpus: int
    family: str
    extra_quota: bool
    gpu: str = ""


_A100, _H100 = "standardNCADSA100v4Family", "standardNCADSH100v5Family"
_T4, _A10 = "standard NCASv3_T4 Family", "standardNVADSA10v5Family"
_NDAS, _NDAMS = "standard NDASv4_A100 Family", "standard NDAMSv4_A100Family"
TABLE = {
    size.name.lower(): size
    for size in (
        Size("Standard_NC24ads_A100_v4", 24, 1, _A100, False, "A100 80 GB"),
        Size("Standard_NC48ads_A100_v4", 48, 2, _A100, False, "A100 80 GB"),
        Size("Standard_NC96ads_A100_v4", 96, 4, _A100, False, "A100 80 GB"),
        Size("Standard_NC40ads_H100_v5", 40, 1, _H100, False, "H100 94 GB"),
        Size("Standard_NC80adis_H100_v5", 80, 2, _H100, False, "H100 94 GB"),
        Size("Standard_ND96asr_v4", 96, 8, _NDAS, False, "A100 40 GB"),
        Size(
            "Standard_ND96amsr_A100_v4", 96, 8, "standard NDAMSv4_A100Family", False, "A100 80 GB"
        ),
        Size("Standard_ND96isr_H100_v5", 96, 8, "standardNDSH100v5Family", False, "H100 80 GB"),
        Size("Standard_NC4as_T4_v3", 4, 1, _T4, True, "T4 16 GB"),
        Size("Standard_NC8as_T4_v3", 8, 1, _T4, True, "T4 16 GB"),
        Size("Standard_NC16as_T4_v3", 16, 1, _T4, True, "T4 16 GB"),
        Size("Standard_NC64as_T4_v3", 64, 4, _T4, True, "T4 16 GB"),
        Size("Standard_NV36ads_A10_v5", 36, 1, _A10, True, "A10 24 GB"),
        Size("Standard_DS3_v2", 4, 0, "standardDSv2Family", True),
        Size("Standard_D12_v2", 4, 0, "standardDv2Family", True),
    )
}
_K80, _V100 = "K80, retired 2023-08-31", "V100, retired 2025-09-30"
_P40, _P100 = "P40, retired 2023-08-31", "P100, retired 2023-08-31"
RETIRED = {
    **dict.fromkeys(("standard_nc6", "standard_nc12", "standard_nc24", "standard_nc24r"), _K80),
    **{f"standard_nc{n}_v2": _P100 for n in ("6s", "12s", "24s", "24rs")},
    **{f"standard_nc{n}_v3": _V100 for n in ("6s", "12s", "24s", "24rs")},
    **{f"standard_nd{n}": _P40 for n in ("6s", "12s", "24s", "24rs")},
}


def refuse_retired(name: str, key: str) -> None:
    """StageError for a size that exists no more; `key` is the recipe's key that names it."""
    if name.lower() in RETIRED:
        raise StageError(
            f"{key} {name} does not exist any more ({RETIRED[name.lower()]}). "
            f"Take another one: {key}=Standard_NC24ads_A100_v4"
        )


def known_size(name: str) -> Size | None:
    """The size as our table has it."""
    return TABLE.get(name.lower())


def find_size(clients: Clients, name: str, key: str) -> Size:
    """The size as the region offers it. StageError when it does not."""
    refuse_retired(name, key)
    place = clients.workplace
    with explained(f"Listing the machine sizes of {place.location}"):
        offered = list(clients.subscription.compute.list_sizes(location=place.location))
    for item in offered:
        if str(item.name).lower() == name.lower():
            return _size(item)
    known = known_size(name)
    if known is not None and not offered:
        return known
    like = sorted(str(item.name) for item in offered if _figures(item)[1])
    raise StageError(
        f"{key} {name} is not offered in {place.location}. GPU sizes there: "
        f"{', '.join(like) or 'none'}. Choose one of them ({key}=…) or another azure.location"
    )


def gpus_in(clients: Clients, name: str, key: str) -> int:
    """GPUs of one machine, at least one. StageError for a size without any."""
    size = find_size(clients, name, key)
    if size.gpus < 1:
        raise StageError(
            f"{key} {name} has no GPU, and fine-tuning needs one. Take {key}="
            "Standard_NC24ads_A100_v4"
        )
    return size.gpus


def refuse_outside(allowed: Iterable[str] | None, name: str, key: str, model: str) -> None:
    """StageError unless the model's list of sizes has `name`; no list allows every size."""
    refuse_retired(name, key)
    if allowed is None:
        return
    usable = [size for size in allowed if size.lower() not in RETIRED]
    if name.lower() not in (size.lower() for size in usable):
        raise StageError(
            f"{model} does not support {key} {name}. It supports: {', '.join(usable)}. "
            f"Set {key} to one of them"
        )


def _size(item: Any) -> Size:
    known = known_size(str(item.name))
    cores, gpus = _figures(item)
    family = getattr(item, "family", None) or (known.family if known else "")
    return Size(
        name=str(item.name),
        cores=cores or (known.cores if known else 0),
        gpus=gpus or (known.gpus if known else 0),
        family=str(family),
        extra_quota=known.extra_quota if known else _pays_extra(str(item.name)),
        gpu=known.gpu if known else "",
    )


def _figures(item: Any) -> tuple[int, int]:
    """Cores and GPUs; their names differ between versions of the SDK."""
    values = vars(item)
    cores = values.get("v_cp_us") or values.get("vCPUs") or 0
    return int(cores), int(values.get("gpus") or 0)


def _pays_extra(name: str) -> bool:
    """All NC A100 v4, NC H100 v5 and ND sizes are excepted from the 20 % rule."""
    lower = name.lower()
    excepted = lower.startswith("standard_nd") or lower.endswith(("_a100_v4", "_h100_v5"))
    return not excepted
