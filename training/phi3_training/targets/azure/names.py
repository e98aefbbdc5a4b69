"""Names of what serving makes, the same each time: endpoint and deployment.

An endpoint's name is unique in its region; a deployment's says which model and settings it holds.
"""

from __future__ import annotations

import re

from ...recipe_azure import AzureSection
from ...run import Run, fingerprint
from ..base import Manifest
from .workplace import Workplace

_LONGEST = 32


def endpoint_name(section: AzureSection, place: Workplace, run: Run) -> str:
    """The recipe's, else one of the run's name and a hash of subscription, workspace and run."""
    if section.endpoint.name is not None:
        return section.endpoint.name
    mark = fingerprint([place.workspace_id().lower(), run.name])[:8]
    plain = _plain(run.name)
    named = plain if plain[:1].isalpha() else f"m-{plain}".rstrip("-")
    return f"{named[: _LONGEST - len(mark) - 1].rstrip('-')}-{mark}"


def deployment_name(section: AzureSection, registration: Manifest) -> str:
    """The recipe's, else one that changes with the model and with how it is served."""
    settings = section.endpoint
    if settings.deployment is not None:
        return settings.deployment
    ignored = {"name", "auth_mode", "keep_deployments"}
    shape = settings.model_dump(mode="json", exclude=ignored)
    model = f"{registration['model']}:{registration['model_version']}"
    mark = fingerprint([shape, model])[:6]
    version = f"v{_plain(str(registration['model_version']))}"
    return f"{version[: _LONGEST - len(mark) - 1].rstrip('-')}-{mark}"


def _plain(text: str) -> str:
    """Lower case letters, digits and single dashes within."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
