"""What ends on which day, who says so, and what to do: the one table of dates.

Reads the clock, or PHI3_TODAY (YYYY-MM-DD) for a look ahead. A date only ever warns: what runs on
this machine keeps running after it, and what Azure has retired is refused where a recipe names it.
"""

from __future__ import annotations

import datetime as dt
import os
import sys
from dataclasses import dataclass

from .errors import UsageError

WITHIN = 90  # days before an end at which `phi3 doctor` and `phi3 plan` begin to warn
CHECKED = dt.date(2026, 11, 29)  # the day on which the table was last compared with its sources

_LEARN = "https://learn.microsoft.com/azure"
_PYTHON = "https://devguide.python.org/versions/"
_PYPI = "https://pypi.org/project"
_PYTHON_311 = "make a new environment with Python 3.11: make up"
# The minor version that constraints/ resolves for.
_TESTED_PYTHON = 11
_DOCS = "https://github.com/MicrosoftDocs"
_NEWER = "upgrade phi3-promptflow, then make a new environment with the Python it names: make up"
_SIZES = f"{_DOCS}/azure-compute-docs/blob/main/articles/virtual-machines/sizes/retirement/"
_NEW_SIZE = "name Standard_NC24ads_A100_v4; find old names with: phi3 lint FOLDER"
_MODELS = f"{_DOCS}/azure-ai-docs/blob/main/articles/foundry/openai/includes/"
_ASSETS = "https://github.com/Azure/azureml-assets/pull/5103"
_NEW_MODEL = "set model.name_or_path to a model of: phi3 models"


@dataclass(frozen=True)
class Sunset:
    """A thing that ends. `date` None: no end is announced, but its version is pinned for a reason.

    `used`: the product depends on it, so its end concerns every user. Otherwise the row is for
    people who come from a tutorial, and nothing here needs to move. `python`: the row concerns
    only users of that version.
    """

    what: str
    date: dt.date | None
    source: str
    cure: str
    note: str = ""
    used: bool = False
    python: tuple[int, int] | None = None

    def as_dict(self, today: dt.date) -> dict[str, str | int | bool | None]:
        """Plain values for JSON; `days` from `today`, below 0 when it has passed."""
        return {
            "what": self.what,
            "date": None if self.date is None else self.date.isoformat(),
            "days": None if self.date is None else (self.date - today).days,
            "note": self.note,
            "used": self.used,
            "source": self.source,
            "do": self.cure,
        }

    def said(self, today: dt.date) -> str:
        """`Prompt flow, read-only in Azure: 2027-04-20, in 90 days`."""
        if self.date is None:
            return self.what
        days = (self.date - today).days
        counted = f"{abs(days)} day{'' if abs(days) == 1 else 's'}"
        when = "today" if days == 0 else f"in {counted}" if days > 0 else f"{counted} ago"
        return f"{self.what}: {self.date.isoformat()}, {when}"


TABLE = (
    # The end of a version of Python: five years after its October, announced as a month.
    *(
        Sunset(
            f"Python 3.{minor}, end of life",
            dt.date(2016 + minor, 10, 31),
            _PYTHON,
            _NEWER if minor >= _TESTED_PYTHON else _PYTHON_311,
            f"announced as {2016 + minor}-10"
            + ("; the version that constraints/ is made for" * (minor == _TESTED_PYTHON)),
            used=minor == _TESTED_PYTHON,
            python=(3, minor),
        )
        for minor in range(9, 14)
    ),
    Sunset(
        "Prompt flow, end of feature development",
        dt.date(2026, 4, 20),
        f"{_LEARN}/machine-learning/prompt-flow/migrate-prompt-flow-to-agent-framework",
        "nothing needs to move yet; keep flows thin",
        "its runtime images get no updates, security fixes included",
    ),
    Sunset(
        "Prompt flow, read-only in Azure",
        dt.date(2027, 4, 20),
        f"{_LEARN}/machine-learning/prompt-flow/migrate-prompt-flow-to-agent-framework",
        "the same conversations on Agent Framework: phi3 agent chat, your own flow: phi3 flow "
        "to-agent; the same endpoint without either: phi3 chat, for other clients: phi3 env",
        "installed packages keep working; Microsoft names the Agent Framework as successor",
        used=True,
    ),
    Sunset(
        "Azure ML SDK v1 (azureml-core), end of support",
        dt.date(2026, 6, 30),
        f"{_LEARN}/machine-learning/migrate-to-v2-deploy-endpoints",
        "use azure-ai-ml (SDK v2); find old code with: phi3 lint FOLDER",
    ),
    Sunset(
        "Phi-3 and Phi-3.5 in the catalogue, retired",
        dt.date(2025, 8, 30),
        f"{_MODELS}concepts-retired-models-content.md",
        _NEW_MODEL,
        "replaced by Phi-4-mini-instruct, Phi-3-medium by Phi-4; weights stay on Hugging Face",
    ),
    Sunset(
        "Phi-3 and Phi-3.5 in the registry, archived",
        dt.date(2026, 6, 2),
        _ASSETS,
        _NEW_MODEL,
        "label `latest` may find no version",
    ),
    Sunset(
        "VM sizes NC6s/12s/24s/24rs_v3 (V100), retired",
        dt.date(2025, 9, 30),
        f"{_SIZES}retired-sizes-list.md",
        _NEW_SIZE,
        "still the defaults of the catalogue's fine-tuning pipeline",
    ),
    Sunset(
        "VM sizes NC, NCv2, ND (K80, P100, P40), retired",
        dt.date(2023, 8, 31),
        f"{_SIZES}retired-sizes-list.md",
        _NEW_SIZE,
    ),
    Sunset(
        "VM sizes NVv3, NVv4, retired",
        dt.date(2026, 9, 30),
        f"{_SIZES}retired-sizes-list.md",
        _NEW_SIZE,
    ),
    Sunset(
        "azure-ai-inference SDK, retired",
        dt.date(2026, 8, 26),
        f"{_LEARN}/foundry/foundry-models/",
        "use the openai package with the endpoint of: phi3 env",
    ),
    Sunset(
        "Foundry workflow agents, retired",
        dt.date(2026, 12, 1),
        "https://github.com/Azure/azure-rest-api-specs/pull/45419",
        "use the Agent Framework",
    ),
    Sunset(
        "Foundry (classic) agents, retired",
        dt.date(2027, 3, 31),
        "https://github.com/Azure/azure-rest-api-specs/pull/45419",
        "use the Agent Framework",
    ),
    Sunset(
        "Azure API versions 2020-02-02 to 2026-04-01, called by --on azure and rag.store",
        None,
        f"{_DOCS}/azure-docs/issues/120309",
        "nothing to do",
        "no end is known; Prompt flow's custom connections need 2024-04-01 or newer",
        used=True,
    ),
    Sunset(
        "agent-framework-core >=1.13,<2, of `make agent`",
        None,
        f"{_PYPI}/agent-framework-core/",
        "keep the pin",
        "before 1.13 errors and workflows had other names; minor versions break names too",
    ),
    Sunset(
        "azure-ai-ml <1.33",
        None,
        f"{_PYPI}/azure-ai-ml/",
        "keep the pin while promptflow-azure is installed",
        "1.33 dropped a module that promptflow-azure 1.18.5 imports",
        used=True,
    ),
    Sunset(
        "filelock <3.30",
        None,
        f"{_PYPI}/filelock/",
        "keep the pin while Prompt flow is installed",
        "3.30 forbids inherited locks, of which Prompt flow's chat page dies",
        used=True,
    ),
    Sunset(
        "promptflow >=1.18.5,<2",
        None,
        "https://github.com/microsoft/promptflow/issues/4090",
        "keep the pin",
        "older versions have known holes in their local service; 1.18.5 is the newest",
        used=True,
    ),
)


def today() -> dt.date:
    """PHI3_TODAY, else the day by this machine's clock. UsageError when it is no date."""
    text = os.environ.get("PHI3_TODAY", "").strip()
    if not text:
        # The local day: an end is a day on somebody's calendar, not an instant.
        return dt.datetime.now().astimezone().date()
    try:
        return dt.datetime.strptime(text, "%Y-%m-%d").astimezone().date()
    except ValueError:
        raise UsageError(
            f"PHI3_TODAY must be a date such as 2027-04-20, got {text!r}. "
            "Correct it, or remove it with: unset PHI3_TODAY"
        ) from None


def due(
    day: dt.date, within: int = WITHIN, python: tuple[int, int] = sys.version_info[:2]
) -> list[Sunset]:
    """What the user of this environment depends on that ends within `within` days of `day`.

    What has already ended stays in the list. Soonest first.
    """
    rows = [
        (row.date, row)
        for row in TABLE
        if row.date is not None
        and (row.date - day).days <= within
        # Of Python only the version that runs here concerns its user.
        and (row.used if row.python is None else row.python == python)
    ]
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def in_order() -> list[Sunset]:
    """The whole table by date; rows without one last."""
    return sorted(TABLE, key=lambda row: (row.date is None, row.date or CHECKED))
