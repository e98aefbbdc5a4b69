"""Keeps what a registry answers about models: the SDK's own classes drop part of it.

The metadata that replaced the tags (sizes, retirement) is read from here. Nothing is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from azure.core.pipeline import PipelineRequest, PipelineResponse
from azure.core.pipeline.policies import SansIOHTTPPolicy

_VERSION = re.compile(r"/models/([^/?]+)/versions/([^/?]+)")


class ModelAnswers(SansIOHTTPPolicy[Any, Any]):
    """A policy of azure-core that looks at the answers as they pass."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], Mapping[str, Any]] = {}

    def on_response(
        self, request: PipelineRequest[Any], response: PipelineResponse[Any, Any]
    ) -> None:
        """Keep the properties of a model version."""
        match = _VERSION.search(str(request.http_request.url))
        if match is None or response.http_response.status_code != 200:
            return
        try:
            properties = json.loads(response.http_response.text()).get("properties")
        except (ValueError, AttributeError):
            return
        if isinstance(properties, Mapping):
            self._seen[match[1].lower(), match[2]] = properties

    def properties(self, name: str, version: str) -> Mapping[str, Any]:
        """What was answered about a model version; empty where it was not asked for."""
        return self._seen.get((name.lower(), version), {})
