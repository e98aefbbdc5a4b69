"""Looks the question up in the index; inputs and output are named as in Index Lookup."""

from pathlib import Path

from promptflow.core import tool

from phi3_tool.grounding import look_up


@tool
def lookup(queries: str, query_type: str = "hybrid", top_k: int = 4, index: str = "") -> list:
    return look_up(queries, index, Path(__file__).parent, query_type=query_type, top_k=top_k)
