"""Has Azure itself put an endpoint's traffic back, should this client die during a rollout.

Before each step the endpoint's workflow (deadline.py) gets a PUT of the whole endpoint with the
shares from before, due when the step should be over. It is sent only while the endpoint carries the
rollout's tag, which the rollout's end takes away: what is left of it then changes nothing. Never
verified on live Azure.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...errors import StageError
from ...progress import Progress
from ...recipe.azure import AzureSection
from ...run import Run
from .clients import ARM, Clients
from .deadline import ENDPOINTS_API, PutBack, endpoint_id, keep_put_back
from .failures import explained
from .place import ROLLOUT_TAG, RUN_TAG
from .resources import Body
from .traffic import shares_text
from .workflow import shown, utc_now

# A change of the traffic takes a minute or two, and may wait for another one; with room to spare.
_CHANGE = dt.timedelta(minutes=20)
# Azure sets these by itself, and takes none of them.
_READ_ONLY = {"id", "name", "type", "systemData"}
_READ_ONLY_PROPERTIES = {"provisioningState", "scoringUri", "swaggerUri"}


@dataclass
class PutBackKeeper:
    """Keeps one endpoint's put-back up to date while `target` takes over."""

    clients: Clients
    section: AzureSection
    run: Run
    endpoint: str
    target: str
    progress: Progress
    _body: Body = field(default_factory=dict, init=False)

    def arm(self, before: Mapping[str, int], tag: str, seconds: float) -> str:
        """Have the shares `before` put back unless the step ends within `seconds`, and some more.

        One sentence about it. Nothing is raised: the rollout itself puts them back while it lives.
        """
        try:
            with explained(f"Reading the endpoint {self.endpoint}"):
                found = self._body or self._read()
            if RUN_TAG not in (found.get("tags") or {}):
                return self._not("phi3 did not create the endpoint")
            self._body = self._body or put_back_body(found, before, self.target)
            at = utc_now() + dt.timedelta(seconds=int(seconds)) + _CHANGE
            back = PutBack(at, (ROLLOUT_TAG, tag), self._body)
            keep_put_back(self.clients, self.section, self.run, self.endpoint, back, self.progress)
        except StageError as error:
            return self._not(" ".join(str(error).split()).rstrip("."))
        return (
            f"should this machine die now, Azure itself puts the traffic back to "
            f"{shares_text(before)} at {shown(at)} (never verified on live Azure)"
        )

    def _not(self, reason: str) -> str:
        return (
            f"should this machine die now, NOBODY puts the traffic back before the next phi3 up: "
            f"{reason}"
        )

    def _read(self) -> Body:
        """The endpoint as Azure sends it: the SDK's own class leaves out what it does not know."""
        from azure.core.rest import HttpRequest

        url = f"{ARM}{endpoint_id(self.clients.place, self.endpoint)}"
        request = HttpRequest("GET", url, params={"api-version": ENDPOINTS_API})
        answer = self.clients.arm().send_request(request)
        answer.raise_for_status()
        body: Body = answer.json()
        return body


def put_back_body(found: Body, before: Mapping[str, int], target: str) -> Body:
    """The PUT of an endpoint that was read as `found`, with the shares `before` and no rollout.

    Everything else is sent as it was read, since Azure takes what a PUT leaves out for removed.
    """
    properties = {k: v for k, v in found["properties"].items() if k not in _READ_ONLY_PROPERTIES}
    properties["traffic"] = dict(before)
    mirror = properties.get("mirrorTraffic") or {}
    properties["mirrorTraffic"] = {n: share for n, share in mirror.items() if n != target}
    body = {name: value for name, value in found.items() if name not in _READ_ONLY}
    body["properties"] = properties
    body["tags"] = {n: text for n, text in (found.get("tags") or {}).items() if n != ROLLOUT_TAG}
    identity = dict(found.get("identity") or {})
    if identity:
        # Of an identity Azure answers its ids, and takes its type and an empty object for each.
        users = identity.get("userAssignedIdentities")
        body["identity"] = {"type": identity["type"]} | (
            {"userAssignedIdentities": {user: {} for user in users}} if users else {}
        )
    return body
