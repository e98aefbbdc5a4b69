"""A flow is not pushed a second time while nobody can tell whether it is there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")
pytest.importorskip("promptflow.core", reason="the extra `flow` is not installed")

from azure.core.exceptions import HttpResponseError

from phi3_training.errors import StageError
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
