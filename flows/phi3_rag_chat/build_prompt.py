"""The message for the model: instruction, numbered passages that fit, question."""

from promptflow.core import tool

from phi3_tool.grounding import grounded


@tool
def build_prompt(input_data: str, passages: list, min_score: float = 0.0) -> dict:
    return grounded(input_data, passages, min_score)
