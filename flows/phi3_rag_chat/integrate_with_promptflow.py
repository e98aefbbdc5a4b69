"""Asks the endpoint, and puts under the answer where its citations point.

Prompt flow requires a @tool function defined in this file, with annotations readable at run time.
"""

from typing import Any

from promptflow.connections import CustomConnection
from promptflow.core import tool

from phi3_tool.chat import phi3_rag_chat
from phi3_tool.promptflow_fixes import quiet_when_served

# Served, Prompt flow logs errors only; PF_LOGGING_LEVEL=INFO brings its other lines back.
quiet_when_served()


# Prompt flow sets `stream`: True where the answer goes straight to a person who watches it come.
@tool(streaming_option_parameter="stream")
def integrate_with_promptflow(
    connection: CustomConnection,
    prompt: dict,
    chat_history: list,
    system_prompt: str = "",
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    stream: bool = False,
) -> Any:
    return phi3_rag_chat(
        connection=connection,
        prompt=prompt,
        chat_history=chat_history,
        system_prompt=system_prompt,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        stream=stream,
    )
