"""What Azure's refusals mean: one StageError with the code, Azure's own words and the fix.

Everything from Azure passes `scrub` first: no signature, key or token reaches a user or a log.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import StageError

HIDDEN = "[hidden]"
# What a secret looks like, wherever it stands, and what is shown instead: the name of the secret
# stays, its value goes.
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    # A shared access signature: the signature itself and what it was signed for, whom, how long.
    (
        re.compile(
            r"(?i)([?&;\s](?:sig|se|sp|sv|sr|st|spr|skoid|sktid|skt|ske|sks|skv)=)[^&\s\"'<>;]+"
        ),
        rf"\g<1>{HIDDEN}",
    ),
    (re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}"), rf"\g<1>{HIDDEN}"),
    (
        re.compile(
            r"(?i)((?:account|access|shared_?access|primary|secondary|api|storage)[_-]?key"
            r"|client[_-]?secret|password|(?:access|refresh|id)?_?token|assertion|sas)"
            r"([\"']?\s*[:=]\s*[\"']?)[^\s\"'&;,<>}]{6,}"
        ),
        rf"\g<1>\g<2>{HIDDEN}",
    ),
    # A JSON web token: three base64 parts, the first of which starts with `{"`.
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?"), HIDDEN),
    # A storage account's key: 64 bytes, so 86 base64 characters and two '='.
    (re.compile(r"(?<![A-Za-z0-9+/=])[A-Za-z0-9+/]{86}==(?![A-Za-z0-9+/=])"), HIDDEN),
    (re.compile(r"(://)[^/\s:@]+:[^/\s:@]+@"), rf"\g<1>{HIDDEN}@"),  # user:password@ in a URL
)


def scrub(text: str) -> str:
    """`text` without signatures, keys and tokens."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SERVER = (
    "this is an error on Azure's side: run the same command again in a few minutes; nothing is "
    "created twice"
)
# Azure's error code in lower case, and what fixes it. Where an error has an inner code, that one
# counts: a cluster without quota is a BadRequest outside and an OutOfQuota inside.
FIXES = {
    "internalservererror": _SERVER,
    "internalerror": _SERVER,
    "serviceunavailable": _SERVER,
    "outofquota": "request quota (phi3 azure quota --request), or use a size or region that has "
    "some: azure.compute.size, azure.endpoint.instance_type, azure.location",
    "quotaexceeded": "request quota (phi3 azure quota --request) or free what uses it (phi3 "
    "status --on azure)",
    "outofcapacity": "the region has no such machine available now: try later, or another size or "
    "azure.location",
    "skunotavailable": "the size does not exist in this region: use another size or azure.location",
    "badargument": "the message names the value that was refused",
    "authorizationfailed": "you lack a role: ask an owner of the subscription for Contributor "
    "on the resource group, and for User Access Administrator to assign roles; a new role takes "
    "effect after some minutes",
    # Of the storage account, where code, chats and models go.
    "authorizationpermissionmismatch": "you or the job's identity lack the role Storage Blob Data "
    "Contributor on the workspace's storage account; a new role takes effect after some minutes",
    "authorizationfailure": "the storage account's network rules keep this machine out: let it in "
    "(az storage account network-rule add), or run phi3 inside its network",
    "keybasedauthenticationnotpermitted": "a policy switches the storage account's keys off: set "
    "the workspace to use your sign-in (az ml workspace update --system-datastores-auth-mode "
    "identity), with the role Storage Blob Data Contributor on the account",
    "linkedauthorizationfailed": "you are not allowed to use the identity: you need the role "
    "Managed Identity Operator on it",
    "roleassignmentupdatenotpermitted": "the role assignment belongs to another identity; delete "
    "it",
    # Microsoft Entra copies a new identity to its other regions, which takes a moment.
    "principalnotfound": "the new identity has not reached every region yet: run the same command "
    "again in a minute",
    "subscriptionnotfound": "check azure.subscription_id (yours: az account list) and the tenant",
    "invalidauthenticationtoken": "sign in again: az login",
    "invalidauthenticationtokentenant": "the subscription is in another tenant: "
    "az login --tenant ID, or set AZURE_TENANT_ID",
    "expiredauthenticationtoken": "sign in again: az login",
    "missingsubscriptionregistration": "register the provider: az provider register --namespace "
    "NAMESPACE",
    "resourcegroupnotfound": "create it with: phi3 azure provision",
    "resourcenotfound": "it does not exist; create it with: phi3 azure provision",
    "invalidresourcelocation": "it exists in another region: set azure.location to that one",
    "locationnotavailableforresourcetype": "the region does not offer this: use another "
    "azure.location",
    "vaultalreadyexists": "a deleted key vault keeps its name for up to 90 days: az keyvault "
    "recover or purge, or set azure.key_vault",
    "storageaccountalreadytaken": "the name is taken: set azure.storage_account",
    "storageaccountalreadyexists": "the name is taken: set azure.storage_account",
    "alreadyinuse": "the name is taken: set azure.container_registry",
    "requestdisallowedbypolicy": "a policy of your organisation forbids it; the message names it",
    "scopelocked": "a lock forbids it: az lock list",
    "resourcenotready": "the container did not become ready; its log says why",
    "imagebuildfailure": "the environment's image could not be built; see its log in the studio",
    "toomanyrequests": "Azure is throttling: run the same command again in a few minutes",
    "usererror": "the message says what the service did not accept",
    "toocloseinnametodeletedworkspace": "a deleted workspace keeps its name: recover or purge it",
    "workspacesoftdeleted": "a soft-deleted workspace has this name: purge or recover it in the "
    "portal, or set azure.workspace_name",
}
_FIX_BY_STATUS = {
    401: "sign in again: az login",
    403: FIXES["authorizationfailed"],
    404: FIXES["resourcenotfound"],
    409: "something else is changing the same resource, or it is being deleted: run the same "
    "command again in a few minutes",
    429: FIXES["toomanyrequests"],
}


def code_of(error: BaseException) -> str | None:
    """Azure's error code: the innermost one that has a fix, else the outer one."""
    body = getattr(error, "error", None)
    code = getattr(body, "code", None)
    inner = [getattr(item, "code", None) for item in getattr(body, "details", None) or ()]
    of_storage = getattr(error, "error_code", None)  # the storage SDK puts its code there
    of_storage = getattr(of_storage, "value", of_storage)
    for candidate in (*inner, code, of_storage):
        if candidate and str(candidate).lower() in FIXES:
            return str(candidate)
    return str(code or of_storage) if code or of_storage else None


def message_of(error: BaseException) -> str:
    """Azure's own words, in one line and without secrets."""
    body = getattr(error, "error", None)
    parts = [getattr(body, "message", None)]
    parts += [getattr(item, "message", None) for item in getattr(body, "details", None) or ()]
    words = [str(part) for part in parts if part] or [getattr(error, "message", None) or str(error)]
    text = " ".join(" ".join(dict.fromkeys(words)).split())
    # azure-ai-ml colours the faults that it finds itself, on a terminal or not.
    text = _COLOUR.sub("", text)
    # The storage service goes on with RequestId, Time, ErrorCode and the whole answer as XML.
    text = text.partition(" RequestId:")[0]
    return scrub(text[:1000]).rstrip(".")


def stage_error(error: BaseException, doing: str) -> StageError:
    """The error for the user: `doing` failed, Azure's code and words, and the fix."""
    from azure.core.exceptions import (
        ClientAuthenticationError,
        ServiceRequestError,
        ServiceResponseError,
    )

    if isinstance(error, ClientAuthenticationError) and error.status_code in (None, 401):
        return StageError(
            f"{doing} failed: the sign-in was refused: {message_of(error)}.\n"
            "Fix: sign in again: az login"
        )
    if isinstance(error, (ServiceRequestError, ServiceResponseError)):
        return StageError(
            f"{doing} failed: Azure could not be reached: {message_of(error)}.\n"
            "Fix: check the network (HTTPS_PROXY, REQUESTS_CA_BUNDLE), then run the same "
            "command again; nothing is created twice"
        )
    code, status = code_of(error), getattr(error, "status_code", None)
    # A long-running operation that failed carries the status of the poll that reported it: 200.
    shown = [str(part) for part in (code, status if status not in (None, 200) else None) if part]
    named = f" ({', HTTP '.join(shown)})" if shown else ""
    fix = FIXES.get((code or "").lower())
    if fix is None:
        # Some services put the code into the text alone. Short codes may be plain words there.
        text = str(error).lower()
        fix = next((FIXES[known] for known in FIXES if len(known) > 9 and known in text), None)
    if fix is None and isinstance(status, int):
        fix = _SERVER if status >= 500 else _FIX_BY_STATUS.get(status)
    return StageError(
        f"{doing} failed{named}: {message_of(error)}.\nFix: {fix or 'see the message above'}"
    )


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn what the SDKs raise inside into a StageError that says what was being done."""
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    try:
        yield
    except (AzureError, MlException) as error:
        raise stage_error(error, doing) from None
