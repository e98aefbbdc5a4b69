"""The clients of Azure's SDKs, made once each, with the recipe's retries and polls.

Importing azure.ai.ml takes seconds and reads its poll times at import: both wait for first use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cached_property
from typing import TYPE_CHECKING, Any, TextIO, cast

from ...recipe_azure import PollSection
from .failures import explained
from .sign_in import ARM_SCOPE, quiet, sign_in
from .workplace import Workplace

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.core import PipelineClient
    from azure.core.credentials import TokenCredential
    from azure.mgmt.authorization import AuthorizationManagementClient
    from azure.mgmt.msi import ManagedServiceIdentityClient
    from azure.mgmt.quota import QuotaMgmtClient
    from azure.mgmt.resource.resources import ResourceManagementClient

    from .answers import ModelAnswers

ARM = "https://management.azure.com"


class Clients:
    """One sign-in and the clients that share it; nothing is sent before the first use."""

    def __init__(
        self,
        workplace: Workplace,
        poll: PollSection,
        credential: TokenCredential | Callable[[], TokenCredential] | None = None,
    ) -> None:
        self.workplace = workplace
        self.poll = poll
        self._credential = credential
        self._registries: dict[str, tuple[MLClient, ModelAnswers]] = {}

    @cached_property
    def credential(self) -> TokenCredential:
        """The signed-in credential; the first use signs in."""
        if self._credential is None:
            return sign_in(self.workplace.tenant_id)
        return self._credential() if callable(self._credential) else self._credential

    @cached_property
    def ml(self) -> MLClient:
        """Azure ML in the workspace."""
        return self.ml_of(self.workplace.workspace_name)

    @cached_property
    def subscription(self) -> MLClient:
        """Azure ML without a workspace: sizes, quota, making the workspace itself."""
        return self._ml()

    def ml_of(self, workspace: str) -> MLClient:
        """Azure ML in a named workspace, hub or project of the group."""
        return self._ml(workspace_name=workspace)

    def registry(self, name: str) -> MLClient:
        """Azure ML's registry; finding it is a call of its own."""
        return self._registry(name)[0]

    def model_answers(self, registry: str) -> ModelAnswers:
        """What the registry answered about its models, beside what the SDK keeps of it."""
        return self._registry(registry)[1]

    def _registry(self, name: str) -> tuple[MLClient, ModelAnswers]:
        from .answers import ModelAnswers

        if name not in self._registries:
            answers = ModelAnswers()
            with explained(f"Opening the registry {name}"):
                client = self._ml(registry_name=name, per_call_policies=[answers])
            self._registries[name] = (client, answers)
        return self._registries[name]

    @cached_property
    def resources(self) -> ResourceManagementClient:
        """ARM: resource groups, and any resource by its id."""
        from azure.mgmt.resource.resources import ResourceManagementClient

        return ResourceManagementClient(
            self.credential, self.workplace.subscription_id, **self._options()
        )

    @cached_property
    def authorization(self) -> AuthorizationManagementClient:
        """Role assignments."""
        from azure.mgmt.authorization import AuthorizationManagementClient

        return AuthorizationManagementClient(
            self.credential, self.workplace.subscription_id, **self._options()
        )

    @cached_property
    def identities(self) -> ManagedServiceIdentityClient:
        """User-assigned identities."""
        from azure.mgmt.msi import ManagedServiceIdentityClient

        return ManagedServiceIdentityClient(
            self.credential, self.workplace.subscription_id, **self._options()
        )

    @cached_property
    def quota(self) -> QuotaMgmtClient:
        """Quota requests."""
        from azure.mgmt.quota import QuotaMgmtClient

        return QuotaMgmtClient(self.credential, self.workplace.subscription_id, **self._options())

    def arm(self) -> PipelineClient[Any, Any]:
        """ARM without an SDK, for what none of them has; sign-in and retries as everywhere."""
        from azure.core import PipelineClient
        from azure.core.pipeline import policies

        options = self._options()
        return PipelineClient(
            ARM,
            policies=[
                policies.RequestIdPolicy(),
                policies.HeadersPolicy({"Accept": "application/json"}),
                policies.UserAgentPolicy("phi3-promptflow"),
                policies.RetryPolicy(**options),
                policies.BearerTokenCredentialPolicy(self.credential, ARM_SCOPE),
            ],
            **({"transport": options["transport"]} if "transport" in options else {}),
        )

    def _ml(self, **where: Any) -> MLClient:
        _set_job_polls(self.poll)
        from azure.ai.ml import MLClient

        quiet()
        return MLClient(
            self.credential,
            subscription_id=self.workplace.subscription_id,
            resource_group_name=self.workplace.resource_group,
            show_progress=False,
            enable_telemetry=False,
            **where,
            **self._options(),
        )

    def _options(self) -> dict[str, Any]:
        return {
            "retry_total": self.poll.retry_total,
            "retry_backoff_factor": self.poll.retry_backoff_factor,
            "polling_interval": self.poll.interval,
            "logging_enable": False,
        }


class _WithoutBlankLines:
    """A stream that leaves out what the SDK prints after each upload: a colour and a new line."""

    def __init__(self, through: TextIO) -> None:
        self._through = through
        self._blank = False

    def write(self, text: str) -> int:
        """As a stream's."""
        if text.strip("\n") == "\x1b[39m":
            self._blank = True
            return len(text)
        if self._blank and text == "\n":
            self._blank = False
            return len(text)
        self._blank = False
        return self._through.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._through, name)


@contextmanager
def quiet_uploads() -> Iterator[None]:
    """Around calls of azure.ai.ml that upload files."""
    with redirect_stderr(cast(TextIO, _WithoutBlankLines(sys.stderr))):
        yield


def _set_job_polls(poll: PollSection) -> None:
    """Only what nobody set; the SDK reads these when it is imported."""
    seconds = str(max(1, round(poll.job_interval)))
    os.environ.setdefault("AZUREML_RUN_POLLING_INTERVAL_MIN", seconds)
    os.environ.setdefault("AZUREML_RUN_POLLING_INTERVAL_MAX", seconds)
