"""The Bearer key of the endpoint, compared in constant time. Keeps the key in memory only."""

from __future__ import annotations

import hashlib
import hmac


class BearerKey:
    """Says whether an Authorization header carries the key."""

    def __init__(self, key: str) -> None:
        # Digests have one length, so that not even the key's length shows in the time taken.
        self._digest = hashlib.sha256(key.encode()).digest()

    def matches(self, authorization: str | None) -> bool:
        """True for `Bearer <key>`."""
        scheme, _, given = (authorization or "").partition(" ")
        digest = hashlib.sha256(given.strip().encode("latin-1", "replace")).digest()
        return hmac.compare_digest(digest, self._digest) and scheme.lower() == "bearer"
