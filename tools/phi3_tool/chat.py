"""The Prompt flow tool "Phi-3 chat": one question and its history in, the answer's text out.

The only module that imports Prompt flow. Annotations stay real objects here, because Prompt flow
reads them: no postponed evaluation, and Optional[...] rather than newer spellings.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from typing import Optional, Tuple

from promptflow.connections import CustomConnection
from promptflow.core import tool

from .client import Phi3Client
from .connection import ConnectionSettings, environment_names_endpoint
from .errors import Phi3Error
from .history import (
    DEFAULT_CONTEXT_LENGTH,
    TOKENS_AROUND_MESSAGE,
    rough_tokens,
    to_messages,
)

_MAX_CLIENTS = 16

_Identity = Tuple[int, str, str, Optional[str], Optional[str]]
_clients: "OrderedDict[_Identity, Phi3Client]" = OrderedDict()
_clients_lock = threading.Lock()


@tool  # type: ignore[untyped-decorator]  # promptflow ships no types
def phi3_chat(
    connection: CustomConnection,
    input_data: str,
    chat_history: Optional[list] = None,  # type: ignore[type-arg]  # Prompt flow knows bare list only
    system_prompt: str = "",
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    max_history_tokens: int = 0,
) -> str:
    """Ask a Phi-3 endpoint one question in the light of the conversation so far.

    `connection` is a custom connection with `endpoint` (configs) and `key` (secrets). Where the
    environment variable PHI3_ENDPOINT is set, it and PHI3_KEY are used instead and the connection
    is not read: so the same flow runs without a connection store, in CI and in containers.

    `max_history_tokens` bounds the earlier turns that are sent, counted roughly and dropped whole,
    oldest first. 0 lets them take what the model's context leaves beside the question and
    `max_new_tokens`; the context is the connection's `context_length`, or 4096.
    """
    try:
        settings = _settings(connection)
        messages = to_messages(
            chat_history,
            input_data,
            system_prompt,
            max_tokens=_budget(
                settings, input_data, system_prompt, max_new_tokens, max_history_tokens
            ),
        )
        reply = _client_for(settings).chat(
            messages, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens
        )
    except Phi3Error as error:
        # Prompt flow shows and stores a failed node's whole traceback: keep it to this one line.
        raise error.with_traceback(None) from None
    return reply.text


def _settings(connection: object) -> ConnectionSettings:
    # Both from the environment or neither: a stored key never goes to another endpoint.
    if environment_names_endpoint():
        return ConnectionSettings.from_environment()
    return ConnectionSettings.from_connection(connection)


def _budget(
    settings: ConnectionSettings,
    input_data: str,
    system_prompt: str,
    max_new_tokens: int,
    max_history_tokens: int,
) -> int:
    """Tokens that the whole prompt may have."""
    room = (settings.context_length or DEFAULT_CONTEXT_LENGTH) - max_new_tokens
    if max_history_tokens <= 0:
        return room
    always = rough_tokens(input_data) + rough_tokens(system_prompt) + 2 * TOKENS_AROUND_MESSAGE
    wanted = always + max_history_tokens
    # Without a stated context the caller's word counts: the model may well be a 128k one.
    return wanted if settings.context_length is None else min(room, wanted)


def _client_for(settings: ConnectionSettings) -> Phi3Client:
    """One client per endpoint, key and process, so that its connections are used again."""
    key_hash = hashlib.sha256(settings.key.encode()).hexdigest()
    identity = (os.getpid(), settings.endpoint, key_hash, settings.deployment, settings.dialect)
    with _clients_lock:
        client = _clients.get(identity)
        if client is None:
            client = _clients[identity] = Phi3Client.from_connection(settings)
            if len(_clients) > _MAX_CLIENTS:
                # Not closed: another thread may be in the middle of a call.
                _clients.popitem(last=False)
        _clients.move_to_end(identity)
        return client
