"""phi3_tool.failures: how often, how long, and whose word counts."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
import requests

from phi3_tool.errors import ServiceError
from phi3_tool.failures import BACKOFF_CEILING, Retry, RetryBudget, retry_after_seconds
from phi3_tool.transport import request_with_retries


def longest(low: float, high: float) -> float:
    assert low == 0.0
    return high


def test_waits_double_up_to_a_ceiling() -> None:
    budget = RetryBudget(8, 0.5, longest)
    waits = [budget.next_wait(Retry.BOUNDED, None, 1e9) for _ in range(9)]
    assert waits == [0.5, 1, 2, 4, 8, 16, BACKOFF_CEILING, BACKOFF_CEILING, None]


def test_jitter_is_full() -> None:
    waits = [RetryBudget(1, 10).next_wait(Retry.BOUNDED, None, 1e9) for _ in range(200)]
    assert all(wait is not None and 0 <= wait <= 10 for wait in waits)
    assert min(w for w in waits if w is not None) < 2 < 8 < max(w for w in waits if w is not None)


def test_never_and_once() -> None:
    assert RetryBudget(4, 0, longest).next_wait(Retry.NEVER, 0, 1e9) is None
    budget = RetryBudget(4, 0, longest)
    assert budget.next_wait(Retry.ONCE, None, 1e9) == 0
    assert budget.next_wait(Retry.ONCE, None, 1e9) is None
    assert budget.next_wait(Retry.BOUNDED, None, 1e9) == 0
    assert RetryBudget(0, 0, longest).next_wait(Retry.BOUNDED, None, 1e9) is None


def test_a_servers_wish_is_obeyed_to_a_ceiling_and_within_the_deadline() -> None:
    assert RetryBudget(1, 0.5, longest).next_wait(Retry.BOUNDED, 7, 100) == 7
    assert RetryBudget(1, 0.5, longest).next_wait(Retry.BOUNDED, 0, 100) == 0
    assert RetryBudget(1, 0.5, longest).next_wait(Retry.BOUNDED, 3600, 100) == 30
    assert RetryBudget(1, 0.5, longest).next_wait(Retry.BOUNDED, 7, 7) is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after": "3", "x-ms-retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "100"}, 0.1),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"x-ms-retry-after-ms": "x", "retry-after": "2"}, 2),
    ],
)
def test_reading_the_header(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_seconds(headers) == seconds


def test_an_http_date_in_the_future() -> None:
    moment = datetime.now(timezone.utc) + timedelta(seconds=90)
    wait = retry_after_seconds({"retry-after": format_datetime(moment, usegmt=True)})
    assert wait is not None
    assert 85 < wait < 91


class Scripted(requests.Session):
    """Answers with the given statuses; an exception is a lost connection."""

    def __init__(self, *answers: int | Exception, **headers: str) -> None:
        super().__init__()
        self._answers = list(answers)
        self._headers = headers

    def request(self, *_: object, **__: object) -> requests.Response:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        response = requests.Response()
        response.status_code = answer
        response._content = b'{"error": {"message": "busy"}}'
        response.headers.update({k.replace("_", "-"): v for k, v in self._headers.items()})
        return response


def test_a_request_is_repeated_until_its_answer_counts() -> None:
    waits: list[float] = []
    session = Scripted(429, requests.ConnectionError(), 503, 404)
    answer = request_with_retries(
        session, "GET", "http://a", "nothing", tries=5, sleep=waits.append
    )
    assert answer.status_code == 404
    assert waits == [1, 2, 4]


def test_the_server_says_how_long_and_the_last_word_is_reported() -> None:
    waits: list[float] = []
    with pytest.raises(ServiceError, match="no vectors: status 503: busy"):
        request_with_retries(
            Scripted(503, 503, 503, retry_after="900"),
            "POST",
            "http://a",
            "no vectors",
            tries=3,
            sleep=waits.append,
        )
    assert waits == [60, 60]
