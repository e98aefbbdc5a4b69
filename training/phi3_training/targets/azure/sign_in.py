"""Signs in to Azure: what DefaultAzureCredential finds, else the browser on a terminal.

Reads the environment and the sign-ins of az, azd and others; keeps tokens in memory only.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import StageError
from .failures import scrub

if TYPE_CHECKING:
    from azure.core.credentials import AccessToken, TokenCredential

log = logging.getLogger(__name__)

ARM_SCOPE = "https://management.azure.com/.default"
_TALKERS = ("azure", "msal", "msrest", "urllib3", "requests", "promptflow")
_WAYS = (
    "Sign in with: az login\n"
    "or set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET (a service principal), "
    "or run on an Azure machine with a managed identity"
)


def sign_in(
    tenant_id: str | None = None,
    *,
    interactive: bool | None = None,
    browser: Callable[..., Any] | None = None,
) -> TokenCredential:
    """A credential that has just given a token. StageError with everything that was tried.

    `interactive` None asks whether a person sits at a terminal.
    """
    from azure.core.exceptions import ClientAuthenticationError
    from azure.identity import DefaultAzureCredential

    quiet()
    found: TokenCredential = DefaultAzureCredential(
        additionally_allowed_tenants=[tenant_id] if tenant_id else []
    )
    credential = InTenant(found, tenant_id) if tenant_id else found
    try:
        credential.get_token(ARM_SCOPE)
    except ClientAuthenticationError as error:
        tried = _attempts(error)
    else:
        return credential
    if interactive is None:
        interactive = sys.stdin.isatty() and sys.stderr.isatty()
    if not interactive:
        tried.append("browser: not tried, this is no terminal")
        raise _refused(tried)
    return _in_browser(tenant_id, browser, tried)


class InTenant:
    """A credential whose every token is of one tenant: the SDKs do not ask for any."""

    def __init__(self, credential: TokenCredential, tenant_id: str) -> None:
        self._credential = credential
        self._tenant = tenant_id

    def get_token(self, *scopes: str, **options: Any) -> AccessToken:
        """A token of the tenant."""
        return self._credential.get_token(*scopes, **{"tenant_id": self._tenant, **options})


def quiet() -> None:
    """The SDKs' own logs: off, unless the program itself logs at INFO or below.

    azure.identity logs every credential that fails, azure.ai.ml prints while it deploys, and
    azure.core's HTTP log would show what is sent. Where they do log, no signature, key or token
    stands in it: urllib3 tells every URL with its query.
    """
    known = [name for name in logging.root.manager.loggerDict if name.startswith(_TALKERS)]
    for name in {*known, "urllib3.connectionpool"}:
        logger = logging.getLogger(name)
        if not any(isinstance(kept, _Scrubbed) for kept in logger.filters):
            logger.addFilter(_Scrubbed())
    if logging.getLogger().isEnabledFor(logging.INFO):
        return
    names = [name for name in logging.root.manager.loggerDict if name.startswith("azure.")]
    for name in ("azure", "msal", "msrest", *names):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class _Scrubbed(logging.Filter):
    """Takes secrets out of what a logger says, before any handler sees it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True: the record stays, without its secrets."""
        record.msg, record.args = scrub(record.getMessage()), None
        if record.exc_info and record.exc_info[1] is not None:
            shown = logging.Formatter().formatException(record.exc_info)
            record.exc_info, record.exc_text = None, scrub(shown)
        return True


def _tenant(tenant_id: str | None) -> dict[str, str]:
    return {"tenant_id": tenant_id} if tenant_id else {}


def _in_browser(
    tenant_id: str | None, browser: Callable[..., Any] | None, tried: list[str]
) -> TokenCredential:
    from azure.core.exceptions import ClientAuthenticationError
    from azure.identity import InteractiveBrowserCredential

    make = browser or InteractiveBrowserCredential
    credential: TokenCredential = make(**_tenant(tenant_id))
    try:
        credential.get_token(ARM_SCOPE)
    except ClientAuthenticationError as error:
        tried.append(f"browser: {_first(str(error))}")
        raise _refused(tried) from None
    return credential


def _attempts(error: Exception) -> list[str]:
    """`Name: why not` for each credential of the chain, one line each and without secrets."""
    lines = [line.strip() for line in scrub(str(error)).splitlines()]
    found = [_first(line) for line in lines if ": " in line and line.split(":")[0].isidentifier()]
    return found or [_first(scrub(str(error)))]


def _first(text: str) -> str:
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= 300 else line[:297] + "…"


def _refused(tried: list[str]) -> StageError:
    lines = "\n".join(f"  {line}" for line in tried)
    return StageError(f"Azure could not be signed in to. Tried:\n{lines}\n{_WAYS}")
