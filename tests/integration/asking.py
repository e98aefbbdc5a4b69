"""A client that asks an endpoint all the time, to see whether anybody would notice."""

from __future__ import annotations

import threading

from tests.integration.server_fixture import PAIRS

from phi3_tool.client import Phi3Client
from phi3_tool.errors import Phi3Error
from phi3_training.targets.base import Access


class Asking:
    """A client of the endpoint that asks without a pause, and no deployment by name."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.answers: list[str] = []
        self.failures: list[str] = []

    def _ask(self) -> None:
        with self._access.client(max_retries=0) as client:
            while not self._over.is_set():
                try:
                    self.answers.append(_said(client))
                except Phi3Error as error:
                    self.failures.append(str(error))

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(30)


def _said(client: Phi3Client) -> str:
    question = [{"role": "user", "content": PAIRS[0][0]}]
    return client.chat(question, max_new_tokens=4, temperature=0.0).text
