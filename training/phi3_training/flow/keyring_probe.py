"""Shows that this machine's keyring can keep Prompt flow's key; run with `python -m`.

Writes one line of JSON to standard output. A separate process, because a locked or broken
keyring may wait for ever; its parent process can stop it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

# Where Prompt flow keeps the key that encrypts its connections.
SYSTEM, NAME = "promptflow", "encryption_key"
OWN_SYSTEM, OWN_NAME = "phi3-promptflow", "probe"


def holder_of(members: list[Any], system: str, name: str) -> Any | None:
    """The first keyring that has this entry."""
    return next((each for each in members if each.get_password(system, name) is not None), None)


def probe() -> dict[str, Any]:
    """Name the keyring that holds Prompt flow's key, or would: proven by a written entry."""
    import keyring
    from keyring.backends.chainer import ChainerBackend

    chosen = keyring.get_keyring()
    members = list(chosen.backends) if isinstance(chosen, ChainerBackend) else [chosen]
    holder = holder_of(members, SYSTEM, NAME)
    if holder is None:
        # Written, not only asked: some keyrings answer, and store nothing.
        chosen.set_password(OWN_SYSTEM, OWN_NAME, "written")
        holder = holder_of(members, OWN_SYSTEM, OWN_NAME)
        if holder is None:
            raise SystemExit(f"{type(chosen).__module__} does not store what it is given")
        chosen.delete_password(OWN_SYSTEM, OWN_NAME)
    file = getattr(holder, "file_path", None)
    return {
        "keyring": f"{type(holder).__module__}.{type(holder).__qualname__}",
        "file": None if file is None else str(file),
        "configured": keyring.core.load_config() is not None,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe()) + "\n")
