"""Phi3Connection: the connection that Prompt flow offers by its own name for the tool "Phi-3 chat".

Prompt flow reads its annotations at run time, so they stay real objects: no postponed evaluation.
"""

from promptflow.connections import CustomStrongTypeConnection
from promptflow.contracts.types import Secret


class Phi3Connection(CustomStrongTypeConnection):  # type: ignore[misc]  # promptflow ships no types
    """An online endpoint with a Phi-3 behind it.

    :param key: the endpoint's key
    :type key: Secret
    :param endpoint: the scoring URI, ending with /score or with /v1/chat/completions
    :type endpoint: String
    :param deployment: one deployment of several behind the endpoint; empty lets the endpoint choose
    :type deployment: String
    :param api: score or openai, where the endpoint's path does not tell
    :type api: String
    """

    key: Secret
    endpoint: str
    deployment: str = ""
    api: str = ""
