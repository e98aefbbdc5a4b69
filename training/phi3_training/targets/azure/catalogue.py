"""The catalogue's foundation models: which one, on which sizes it may be tuned, its own defaults.

What the registry says counts; the dated table here stands in where it says nothing any more.
"""

from __future__ import annotations

import ast
import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import StageError
from ...recipe_azure import FoundationModelSection
from .clients import Clients
from .failures import explained
from .waiting import absent

TABLE_DATE = "2026-11-21"
_NC = ("Standard_NC24ads_A100_v4", "Standard_NC48ads_A100_v4", "Standard_NC96ads_A100_v4")
_ND_80, _ND_40 = "Standard_ND96amsr_A100_v4", "Standard_ND96asr_v4"
_H100 = (
    "Standard_NC40ads_H100_v5",
    "Standard_NC80adis_H100_v5",
    "Standard_ND96isr_H100_v5",
)
# Sizes for fine-tuning as the registry published them until the tags were taken away.
SIZES = {
    "phi-3-mini-4k-instruct": (*_NC, _ND_40, _ND_80),
    "phi-3-mini-128k-instruct": (*_NC, _ND_80),
    "phi-3.5-mini-instruct": (*_NC, _ND_80),
    "phi-4": (*_NC, _ND_80, _ND_40, *_H100),
}
_RETIRED = "retired 2025-08-30, archived in the catalogue since 2026-06-02"
ARCHIVED = {
    "phi-3-mini-4k-instruct": _RETIRED,
    "phi-3-mini-128k-instruct": _RETIRED,
    "phi-3-small-8k-instruct": _RETIRED,
    "phi-3-small-128k-instruct": _RETIRED,
    "phi-3-medium-4k-instruct": _RETIRED,
    "phi-3-medium-128k-instruct": _RETIRED,
    "phi-3.5-mini-instruct": _RETIRED,
    "phi-3.5-moe-instruct": _RETIRED,
}
# Their last versions: `latest` finds none of them.
LAST = {
    "phi-3-mini-4k-instruct": "15",
    "phi-3-mini-128k-instruct": "13",
    "phi-3.5-mini-instruct": "6",
}
ALLOW_TAG, DEFAULTS_TAG = "finetune_compute_allow_list", "model_specific_defaults"


@dataclass(frozen=True)
class Foundation:
    """A model of the catalogue. `allowed` None: no list, every GPU size is taken."""

    name: str
    version: str
    id: str
    allowed: tuple[str, ...] | None
    allowed_from: str
    defaults: Mapping[str, Any]
    archived: str | None  # why it is not to be used any more


def find_foundation(
    clients: Clients, section: FoundationModelSection, name: str
) -> Foundation | None:
    """The model by name and version (or `latest`); None where the registry has none."""
    from azure.core.exceptions import HttpResponseError

    models = clients.registry(section.registry_name).models
    with explained(f"Looking for the model {name} in the registry {section.registry_name}"):
        version = _latest(models, name) if section.version == "latest" else section.version
        if version is None:
            return None
        try:
            found = models.get(name=name, version=version)
        except HttpResponseError as error:
            if not absent(error):
                raise
            return None
    answers = clients.model_answers(section.registry_name)
    return _foundation(found, answers.properties(str(found.name), str(found.version)))


def _latest(models: Any, name: str) -> str | None:
    """The version that was made last. The registry leaves archived ones out: those we know."""
    from azure.ai.ml.exceptions import ValidationException
    from azure.core.exceptions import HttpResponseError

    try:
        return str(models.get(name=name, label="latest").version)
    except ValidationException:  # so the SDK says that the list is empty
        return LAST.get(name.lower())
    except HttpResponseError as error:
        if not absent(error):
            raise
        return None


def _foundation(model: Any, properties: Mapping[str, Any]) -> Foundation:
    tags = dict(model.tags or {})
    metadata = _mapping(properties.get("systemMetadata") or getattr(model, "_system_metadata", 0))
    allowed, source = _allowed(str(model.name), tags, metadata)
    return Foundation(
        name=str(model.name),
        version=str(model.version),
        id=str(model.id),
        allowed=allowed,
        allowed_from=source,
        defaults=parse_defaults(tags.get(DEFAULTS_TAG), str(model.name)),
        archived=_archived_why(str(model.name), properties, metadata),
    )


def _archived_why(
    name: str, properties: Mapping[str, Any], metadata: Mapping[str, Any]
) -> str | None:
    """Why a model is not for use any more, from the registry, else from our table."""
    if name.lower() in ARCHIVED:
        return ARCHIVED[name.lower()]
    if properties.get("isArchived") is True:
        return "archived in the catalogue"
    date = str(_mapping(metadata.get("deprecation")).get("finetuneRetirementDate") or "")[:10]
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    return f"retired {date}" if date[:1] >= "2" and date <= today else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _allowed(
    name: str, tags: Mapping[str, Any], metadata: Mapping[str, Any]
) -> tuple[tuple[str, ...] | None, str]:
    """The sizes for fine-tuning, and where the list is from."""
    sizes = _sizes(tags.get(ALLOW_TAG))
    if sizes:
        return sizes, f"the model's tag {ALLOW_TAG}"
    sizes = _sizes(_mapping(metadata.get("supportedComputes")).get("finetuneComputes"))
    if sizes:
        return sizes, "the model's system_metadata"
    known = SIZES.get(name.lower())
    if known is not None:
        return known, f"our table of {TABLE_DATE}"
    return None, "no list is published"


def _sizes(value: Any) -> tuple[str, ...] | None:
    """A list of sizes, or the text of one."""
    if isinstance(value, str):
        value = _literal(value)
    if not isinstance(value, (list, tuple)):
        return None
    return tuple(str(item) for item in value if isinstance(item, str)) or None


def parse_defaults(value: Any, model: str) -> dict[str, Any]:
    """The model's own parameters: a text that looks like a Python dictionary, never run as code."""
    if value in (None, ""):
        return {}
    content = _literal(value) if isinstance(value, str) else value
    plain = isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(item, (str, int, float, bool))
        for key, item in content.items()
    )
    if not plain:
        raise StageError(
            f"The model {model} has a tag {DEFAULTS_TAG} that is no plain dictionary of values, so "
            "it is not used blindly. Use our own trainer: azure.train.route=job"
        )
    return dict(content)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text) if len(text) <= 20_000 else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
