"""What a person sees: results as text or JSON, tables, the time left."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from phi3_training import console
from phi3_training.progress import TimeLeft


def test_a_table_wraps_where_the_terminal_is_narrow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "out", Console(width=40, highlight=False, soft_wrap=True))

    console.table("Title", ["questions", "before"], [["word " * 20 + "last", "0.0 %"]])

    shown = capsys.readouterr().out
    assert "last" in shown
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 40


def test_a_result_is_lines_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.show("text", {"n": 1}, "one [bold]", "two") == 0
    assert capsys.readouterr().out == "one [bold]\ntwo\n"
    assert console.show("json", {"n": 1}, "one") == 0
    assert json.loads(capsys.readouterr().out) == {"n": 1}


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def counts(clock: Clock, left: TimeLeft, *steps: tuple[float, int, int]) -> list[str]:
    said = []
    for clock.now, done, total in steps:
        said.append(left.after(done, total))
    return said


def test_the_time_left_is_counted_from_the_first_report(clock: Clock) -> None:
    """A resumed stage begins at 50 of 100, and its 50 took no time here."""
    said = counts(clock, TimeLeft(clock), (0, 50, 100), (1, 51, 100), (10, 60, 100), (15, 60, 100))
    assert said == ["", "", "about 40 s left", "about 35 s left"]


def test_minutes_are_shown_as_minutes_and_the_end_not_at_all(clock: Clock) -> None:
    said = counts(clock, TimeLeft(clock), (0, 0, 1000), (30, 100, 1000), (300, 1000, 1000))
    assert said == ["", "about 4 min left", ""]


def test_another_count_starts_it_over(clock: Clock) -> None:
    said = counts(
        clock, TimeLeft(clock), (0, 0, 9), (9, 3, 9), (10, 0, 0), (11, 1, 4), (12, 2, 4), (14, 3, 4)
    )
    assert said == ["", "about 18 s left", "", "", "", "about 2 s left"]


def test_a_stage_that_counts_shows_the_time_left_in_a_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    monkeypatch.setattr(console, "TimeLeft", lambda: TimeLeft(clock))
    monkeypatch.setattr(console, "err", Console(stderr=True, soft_wrap=True))
    with console.progress_bar("finetune") as progress:
        for step in range(0, 60, 20):
            clock.now = float(step)
            progress(step, 100, "epoch 1, loss 2.000")
    assert "20/100 epoch 1, loss 2.000, about 80 s left" in capsys.readouterr().err
