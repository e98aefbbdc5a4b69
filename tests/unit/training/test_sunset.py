"""The table of dates: what is due on which day, and who is warned."""

from __future__ import annotations

import datetime as dt
import json

import pytest

from phi3_training import sunset
from phi3_training.cli import main
from phi3_training.doctor.environment import dates
from phi3_training.doctor.finding import State

PROMPT_FLOW = "Prompt flow, read-only in Azure"
PYTHON = "Python 3.11, end of life"


@pytest.mark.parametrize(
    ("day", "ends"),
    [
        ("2026-11-29", []),
        ("2027-01-19", []),
        ("2027-01-20", [PROMPT_FLOW]),
        ("2027-04-21", [PROMPT_FLOW]),
        ("2028-01-01", [PROMPT_FLOW, PYTHON]),
    ],
)
def test_a_date_is_due_from_90_days_before_and_stays_so(day: str, ends: list[str]) -> None:
    rows = sunset.due(dt.date.fromisoformat(day), python=(3, 11))
    assert [row.what for row in rows] == ends


def test_the_end_of_a_python_concerns_only_who_runs_it() -> None:
    day = dt.date(2026, 11, 29)
    assert [row.what for row in sunset.due(day, python=(3, 10))] == ["Python 3.10, end of life"]
    assert sunset.due(day, python=(3, 12)) == []


@pytest.mark.parametrize(
    ("day", "said"),
    [
        ("2027-01-20", "2027-04-20, in 90 days"),
        ("2027-04-20", "2027-04-20, today"),
        ("2027-04-21", "2027-04-20, 1 day ago"),
    ],
)
def test_the_doctor_warns_with_a_command_and_finds_no_fault(
    day: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3_TODAY", day)
    found = [each for each in dates() if PROMPT_FLOW in each.said]
    assert [each.state for each in found] == [State.WARNING]
    assert said in found[0].said
    assert "phi3 chat" in found[0].fix


@pytest.mark.parametrize("day", ["2026-11-29", "2027-04-21", "2028-01-01"])
def test_doctor_dates_prints_every_row_and_fails_on_no_day(
    day: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PHI3_TODAY", day)
    assert main(["doctor", "--dates"]) == 0
    shown = capsys.readouterr().out
    assert all(row.what in shown and row.source in shown for row in sunset.TABLE)
    assert all(str(row.date or "no date") in shown for row in sunset.TABLE)

    assert main(["doctor", "--dates", "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["today"] == day
    assert len(told["dates"]) == len(sunset.TABLE)


@pytest.mark.parametrize("command", ["doctor", "plan"])
def test_a_day_that_is_none_is_a_usage_error(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PHI3_TODAY", "tomorrow")
    assert main([command, *(["--dates"] if command == "doctor" else [])]) == 2
    assert "unset PHI3_TODAY" in capsys.readouterr().err


def test_plan_warns_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    monkeypatch.setenv("PHI3_TODAY", "2027-04-21")
    code = main(["plan", "-o", "json", "--runs", str(tmp_path)])
    late = json.loads(capsys.readouterr().out)["plan"]
    monkeypatch.setenv("PHI3_TODAY", "2026-11-29")
    assert main(["plan", "-o", "json", "--runs", str(tmp_path)]) == code

    lines = [line for line in late if line["stage"] == "dates"]
    assert any(PROMPT_FLOW in line["text"] for line in lines)
    assert not any(line["stops"] for line in lines)


def test_every_row_has_a_source_and_something_to_do() -> None:
    assert all(row.source.startswith("https://") and row.cure for row in sunset.TABLE)


def test_the_product_uses_nothing_that_has_ended() -> None:
    """Fails on the day after an end: then the code must have moved, or the row says how."""
    now = dt.datetime.now().astimezone().date()
    ended = [row.what for row in sunset.TABLE if row.used and row.date and row.date < now]
    assert ended == []
