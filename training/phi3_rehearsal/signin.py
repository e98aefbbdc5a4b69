"""Sign-in as Microsoft Entra ID does it for a service principal, and the check of its tokens.

Reads and writes nothing; tokens are signed with the rehearsal's seed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from urllib.parse import parse_qsl

from .cloud import CALLER, CLIENT, Cloud, route
from .wire import AzureError, Json, Reply, Request

LOGIN = "login.microsoftonline.com"
_LIFETIME = 3600
# Whom a token must be for, by the names that `route` uses.
AUDIENCES = {
    "management": ("https://management.azure.com", "https://management.core.windows.net"),
    "regional": (
        "https://management.azure.com",
        "https://management.core.windows.net",
        "https://ml.azure.com",
    ),
    "ml": ("https://ml.azure.com",),
    "storage": ("https://storage.azure.com",),
}


@route("GET", LOGIN, "/{tenant}/v2.0/.well-known/openid-configuration", audience="")
def openid_configuration(_cloud: Cloud, request: Request) -> Reply:
    """Where to get a token."""
    base = f"https://{LOGIN}/{request.args['tenant']}"
    return Reply(
        200,
        {
            "token_endpoint": f"{base}/oauth2/v2.0/token",
            "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
            "device_authorization_endpoint": f"{base}/oauth2/v2.0/devicecode",
            "issuer": f"{base}/v2.0",
            "jwks_uri": f"{base}/discovery/v2.0/keys",
        },
    )


@route("GET", LOGIN, "/common/discovery/instance", audience="")
def instance_discovery(_cloud: Cloud, _request: Request) -> Reply:
    """The hosts of the public cloud."""
    aliases = [LOGIN, "login.windows.net", "login.microsoft.com", "sts.windows.net"]
    entry = {"preferred_network": LOGIN, "preferred_cache": "login.windows.net", "aliases": aliases}
    endpoint = f"https://{LOGIN}/common/v2.0/.well-known/openid-configuration"
    return Reply(200, {"tenant_discovery_endpoint": endpoint, "metadata": [entry]})


@route("POST", LOGIN, "/{tenant}/oauth2/v2.0/token", audience="")
def token(cloud: Cloud, request: Request) -> Reply:
    """A token for the service principal, if its secret is right."""
    form = dict(parse_qsl(request.body.decode("utf-8", "replace")))
    if form.get("grant_type") != "client_credentials":
        text = "AADSTS70003: The app requested an unsupported grant type."
        return Reply(400, {"error": "unsupported_grant_type", "error_description": text})
    known = form.get("client_id") == CLIENT
    if not known or not _same(form.get("client_secret", ""), client_secret(cloud)):
        text = "AADSTS7000215: Invalid client secret provided."
        return Reply(401, {"error": "invalid_client", "error_description": text})
    audience = form.get("scope", "").split(" ")[0].removesuffix("/.default")
    claims = {"aud": audience, "tid": request.args["tenant"], "appid": CLIENT, "oid": CALLER}
    access = sign(cloud, claims)
    return Reply(
        200,
        {"token_type": "Bearer", "expires_in": _LIFETIME, "access_token": access},
        {"Cache-Control": "no-store"},
    )


def client_secret(cloud: Cloud) -> str:
    """The secret of the made-up service principal."""
    return cloud.derive("client-secret")


def sign(cloud: Cloud, claims: Json, lifetime: int = _LIFETIME) -> str:
    """A JSON web token with these claims."""
    now = int(time.time())
    times = {"iat": now, "nbf": now - 60, "exp": now + lifetime}
    head = _encode({"alg": "HS256", "typ": "JWT"})
    text = f"{head}.{_encode({**claims, **times})}"
    return f"{text}.{_signature(cloud, text)}"


def claims_of(cloud: Cloud, value: str) -> Json | None:
    """The claims of a token that is ours and has not expired."""
    text, _, signature = value.rpartition(".")
    if not text or not _same(signature, _signature(cloud, text)):
        return None
    part = text.split(".")[1]
    claims: Json = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return claims if claims["exp"] > time.time() else None


def check_token(cloud: Cloud, request: Request, audience: str) -> None:
    """Raise AzureError (401) unless the call carries a token for `audience`."""
    if not audience:
        return
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not value:
        raise AzureError(
            401, "AuthenticationFailed", "The 'Authorization' header is missing or invalid."
        )
    claims = claims_of(cloud, value)
    if claims is None:
        raise AzureError(
            401, "ExpiredAuthenticationToken", "The access token is invalid or has expired."
        )
    if claims["aud"].rstrip("/") not in AUDIENCES[audience]:
        raise AzureError(
            401,
            "InvalidAuthenticationTokenAudience",
            f"The access token has the wrong audience '{claims['aud']}'; "
            f"expected '{AUDIENCES[audience][0]}'.",
        )


def _encode(value: Json) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def _signature(cloud: Cloud, text: str) -> str:
    key = cloud.derive("token-signature").encode()
    digest = hmac.new(key, text.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _same(left: str, right: str) -> bool:
    return hmac.compare_digest(left.encode(), right.encode())
