"""A flow is not pushed a second time while nobody can tell whether it is there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
pytest.importorskip("promptflow.core", reason="the extra `flow` is not installed")

from azure.core.exceptions import HttpResponseError

from phi3_training.errors import StageError
from phi3_training.flow import store
from phi3_training.targets.azure.prompt_flow import CONTENT_TAG, flow_of_content


def _client(*answers: Any) -> Any:
    def listed(**_limits: Any) -> Any:
        if not answers:
            raise HttpResponseError("the index is down")
        return answers

    return SimpleNamespace(flows=SimpleNamespace(list=listed))


def test_a_list_that_cannot_be_had_stops_only_who_pushed_before() -> None:
    assert flow_of_content(_client(), "abc", "Pushing", must_know=False) is None
    with pytest.raises(StageError, match="the index is down"):
        flow_of_content(_client(), "abc", "Pushing", must_know=True)


def test_the_same_content_is_found() -> None:
    other, same = SimpleNamespace(tags={}), SimpleNamespace(tags={CONTENT_TAG: "abc"})
    assert flow_of_content(_client(other, same), "abc", "Pushing", must_know=True) is same
    assert flow_of_content(_client(other), "abc", "Pushing", must_know=True) is None


def test_a_push_asks_nobody_for_a_newer_prompt_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    hints = pytest.importorskip("promptflow._sdk._version_hint_utils")
    telemetry = pytest.importorskip("promptflow._sdk._telemetry")
    asked: list[str] = []
    monkeypatch.setattr(hints, "HINT_ACTIVITY_NAME", list(hints.HINT_ACTIVITY_NAME))
    monkeypatch.setattr(hints, "hint_for_update", lambda: asked.append("hint"))
    monkeypatch.setattr(hints, "check_latest_version", lambda: None)

    @telemetry.monitor_operation(
        activity_name="pfazure.flows.create_or_update",
        activity_type=telemetry.ActivityType.PUBLICAPI,
    )
    def push(_client: object) -> None:
        """As the client's own method is wrapped."""

    push(None)
    assert asked == ["hint"]
    store.no_update_check()
    push(None)
    assert asked == ["hint"]
