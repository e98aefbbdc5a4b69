"""The Prompt flow tool "Phi-3 chat": one question and its history in, the answer's text out.

With connection_type.py the only module that imports Prompt flow.
"""

# Annotations stay real objects here, because Prompt flow reads them: no postponed evaluation, and
# Optional[...] in place of newer spellings.
import logging
from collections.abc import Generator, Mapping
from typing import Any, Optional, Union

from promptflow.connections import ConnectionProvider, CustomConnection
from promptflow.core import tool
from promptflow.exceptions import PromptflowException

from .client import client_for
from .connection import environment_names_endpoint, settings_of
from .connection_type import Phi3Connection
from .deployments import choices, no_list
from .errors import Phi3Error, RequestRejectedError
from .promptflow_fixes import print_pieces_as_they_come, refuse_what_lacks_a_question
from .wire import BROKE_OFF, budget, to_messages

log = logging.getLogger(__name__)

# Here, where Prompt flow loads the tool: before the first request, row or test of the flow.
refuse_what_lacks_a_question()


# Prompt flow sets `stream` itself: to True where the node's output goes nowhere but to the person,
# in `--interactive` and where a client of the served flow accepts text/event-stream.
@tool(streaming_option_parameter="stream")  # type: ignore[untyped-decorator]  # promptflow ships no types
def phi3_chat(
    connection: Union[CustomConnection, Phi3Connection],
    input_data: str,
    chat_history: Optional[list] = None,  # type: ignore[type-arg]  # Prompt flow knows bare list only
    system_prompt: str = "",
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    max_history_tokens: int = 0,
    deployment: str = "",
    stream: bool = False,
) -> Any:
    """Ask a Phi-3 endpoint one question, with the conversation so far.

    `connection` is a Phi3Connection, or a custom connection with `endpoint` (configs) and `key`
    (secrets). Where the environment variable PHI3_ENDPOINT is set, it and PHI3_KEY are used instead
    and the connection is not read: so the same flow runs without a connection store, in CI and in
    containers.

    `max_history_tokens` limits the earlier turns that are sent; tokens are estimated, and the
    oldest turns are dropped whole. 0 lets them use what the model's context leaves after the
    question and `max_new_tokens`; the context is the connection's `context_length`, or 4096.

    `deployment` names one deployment of the endpoint; it overrides the connection's.

    The answer is text. With `stream` it comes as a generator of pieces, one by one where the
    endpoint speaks OpenAI's dialect and as one piece where it speaks Azure's /score. Whatever goes
    wrong before the first piece is raised here, not by the generator.
    """
    try:
        settings = settings_of(connection, deployment)
        # What fits is decided before the client is made: a question without text, or a broken
        # history, must fail without a connection.
        room = budget(
            settings.context_length, input_data, system_prompt, max_new_tokens, max_history_tokens
        )
        messages = to_messages(chat_history, input_data, system_prompt, max_tokens=room)
        client = client_for(settings)
        ask: dict[str, Any] = {
            "temperature": temperature,
            "top_p": top_p,
            "max_new_tokens": max_new_tokens,
        }
        if stream:
            print_pieces_as_they_come()
            pieces = client.stream(messages, **ask)
            # The first piece is read here: Prompt flow swallows what a generator raises.
            return with_first(next(pieces, ""), pieces)
        return client.chat(messages, **ask).text
    except Phi3Error as error:
        # Prompt flow shows and stores a failed node's whole traceback: keep it to this one line.
        raise error.with_traceback(None) from None


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


def phi3_rag_chat(prompt: Mapping[str, Any], **asked: Any) -> Any:
    """`phi3_chat` on a prompt with passages (`grounding.grounded`), sources under the answer.

    Where no passage fits, the answer is NOT_IN_DOCUMENTS and the model is not asked.
    """
    # Here, because the chat flow without documents needs no SQLite.
    from .grounding import NOT_IN_DOCUMENTS, sources_note, with_sources
    from .index import hits_of

    try:
        hits = hits_of(prompt["passages"])
    except KeyError:
        raise RequestRejectedError(
            "prompt must be the output of build_prompt: text and passages"
        ) from None
    if not prompt["text"]:
        return NOT_IN_DOCUMENTS
    answer = phi3_chat(input_data=prompt["text"], **asked)
    if isinstance(answer, str):
        return answer + sources_note(answer, hits)
    return with_sources(answer, hits)


def list_deployments(connection: Any = None) -> list:  # type: ignore[type-arg]
    """What Prompt flow offers for the input `deployment`: names, and always "no name".

    `connection` is the name of a stored connection, as editors pass it, or a connection. Raises
    nothing: where the endpoint cannot tell, the one entry says why.
    """
    try:
        if isinstance(connection, str) and connection.strip():
            connection = ConnectionProvider.get_instance().get(name=connection.strip())
        if connection or environment_names_endpoint():
            entries = choices(settings_of(connection))
        else:
            entries = [no_list("choose a connection first")]
    except Phi3Error as error:
        entries = [no_list(error.message)]
    except (PromptflowException, OSError, RuntimeError, ValueError) as error:
        entries = [no_list(f"Prompt flow cannot provide the connection ({type(error).__name__})")]
    return [{"value": choice.value, "display_value": choice.shown} for choice in entries]
