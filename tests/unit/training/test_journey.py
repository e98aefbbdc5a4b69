"""The journey: done stages are skipped, changed inputs and lost outputs are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phi3_training.errors import StageError
from phi3_training.journey import Journey, Stage, finished, go
from phi3_training.manifests import Manifest
from phi3_training.recipe import Recipe
from phi3_training.run import Run


class First(Manifest):
    STAGE = "first"
    COMMAND = "phi3 up"


class Second(Manifest):
    STAGE = "second"
    COMMAND = "phi3 up"


class Bench:
    """A journey of two toy stages that counts how often each is done."""

    def __init__(self, folder: Path) -> None:
        recipe = Recipe.model_construct(name="toy")
        run = Run.open(folder / "toy")
        self.journey = Journey(recipe, run, target=None, flow=folder)  # type: ignore[arg-type]
        self.done: list[str] = []
        self.input = "one"
        self.good = True
        self.fails = False

    def stages(self) -> tuple[Stage[Any], ...]:
        return (
            Stage(First, "first", (), lambda _: self.input, self._work(First), str,
                  outputs=lambda _: ["first.txt"]),
            Stage(Second, "second", (First,), lambda _: None, self._work(Second), str,
                  still_good=lambda *_: self.good),
        )  # fmt: skip

    def _work(self, kind: type[Manifest]) -> Callable[[Journey], Any]:
        def work(journey: Journey) -> Manifest:
            name = kind.STAGE
            if self.fails and name == "second":
                raise StageError("no")
            journey.run.file(f"{name}.txt").write_text("x", encoding="utf-8")
            self.done.append(name)
            return kind()

        return work

    def go(self, **options: Any) -> list[str]:
        self.done.clear()
        go(self.journey, self.stages(), **options)
        return list(self.done)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_second_time_does_nothing(bench: Bench) -> None:
    assert bench.go() == ["first", "second"]
    assert bench.go() == []


def test_changed_input_redoes_what_follows(bench: Bench) -> None:
    bench.go()
    bench.input = "two"
    assert bench.go() == ["first", "second"]


def test_lost_output_is_made_again(bench: Bench) -> None:
    bench.go()
    (bench.journey.run.path / "first.txt").unlink()
    assert bench.go() == ["first", "second"]


def test_stage_that_no_longer_holds_is_redone_alone(bench: Bench) -> None:
    bench.go()
    bench.good = False
    assert bench.go() == ["second"]


def test_again_redoes_a_stage_and_what_follows(bench: Bench) -> None:
    bench.go()
    assert bench.go(again=frozenset({First})) == ["first", "second"]


def test_failure_keeps_what_was_done(bench: Bench) -> None:
    bench.fails = True
    with pytest.raises(StageError):
        bench.go()
    bench.fails = False
    assert bench.go() == ["second"]


def test_unfinished_stage_is_not_finished(bench: Bench) -> None:
    assert finished(bench.journey, bench.stages()[0]) is None


def test_skipped_stages_are_reported_and_the_rest_runs(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = bench.stages()
    stages = (replace(first, left_out=lambda _: "it is not here; get it"), second)
    go(bench.journey, stages)
    assert bench.done == ["second"]
    assert "left out: it is not here; get it" in capsys.readouterr().err
    assert bench.journey.run.read(First) is None
