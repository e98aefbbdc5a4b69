"""Signs in and makes the clients of Azure's SDKs, once each, with the recipe's retries and polls.

Reads the environment and the sign-ins of az, azd and others; keeps tokens in memory only. Importing
azure.ai.ml takes seconds, so it waits for the first use.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import StageError
from ...recipe.azure import PollSection
from .failures import explained, scrub
from .place import Place

if TYPE_CHECKING:
    from azure.ai.ml import MLClient
    from azure.core import PipelineClient
    from azure.core.credentials import AccessToken, TokenCredential
    from azure.core.pipeline import PipelineResponse
    from azure.mgmt.authorization import AuthorizationManagementClient
    from azure.mgmt.msi import ManagedServiceIdentityClient
    from azure.mgmt.quota import QuotaMgmtClient
    from azure.mgmt.resource.resources import ResourceManagementClient

    from .costs import Prices

log = logging.getLogger(__name__)
C = TypeVar("C")

# The control plane. An endpoint with Entra sign-in takes tokens for another audience, ml.azure.com.
ARM = "https://management.azure.com"
ARM_SCOPE = f"{ARM}/.default"
_NOISY_LOGGERS = ("azure", "msal", "msrest", "urllib3", "requests", "promptflow")
_MODEL_VERSION = re.compile(r"/models/([^/?]+)/versions/([^/?]+)")


def sign_in(
    tenant_id: str | None = None,
    *,
    interactive: bool | None = None,
    browser: Callable[..., TokenCredential] | None = None,
) -> TokenCredential:
    """A credential that has just given a token: what DefaultAzureCredential finds, else a browser.

    `interactive` None: a browser is opened where a person sits at a terminal. Raises StageError
    with everything that was tried.
    """
    from azure.core.exceptions import ClientAuthenticationError
    from azure.identity import DefaultAzureCredential, InteractiveBrowserCredential

    quiet_sdks()
    # azure-identity refuses a token of a tenant that is neither the sign-in's own nor named here.
    default: TokenCredential = DefaultAzureCredential(
        additionally_allowed_tenants=[tenant_id] if tenant_id else []
    )
    credential = InTenant(default, tenant_id) if tenant_id else default
    try:
        credential.get_token(ARM_SCOPE)
    except ClientAuthenticationError as error:
        # The SDK's message has a line `NameOfCredential: why not` for each one that it tried.
        lines = [line.strip() for line in scrub(str(error)).splitlines()]
        tried = [line for line in lines if ": " in line and line.split(":")[0].isidentifier()]
        tried = [_shortened(line) for line in tried or lines[:1]]
    else:
        return credential
    if interactive is None:
        interactive = sys.stdin.isatty() and sys.stderr.isatty()
    if interactive:
        options = {"tenant_id": tenant_id} if tenant_id else {}
        credential = (browser or InteractiveBrowserCredential)(**options)
        try:
            credential.get_token(ARM_SCOPE)
        except ClientAuthenticationError as error:
            tried.append(f"browser: {_shortened(scrub(str(error)))}")
        else:
            return credential
    else:
        tried.append("browser: not tried, this is not a terminal")
    attempts = "\n".join(f"  {line}" for line in tried)
    raise StageError(
        "Not signed in to Azure. Sign in with: az login\n"
        "(or set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET of a service principal, "
        f"or run on an Azure machine with a managed identity). Tried:\n{attempts}"
    )


def _shortened(text: str) -> str:
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= 100 else line[:97] + "…"


class InTenant:
    """A credential whose every token belongs to one tenant: the SDKs do not ask for any."""

    def __init__(self, credential: TokenCredential, tenant_id: str) -> None:
        self._credential = credential
        self._tenant = tenant_id

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        """A token of the tenant; one that a service's challenge names goes first."""
        return self._credential.get_token(*scopes, **{"tenant_id": self._tenant, **options})


def quiet_sdks() -> None:
    """Turn the SDKs' logs off, unless the program itself logs at INFO or below."""
    # azure.identity logs every credential that fails, azure.ai.ml prints while it deploys, and
    # azure.core's HTTP log would show what is sent. Where they do log, their records are scrubbed:
    # urllib3 logs every URL with its query, signatures included.
    known = [name for name in logging.root.manager.loggerDict if name.startswith(_NOISY_LOGGERS)]
    for name in {*known, "urllib3.connectionpool"}:
        logger = logging.getLogger(name)
        if not any(isinstance(item, _ScrubbingFilter) for item in logger.filters):
            logger.addFilter(_ScrubbingFilter())
    if logging.getLogger().isEnabledFor(logging.INFO):
        return
    names = [name for name in logging.root.manager.loggerDict if name.startswith("azure.")]
    for name in ("azure", "msal", "msrest", *names):
        logger = logging.getLogger(name)
        # Most have the level of `azure`. Each setLevel empties the caches of all loggers: 0.5 ms.
        if logger.getEffectiveLevel() != logging.CRITICAL:
            logger.setLevel(logging.CRITICAL)


class _ScrubbingFilter(logging.Filter):
    """Takes secrets out of a logger's records, before any handler sees them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True: the record stays, without its secrets."""
        record.msg, record.args = scrub(record.getMessage()), None
        if record.exc_info and record.exc_info[1] is not None:
            shown = logging.Formatter().formatException(record.exc_info)
            record.exc_info, record.exc_text = None, scrub(shown)
        return True


@dataclass
class ModelAnswers:
    """What a registry answered about model versions."""

    # The SDK's classes drop the metadata that replaced the tags in June 2026 (sizes for
    # fine-tuning, retirement dates), so the answers are kept as they pass.
    seen: dict[tuple[str, str], Mapping[str, object]] = field(default_factory=dict)

    def keep(self, response: PipelineResponse[Any, Any]) -> None:
        """A hook for azure-core's pipeline: keep the properties of a model version."""
        match = _MODEL_VERSION.search(str(response.http_request.url))
        if match is None or response.http_response.status_code != 200:
            return
        try:
            properties = json.loads(response.http_response.text()).get("properties")
        except (ValueError, AttributeError):
            return
        if isinstance(properties, Mapping):
            self.seen[match[1].lower(), match[2]] = properties

    def properties(self, name: str, version: str) -> Mapping[str, object]:
        """What was returned about a model version; empty if it was not requested."""
        return self.seen.get((name.lower(), version), {})


class Clients:
    """One sign-in and the clients that share it; nothing is sent before the first use."""

    def __init__(
        self,
        place: Place,
        poll: PollSection,
        credential: TokenCredential | Callable[[], TokenCredential] | None = None,
    ) -> None:
        self.place = place
        self.poll = poll
        self._credential = credential
        self._registries: dict[str, tuple[MLClient, ModelAnswers]] = {}

    @cached_property
    def credential(self) -> TokenCredential:
        """The signed-in credential; the first use signs in."""
        if self._credential is None:
            return sign_in(self.place.tenant_id)
        return self._credential() if callable(self._credential) else self._credential

    @cached_property
    def ml(self) -> MLClient:
        """Azure ML in the workspace."""
        return self.ml_of(self.place.workspace_name)

    @cached_property
    def subscription(self) -> MLClient:
        """Azure ML without a workspace: sizes, quota, making the workspace itself."""
        return self._ml()

    def ml_of(self, workspace: str) -> MLClient:
        """Azure ML in a named workspace, hub or project of the group."""
        return self._ml(workspace_name=workspace)

    def registry(self, name: str) -> MLClient:
        """Azure ML's registry."""
        return self._registry(name)[0]

    def model_answers(self, registry: str) -> ModelAnswers:
        """What the registry answered about its models, beyond what the SDK keeps of it."""
        return self._registry(registry)[1]

    def _registry(self, name: str) -> tuple[MLClient, ModelAnswers]:
        from azure.core.pipeline.policies import CustomHookPolicy

        if name not in self._registries:
            answers = ModelAnswers()
            hook: CustomHookPolicy[Any, Any] = CustomHookPolicy(raw_response_hook=answers.keep)
            # The constructor already calls the registry's discovery, so it can fail.
            with explained(f"Opening the registry {name}"):
                client = self._ml(registry_name=name, per_call_policies=[hook])
            self._registries[name] = (client, answers)
        return self._registries[name]

    @cached_property
    def resources(self) -> ResourceManagementClient:
        """ARM: resource groups, and any resource by its id."""
        from azure.mgmt.resource.resources import ResourceManagementClient

        return self._of_subscription(ResourceManagementClient)

    @cached_property
    def authorization(self) -> AuthorizationManagementClient:
        """Role assignments."""
        from azure.mgmt.authorization import AuthorizationManagementClient

        return self._of_subscription(AuthorizationManagementClient)

    @cached_property
    def identities(self) -> ManagedServiceIdentityClient:
        """User-assigned identities."""
        from azure.mgmt.msi import ManagedServiceIdentityClient

        return self._of_subscription(ManagedServiceIdentityClient)

    @cached_property
    def quota(self) -> QuotaMgmtClient:
        """Quota requests."""
        from azure.mgmt.quota import QuotaMgmtClient

        return self._of_subscription(QuotaMgmtClient)

    def _of_subscription(self, kind: Callable[..., C]) -> C:
        return kind(self.credential, self.place.subscription_id, **self._options())

    def arm(self) -> PipelineClient[Any, Any]:
        """ARM without an SDK, for what none of them has; sign-in and retries as everywhere."""
        from azure.core import PipelineClient
        from azure.core.pipeline import policies

        options = self._options()
        # The order of azure-core's own clients: what comes after the retries is done each time, so
        # that a retry after minutes carries a fresh token.
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

    @cached_property
    def prices(self) -> Prices:
        """Azure's public price list."""
        from .costs import Prices  # its table of sizes is in a module that needs this one

        return Prices(self._ask_anonymously)

    def _ask_anonymously(self, url: str, query: dict[str, str], seconds: float) -> Any:
        """The JSON of a public address, without a sign-in and without a retry."""
        from azure.core import PipelineClient
        from azure.core.pipeline.policies import UserAgentPolicy
        from azure.core.rest import HttpRequest

        options = self._options()
        client: PipelineClient[Any, Any] = PipelineClient(
            url,
            policies=[UserAgentPolicy("phi3-promptflow")],
            **({"transport": options["transport"]} if "transport" in options else {}),
        )
        # Each of the two may take half: requests knows no limit for both.
        half = seconds / 2
        request = HttpRequest("GET", url, params=query)
        response = client.send_request(request, connection_timeout=half, read_timeout=half)
        response.raise_for_status()
        return response.json()

    def _ml(self, **where: Any) -> MLClient:
        from azure.ai.ml import MLClient

        quiet_sdks()  # again: importing azure.ai.ml has made new loggers
        return MLClient(
            self.credential,
            subscription_id=self.place.subscription_id,
            resource_group_name=self.place.resource_group,
            # Its bars are kept off the screen where it uploads (operations.within). Without them it
            # never looks at how the upload of a folder's files ended, and waits for ever for one
            # that was refused.
            show_progress=True,
            enable_telemetry=False,
            **where,
            **self._options(),
        )

    def _options(self) -> dict[str, Any]:
        """The options that every client takes."""
        # azure-core repeats GET and PUT after 408, 429, 5xx and resets, POST only after 500, 503
        # and 504, and never a 409; operations.py deals with the rest.
        return {
            "retry_total": self.poll.retry_total,
            "retry_backoff_factor": self.poll.retry_backoff_factor,
            # Without it each change of a cluster or an endpoint lasts at least 30 s, the SDK's own
            # pause between polls. Deployments poll every 5 s regardless.
            "polling_interval": self.poll.interval,
            "logging_enable": False,
        }
