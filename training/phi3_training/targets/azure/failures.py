"""What Azure's refusals mean: one StageError with the code, what happened and the mend.

Everything that Azure said passes `scrub` first: no signature, key or token reaches a user or a log.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import StageError

# What a secret looks like, wherever it stands. The name of the thing stays, its value goes.
_SECRETS = (
    # Signatures of a shared access signature: sig= and what is signed for whom and how long.
    re.compile(
        r"(?i)([?&;\s](?:sig|se|sp|sv|sr|st|spr|skoid|sktid|skt|ske|sks|skv)=)[^&\s\"'<>;]+"
    ),
    re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(
        r"(?i)((?:account|access|shared_?access|primary|secondary|api|storage)[_-]?key"
        r"|client[_-]?secret|password|(?:access|refresh|id)?_?token|assertion|sas)"
        r"([\"']?\s*[:=]\s*[\"']?)[^\s\"'&;,<>}]{6,}"
    ),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?"),
    re.compile(r"(?<![A-Za-z0-9+/=])[A-Za-z0-9+/]{86}==(?![A-Za-z0-9+/=])"),  # storage account key
    re.compile(r"(://)[^/\s:@]+:[^/\s:@]+@"),  # user:password@ in a URL
)
HIDDEN = "[hidden]"


def scrub(text: str) -> str:
    """`text` without signatures, keys and tokens."""
    text = _SECRETS[0].sub(rf"\g<1>{HIDDEN}", text)
    text = _SECRETS[1].sub(rf"\g<1>{HIDDEN}", text)
    text = _SECRETS[2].sub(rf"\g<1>\g<2>{HIDDEN}", text)
    text = _SECRETS[3].sub(HIDDEN, text)
    text = _SECRETS[4].sub(HIDDEN, text)
    return _SECRETS[5].sub(rf"\g<1>{HIDDEN}@", text)


_SERVER = "Azure's own fault: type the same command again in some minutes; nothing is made twice"
# Azure's code, lower case: what mends it.
MENDS = {
    "internalservererror": _SERVER,
    "internalerror": _SERVER,
    "serviceunavailable": _SERVER,
    "outofquota": "ask for quota (phi3 azure quota --request), or take a size or region that has "
    "some: azure.compute.size, azure.endpoint.instance_type, azure.location",
    "quotaexceeded": "ask for quota (phi3 azure quota --request) or free what uses it (phi3 status "
    "--on azure)",
    "outofcapacity": "the region has no such machine free now: try later, another size or another "
    "azure.location",
    "skunotavailable": "the size does not exist in this region: another size or azure.location",
    "badargument": "the message names the value that was refused",
    "authorizationfailed": "you lack a role: ask an owner of the subscription for Contributor "
    "on the resource group, and User Access Administrator for role assignments; roles take "
    "minutes to act",
    "linkedauthorizationfailed": "you may not use the identity: ask for Managed Identity Operator "
    "on it",
    "roleassignmentupdatenotpermitted": "the role assignment exists for somebody else; delete it",
    "principalnotfound": "the identity is so new that it is not known everywhere: type the same "
    "command again in a minute",
    "subscriptionnotfound": "check azure.subscription_id (yours: az account list) and the tenant",
    "invalidauthenticationtoken": "sign in again: az login",
    "invalidauthenticationtokentenant": "the subscription is in another tenant: "
    "az login --tenant ID, or set AZURE_TENANT_ID",
    "expiredauthenticationtoken": "sign in again: az login",
    "missingsubscriptionregistration": "register the provider: az provider register --namespace "
    "NAMESPACE",
    "resourcegroupnotfound": "make it with: phi3 azure provision",
    "resourcenotfound": "it is not there; make it with: phi3 azure provision",
    "invalidresourcelocation": "it exists in another region: set azure.location to that one",
    "locationnotavailableforresourcetype": "the region does not offer this: another azure.location",
    "vaultalreadyexists": "a deleted key vault keeps its name for days: az keyvault recover or "
    "purge, or set azure.key_vault",
    "storageaccountalreadytaken": "the name is taken by somebody else: set azure.storage_account",
    "storageaccountalreadyexists": "the name is taken: set azure.storage_account",
    "alreadyinuse": "the name is taken by somebody else: set azure.container_registry",
    "requestdisallowedbypolicy": "a policy of your organisation forbids it; the message names it",
    "scopelocked": "a lock forbids it: az lock list",
    "resourcenotready": "the container did not become ready; its log says why",
    "imagebuildfailure": "the environment's image was not built; see its log in the studio",
    "toomanyrequests": "Azure asks to wait: type the same command again in some minutes",
    "usererror": "the message says what the service did not accept",
    "toocloseinnametodeletedworkspace": "a deleted workspace keeps its name: recover or purge it",
    "workspacesoftdeleted": "a soft-deleted workspace has this name: purge or recover it in the "
    "portal, or set azure.workspace_name",
}
_BY_STATUS = {
    401: "sign in again: az login",
    403: MENDS["authorizationfailed"],
    404: MENDS["resourcenotfound"],
    409: "something else changes the same thing, or it is being deleted: type the same command "
    "again in some minutes",
    429: MENDS["toomanyrequests"],
}


def code_of(error: BaseException) -> str | None:
    """Azure's own code for the refusal, the innermost that says something."""
    found = getattr(error, "error", None)
    code = getattr(found, "code", None)
    inner = [getattr(item, "code", None) for item in getattr(found, "details", None) or ()]
    for candidate in (*inner, code):
        if candidate and str(candidate).lower() in MENDS:
            return str(candidate)
    return str(code) if code else None


def mend_of(error: BaseException) -> str:
    """What the user can do about it."""
    code = code_of(error)
    if code and code.lower() in MENDS:
        return MENDS[code.lower()]
    text = str(error).lower()
    for known, mend in MENDS.items():  # some services put the code into the text only
        if len(known) > 9 and known in text:
            return mend
    status = getattr(error, "status_code", None)
    if isinstance(status, int) and status >= 500:
        return _SERVER
    return _BY_STATUS.get(status if isinstance(status, int) else 0, "see the message above")


def message_of(error: BaseException) -> str:
    """Azure's own words, in one line and without secrets."""
    found: Any = getattr(error, "error", None)
    parts = [getattr(found, "message", None)]
    parts += [getattr(item, "message", None) for item in getattr(found, "details", None) or ()]
    said = [str(part) for part in parts if part] or [getattr(error, "message", None) or str(error)]
    text = " ".join(" ".join(dict.fromkeys(said)).split())
    return scrub(text[:1000]).rstrip(".")


def stage_error(error: BaseException, doing: str) -> StageError:
    """The error for the user: `doing` failed, Azure's code and words, and the mend."""
    from azure.core.exceptions import (
        ClientAuthenticationError,
        ServiceRequestError,
        ServiceResponseError,
    )

    if isinstance(error, ClientAuthenticationError) and error.status_code in (None, 401):
        return StageError(
            f"{doing} failed: the sign-in was refused: {message_of(error)}.\n"
            "Mend: sign in again: az login"
        )
    if isinstance(error, (ServiceRequestError, ServiceResponseError)):
        return StageError(
            f"{doing} failed: Azure could not be reached: {message_of(error)}.\n"
            "Mend: check the network (HTTPS_PROXY, REQUESTS_CA_BUNDLE), then type the same "
            "command again; nothing is made twice"
        )
    code, status = code_of(error), getattr(error, "status_code", None)
    # A failed long-running operation carries the status of the poll that told so: 200.
    shown = [str(part) for part in (code, status if status not in (None, 200) else None) if part]
    named = f" ({', HTTP '.join(shown)})" if shown else ""
    return StageError(f"{doing} failed{named}: {message_of(error)}.\nMend: {mend_of(error)}")


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn what the SDKs raise inside into a StageError that says what was being done."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    try:
        yield
    except (AzureError, MlException) as error:
        raise stage_error(error, doing) from None
