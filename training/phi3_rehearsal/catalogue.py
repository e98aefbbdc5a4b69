"""What Azure offers: sizes of machines, their quota families, and what may be deployed on them.

Dated 2026-11; cores and GPUs as Azure lists them. The V100 sizes are retired and so not here.
"""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    """One size of machine."""

    family: str
    cores: int
    memory_gb: float
    gpus: int = 0
    deployable: bool = True
    trains: bool = True
    # Whether a deployment needs a fifth more quota than it uses.
    reserve: bool = True


_A100, _H100 = "standardNCADSA100v4Family", "standardNCADSH100v5Family"
SIZES = {
    "Standard_NC24ads_A100_v4": Size(_A100, 24, 220, 1, reserve=False),
    "Standard_NC48ads_A100_v4": Size(_A100, 48, 440, 2, reserve=False),
    "Standard_NC96ads_A100_v4": Size(_A100, 96, 880, 4, reserve=False),
    "Standard_NC40ads_H100_v5": Size(_H100, 40, 320, 1, reserve=False),
    "Standard_NC80adis_H100_v5": Size(_H100, 80, 640, 2, reserve=False),
    "Standard_ND96asr_v4": Size("standard NDASv4_A100 Family", 96, 900, 8, reserve=False),
    "Standard_ND96amsr_A100_v4": Size("standard NDAMSv4_A100Family", 96, 1900, 8, reserve=False),
    "Standard_ND96isr_H100_v5": Size("standardNDSH100v5Family", 96, 1900, 8, reserve=False),
    "Standard_NC4as_T4_v3": Size("standard NCASv3_T4 Family", 4, 28, 1),
    "Standard_NC8as_T4_v3": Size("standard NCASv3_T4 Family", 8, 56, 1),
    "Standard_NC16as_T4_v3": Size("standard NCASv3_T4 Family", 16, 110, 1),
    "Standard_NC64as_T4_v3": Size("standard NCASv3_T4 Family", 64, 440, 4),
    "Standard_NV36ads_A10_v5": Size("standardNVADSA10v5Family", 36, 440, 1),
    "Standard_D12_v2": Size("standardDv2Family", 4, 28, deployable=False),
    "Standard_DS3_v2": Size("standardDSv2Family", 4, 14),
    "Standard_DS4_v2": Size("standardDSv2Family", 8, 28),
    "Standard_D4s_v3": Size("standardDSv3Family", 4, 16),
    "Standard_E4s_v3": Size("standardESv3Family", 4, 32),
    "Standard_F4s_v2": Size("standardFSv2Family", 4, 8),
}
# Cores of each family that a new rehearsal may use, where it is not this many.
DEFAULT_QUOTA = 100
FAMILY_QUOTA = {_A100: 96, _H100: 80, "standardNDSH100v5Family": 0}


def find_size(name: str) -> tuple[str, Size] | None:
    """The size in Azure's spelling; Azure does not tell cases apart."""
    for real, size in SIZES.items():
        if real.lower() == name.lower():
            return real, size
    return None
