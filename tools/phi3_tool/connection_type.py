"""Phi3Connection: the connection that Prompt flow offers by its own name for the tool "Phi-3 chat".

Prompt flow reads its annotations at run time, so they stay real objects: no postponed evaluation.
"""

from promptflow.connections import CustomStrongTypeConnection
from promptflow.contracts.types import Secret


# No docstring, on purpose: Prompt flow 1.18 writes it as comments into a template that it then
# cannot read, and gives the whole package up with a warning.
class Phi3Connection(CustomStrongTypeConnection):  # type: ignore[misc]  # promptflow ships no types
    key: Secret
    #: The scoring URI, ending with /score or with /v1/chat/completions.
    endpoint: str
    #: One of the endpoint's deployments; empty lets the endpoint choose.
    deployment: str = ""
    #: "score" or "openai", where the endpoint's path does not tell.
    api: str = ""
