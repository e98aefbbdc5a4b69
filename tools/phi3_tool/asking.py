"""What a chat flow does around its client, whatever runs the flow: Prompt flow or an agent.

Which endpoint is meant, how much of it the history may fill, one client per endpoint, and how a
streamed answer ends that breaks off. Reads the environment through ConnectionSettings.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Generator
from dataclasses import replace
from typing import Optional, Tuple

from .client import Phi3Client
from .connection import ConnectionSettings, environment_names_endpoint
from .errors import Phi3Error
from .history import BROKE_OFF, DEFAULT_CONTEXT_LENGTH, TOKENS_AROUND_MESSAGE, rough_tokens

log = logging.getLogger(__name__)

# Each keeps a pool of open connections.
_MAX_CLIENTS = 16

_Identity = Tuple[int, str, str, Optional[str], Optional[str], Optional[str]]
_clients: OrderedDict[_Identity, Phi3Client] = OrderedDict()
_clients_lock = threading.Lock()


def settings_of(connection: object, deployment: str = "") -> ConnectionSettings:
    """The endpoint that is meant: the environment's where it names one, else the connection's.

    Raises ConfigurationError where neither can be used.
    """
    # Both from the environment or neither: a stored key never goes to another endpoint.
    if environment_names_endpoint():
        settings = ConnectionSettings.from_environment()
    else:
        settings = ConnectionSettings.from_connection(connection)
    chosen = deployment.strip()
    return replace(settings, deployment=chosen) if chosen else settings


def budget(
    settings: ConnectionSettings,
    input_data: str,
    system_prompt: str,
    max_new_tokens: int,
    max_history_tokens: int = 0,
) -> int:
    """Tokens that the whole prompt may have."""
    room = (settings.context_length or DEFAULT_CONTEXT_LENGTH) - max_new_tokens
    if max_history_tokens <= 0:
        return room
    always = (
        rough_tokens(input_data or "") + rough_tokens(system_prompt) + 2 * TOKENS_AROUND_MESSAGE
    )
    wanted = always + max_history_tokens
    # Without a stated context the caller's word counts: the model may well be a 128k one.
    return wanted if settings.context_length is None else min(room, wanted)


def client_for(settings: ConnectionSettings) -> Phi3Client:
    """One client per endpoint, key and process, so that its connections are used again."""
    key_hash = hashlib.sha256(settings.key.encode()).hexdigest()
    identity = (
        os.getpid(),
        settings.endpoint,
        key_hash,
        settings.deployment,
        settings.dialect,
        settings.auth,
    )
    with _clients_lock:
        client = _clients.get(identity)
        if client is None:
            client = _clients[identity] = Phi3Client.from_connection(settings)
            if len(_clients) > _MAX_CLIENTS:
                # Not closed: another thread may be in the middle of a call.
                _clients.popitem(last=False)
        _clients.move_to_end(identity)
        return client


def with_first(first: str, pieces: Generator[str, None, None]) -> Generator[str, None, None]:
    """A streamed answer whose first piece is there; broken off later, it ends with a note."""
    try:
        if first:
            yield first
        yield from pieces
    except Phi3Error as error:
        # The status is long sent. Raised here, the chat page would put "network error" in place of
        # all that came, and one serving engine would end the answer as if it were whole.
        log.warning("the answer was cut off: %s", error)
        yield f"{BROKE_OFF}{error}]"
    finally:
        pieces.close()
