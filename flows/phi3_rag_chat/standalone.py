"""What to look up: the question, together with the one before it where it leans on that."""

from promptflow.core import tool

from phi3_tool.grounding import standalone_question


@tool
def standalone(input_data: str, chat_history: list) -> dict:
    query, made_from = standalone_question(input_data, chat_history)
    return {"query": query, "made_from": made_from}
