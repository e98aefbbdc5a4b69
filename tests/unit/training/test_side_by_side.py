"""Steps at the same time: their results, their failures, and what is seen of them meanwhile."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from phi3_training.errors import StageError
from phi3_training.progress import Progress, captured_output, note
from phi3_training.targets.azure.operations import side_by_side


def test_each_is_seen_on_its_own_line_and_gives_its_result() -> None:
    shown: list[str] = []
    both = threading.Barrier(3)

    def work(name: str) -> str:
        both.wait(20)  # neither ends before both have begun and were seen
        return name

    def cluster(progress: Progress) -> str:
        note(progress, "cluster: creating")
        return work("gpu")

    def project(progress: Progress) -> str:
        progress(1, 2, "hub")
        return work("foundry")

    def look(_done: int, _total: int, text: str) -> None:
        shown.append(text)
        if sorted(text.splitlines()) == ["1/2 hub", "cluster: creating"] and not both.n_waiting < 2:
            both.wait(20)

    found = side_by_side(look, {"cluster": cluster, "project": project})
    assert found == {"cluster": "gpu", "project": "foundry"}
    assert any(len(text.splitlines()) == 2 for text in shown)


def test_the_others_end_before_a_failure_is_raised() -> None:
    failed, ended = threading.Event(), threading.Event()

    def fails(_progress: Progress) -> None:
        failed.set()
        raise StageError("no hub")

    def lasts(_progress: Progress) -> None:
        failed.wait(20)
        ended.set()

    with pytest.raises(StageError, match="no hub"):
        side_by_side(lambda *_: None, {"a": fails, "b": lasts})
    assert ended.is_set()


def test_nothing_to_do_is_done() -> None:
    assert side_by_side(lambda *_: None, {}) == {}


def test_captures_that_overlap_give_the_streams_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    inside, first_left = threading.Event(), threading.Event()

    def other() -> None:
        with captured_output(io.StringIO()):
            inside.set()
            first_left.wait(20)
            print("of the other")

    thread = threading.Thread(target=other)
    sink = io.StringIO()
    with captured_output(sink):
        thread.start()
        inside.wait(20)
        print("of the first")
    first_left.set()  # the one that came first leaves first
    thread.join(20)
    assert (sys.stdout, sys.stderr) == before
    assert sink.getvalue() == "of the first\n"
    assert capsys.readouterr() == ("", "")
