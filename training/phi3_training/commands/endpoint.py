"""Which endpoint a command talks to, and how it is reached."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from phi3_tool.client import Phi3Client
from phi3_tool.connection import (
    ENTRA,
    ConnectionSettings,
    environment_names_endpoint,
    is_loopback,
    parse_address,
    same_endpoint,
)
from phi3_tool.credentials import entra_tokens
from phi3_tool.wire import DEFAULT_CONTEXT_LENGTH

from .. import console
from ..errors import StageError
from ..manifests import ConnectionManifest, EndpointManifest
from ..packages import has_prompt_flow
from ..runs import is_current, remarks
from ..targets import HERE, Access, get_target, target_of
from .common import current_run

OPENAI_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Endpoint:
    """An endpoint: its address and key, and what else a client should know of it."""

    access: Access
    deployment: str | None = None
    dialect: str | None = None
    context_length: int | None = None  # tokens; None: not stated

    @property
    def context(self) -> int:
        """Tokens of the model's context, as far as it is known."""
        return self.context_length or DEFAULT_CONTEXT_LENGTH

    @property
    def name(self) -> str:
        """Its URL; on this machine without the port, which changes with each start."""
        shown = parse_address(self.access.endpoint, self.dialect).shown
        parts = urlsplit(shown)
        local = parts.hostname is not None and is_loopback(parts.hostname)
        return urlunsplit(parts._replace(netloc=parts.hostname or "")) if local else shown

    def client(self, **options: Any) -> Phi3Client:
        """A client; `options` are those of Phi3Client."""
        return self.access.client(deployment=self.deployment, dialect=self.dialect, **options)

    def streaming(self) -> Endpoint:
        """The same where it streams: our own server does on a second route, others as they are."""
        parts = urlsplit(self.access.endpoint)
        # Ours only: another server's second route is not known to exist.
        if parts.path != "/score" or parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            return self
        url = urlunsplit(parts._replace(path=OPENAI_PATH))
        return replace(self, access=replace(self.access, endpoint=url), dialect=None)

    def settings(self) -> ConnectionSettings:
        """For clients that know only keys: an Entra token of now is the key."""
        access = self.access
        key = access.token_provider() if access.token_provider else access.key
        return ConnectionSettings(
            access.endpoint,
            key or "",
            deployment=self.deployment,
            dialect=self.dialect,
            context_length=self.context_length,
        )

    def variables(self) -> dict[str, str]:
        """PHI3_ENDPOINT, PHI3_KEY and so on, for another program."""
        from ..flow.page import environment_of

        if self.access.token_provider is not None:
            console.err.print(
                "The endpoint uses Entra tokens; this one is valid for about an hour."
            )
        return environment_of(self.settings())


def endpoint_of(args: argparse.Namespace) -> Endpoint:
    """The endpoint that is meant; which one it is goes to standard error.

    That of --run, else the environment's, else the current run's: from the run's own Prompt flow
    connection, on Azure from Azure itself.
    """
    from ..flow.store import stored_connection
    from ..targets.local import settings_from_server

    if not args.run and environment_names_endpoint():
        settings = ConnectionSettings.from_environment()
        if args.output == "text":
            console.err.print(
                f"Endpoint {settings.endpoint}, which PHI3_ENDPOINT names",
                markup=False,
                style="dim",
            )
    else:
        run = current_run(args)
        if args.output == "text":
            current = " (current)" if is_current(run) else ""
            console.err.print(f"Run {run.name}{current}", markup=False, style="dim")
            for remark in remarks(run):
                console.err.print(f"Note: {remark}", markup=False, style="yellow")
        cloud = get_target(target_of(run)).cloud
        if cloud is not None:
            return Endpoint(cloud.access(run))
        restart = f"phi3 up --run {run.name}"
        run.require(ConnectionManifest if has_prompt_flow() else EndpointManifest)
        if get_target(HERE).status(run)["endpoint"]["state"] != "up":
            raise StageError(
                f"The endpoint of the run {run.name!r} is down; start it with: {restart}"
            )
        if has_prompt_flow():
            manifest = run.require(ConnectionManifest)
            name = manifest.own or manifest.name
            settings = ConnectionSettings.from_connection(stored_connection(name))
            # Somebody may have edited the connection by hand: another model must not answer for
            # this run's.
            if not same_endpoint(settings.endpoint, run.require(EndpointManifest).endpoint):
                raise StageError(
                    f"The connection {name} now points to {settings.endpoint}, which is not the "
                    f"endpoint of the run {run.name!r}; write it again with: {restart}"
                )
        else:  # no store to read: the server hands its key to its own user
            settings = settings_from_server(run)
    tokens = entra_tokens() if settings.auth == ENTRA else None
    return Endpoint(
        Access(settings.endpoint, settings.key or None, tokens),
        settings.deployment,
        settings.dialect,
        settings.context_length,
    )
