"""Operations that last: whose poller is believed, and what a resource's own state decides."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.core.exceptions import HttpResponseError, ResourceNotFoundError

from phi3_training.errors import StageError
from phi3_training.targets.azure.operations import create, within


def silent(_done: int, _total: int, _text: str) -> None:
    """A progress that nobody reads."""


class Deployment:
    """The ARM deployment's own poller: it ends after some looks, perhaps with an error."""

    def __init__(self, looks: int, error: Exception | None = None) -> None:
        self.looks = looks
        self.error = error

    def done(self) -> bool:
        return self.looks <= 0

    def wait(self, timeout: float | None = None) -> None:
        self.looks -= 1
        if self.done() and self.error is not None:
            raise self.error


class Stub:
    """What azure-ai-ml returns for a workspace: done at once, and silent about its error."""

    def __init__(self, inner: Deployment) -> None:
        self.inner = inner

    def polling_method(self) -> SimpleNamespace:
        return SimpleNamespace(poller=self.inner)

    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> None:
        """It returns at once."""


def made(state: str) -> SimpleNamespace:
    return SimpleNamespace(provisioning_state=state)


def test_a_workspace_is_waited_for_by_its_deployment() -> None:
    inner = Deployment(looks=3)
    ready = create(
        "Creating", lambda: Stub(inner), lambda: made("Succeeded"), silent, limit=60, pause=0.01
    )
    assert (ready.provisioning_state, inner.done()) == ("Succeeded", True)


def test_the_deployments_own_error_is_reported_and_it_is_not_sent_twice() -> None:
    starts = 0

    def start() -> Stub:
        nonlocal starts
        starts += 1
        return Stub(Deployment(2, HttpResponseError("VaultNameTaken: choose another")))

    def read() -> SimpleNamespace:
        raise ResourceNotFoundError("nothing there")

    with pytest.raises(StageError, match="VaultNameTaken"):
        create("Creating", start, read, silent, limit=60, pause=0.01)
    assert starts == 1


def test_a_resource_that_is_found_late_is_waited_for_and_not_made_twice() -> None:
    missing = ResourceNotFoundError("not yet")
    missing.status_code = 404
    answers: list[Exception | SimpleNamespace] = [missing, made("Creating"), made("Succeeded")]
    starts: list[int] = []

    def read() -> SimpleNamespace:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    ready = create("Creating", lambda: starts.append(1), read, silent, limit=60, pause=0.01)
    assert (ready.provisioning_state, len(starts)) == ("Succeeded", 1)


@pytest.mark.parametrize(("state", "told"), [("Failed", "state failed"), ("Creating", "limit")])
def test_a_resource_that_is_not_ready_is_not_taken(state: str, told: str) -> None:
    with pytest.raises(StageError, match=told):
        create("Creating", lambda: None, lambda: made(state), silent, limit=0.05, pause=0.01)


@pytest.mark.patient
def test_a_call_that_never_returns_is_given_up_with_a_line_for_each_second() -> None:
    never, shown = threading.Event(), []
    with pytest.raises(StageError, match=r"uploading: no answer after 1 s.*upload_timeout"):
        within("uploading", never.wait, lambda _d, _t, text: shown.append(text), limit=1)
    never.set()
    assert shown[0].startswith("uploading, ")


def test_what_a_call_prints_stays_off_the_screen_also_from_its_threads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def call() -> str:
        print("a bar of the SDK")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(print, "a bar of its thread", file=sys.stderr).result()
        return "done"

    assert within("x", call, silent, limit=30) == "done"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [HttpResponseError("refused"), SystemExit(9)])
def test_what_a_call_raises_is_raised(error: BaseException) -> None:
    def call() -> None:
        raise error

    with pytest.raises(type(error)):
        within("x", call, silent, limit=30)
