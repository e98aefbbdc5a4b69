"""Comparing exports without models: KL, agreement, limits, and what a problem names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from phi3_training.run import Run
from phi3_training.serve.engines.batch import Logits
from phi3_training.verify import export
from phi3_training.verify.export import MERGED, ONNX, Deviation, Prompt, deviation, forced, greedy

STRICT = ONNX["onnx-fp32"]
SIDES = ("merged", "onnx-fp32")


class Counting:
    """Says the successor of each token, in one buffer that it uses again and again."""

    def __init__(self, skew: float = 0.0) -> None:
        self._buffer: Logits = np.zeros((1, 8), np.float32)
        self._skew = skew

    def has_room(self, length: int) -> bool:
        return True

    def add(self, ids: Sequence[int], length: int) -> Logits:
        return self._after(ids[-1])[0]

    def step(self, tokens: Sequence[int]) -> Logits:
        return self._after(tokens[0])

    def drop(self, row: int) -> None:
        pass

    def reset(self) -> None:
        pass

    def _after(self, token: int) -> Logits:
        self._buffer[:] = 0
        self._buffer[0, (token + 1) % 8] = 5
        self._buffer[0, 7] += self._skew
        return self._buffer


def test_greedy_stops_at_a_stop_token_and_at_the_limit() -> None:
    assert greedy(Counting(), [1], [5], 9).tokens == [2, 3, 4, 5]
    assert greedy(Counting(), [1], [], 3).tokens == [2, 3, 4]


def test_logits_are_kept_although_the_engine_uses_its_buffer_again() -> None:
    trace = greedy(Counting(), [1], [5], 9)
    assert trace.logits.argmax(axis=1).tolist() == trace.tokens
    assert forced(Counting(), [1], trace.tokens).argmax(axis=1).tolist() == trace.tokens


@dataclass
class Switching(Counting):
    """Counts how it is asked: what was added, and how many tokens by steps."""

    def __post_init__(self) -> None:
        super().__init__()
        self.added: list[int] = []
        self.steps = 0

    def add(self, ids: Sequence[int], length: int) -> Logits:
        self.added.append(len(ids))
        return super().add(ids, length)

    def step(self, tokens: Sequence[int]) -> Logits:
        self.steps += 1
        return super().step(tokens)


def test_both_sides_are_read_again_where_the_rotation_switches() -> None:
    one, other = Switching(), Switching()
    trace = greedy(one, [1], [7], 9, switch=3)
    assert trace.tokens == [2, 3, 4, 5, 6, 7]
    assert (one.added, one.steps) == ([1, 4], 4)
    forced(other, [1], trace.tokens, switch=3)
    assert (other.added, other.steps) == ([1, 4], 4)


@pytest.mark.parametrize(
    ("recipe", "length"), [(None, 64), ("name: r", 64), ("evaluate: {max_new_tokens: 200}", 200)]
)
def test_answers_are_as_long_as_in_the_evaluation(
    recipe: str | None, length: int, tmp_path: Path
) -> None:
    if recipe:
        (tmp_path / "recipe.yaml").write_text(recipe)
    assert export.answer_length(Run(tmp_path)) == length


def test_equal_models_do_not_deviate() -> None:
    trace = greedy(Counting(), [1], [5], 9)
    found = deviation(Prompt("p", [1]), trace, forced(Counting(), [1], trace.tokens))
    assert found == Deviation("p", 0.0, 4, 4, None)


def test_kl_is_that_of_the_distributions() -> None:
    trace = greedy(Counting(), [1], [5], 1)
    other = forced(Counting(3.0), [1], trace.tokens)
    p = np.exp(trace.logits[0].astype(float))
    q = np.exp(other[0].astype(float))
    p, q = p / p.sum(), q / q.sum()
    found = deviation(Prompt("p", [1]), trace, other)
    assert found.kl == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-9)


def test_the_first_other_token_is_named() -> None:
    trace = greedy(Counting(), [1], [5], 9)
    found = deviation(Prompt("p", [1]), trace, forced(Counting(9.0), [1], trace.tokens))
    assert found.alike == 0
    assert found.first_other == (0, 2, 7)


def test_logits_that_are_no_numbers_are_infinitely_far() -> None:
    trace = greedy(Counting(), [1], [5], 2)
    found = deviation(Prompt("p", [1]), trace, np.full_like(trace.logits, np.nan))
    assert found.kl == float("inf")


def test_a_problem_names_the_worst_prompt_and_both_tokens() -> None:
    good, bad = Deviation("good", 0.0, 9, 9, None), Deviation("bad", 2.0, 10, 4, (3, 1, 2))
    check = export.behaviour([good, bad], STRICT, "abc".__getitem__, SIDES)
    assert not check.passed
    assert check.token_agreement == pytest.approx(13 / 19, abs=1e-6)
    assert check.worst_prompt == "bad"
    assert len(check.problems) == 3
    assert all(
        "'bad', answer token 4: merged says 'b', onnx-fp32 says 'c'" in problem
        for problem in check.problems
    )
    assert export.behaviour([good], STRICT, str, SIDES).passed


def test_lost_answers_are_named() -> None:
    figures, problems = export.answers([True, True], [True, False], ["one", "two"], STRICT)
    assert figures.lost == ["two"]
    assert "drops by 50.0%" in problems[0]
    assert "'two'" in problems[0]
    assert export.answers([False, True], [True, True], ["one", "two"], STRICT)[1] == []


@dataclass(frozen=True)
class Weight:
    name: str
    weights: float = 0.0
    change: float = 0.0
    dtype: str = "float32"


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (Weight("q_proj", weights=0.01), "the layer q_proj is off by 0.01"),
        (Weight("q_proj", change=1.0), "the layer q_proj lost 100.0%"),
        (Weight("q_proj", dtype="float16"), "1 weights are float16"),
    ],
)
def test_weight_problems_name_the_layer(weight: Weight, said: str) -> None:
    _, problems = export.weights([Weight("other"), weight], MERGED["float32"], "float32")
    assert len(problems) == 1
    assert said in problems[0]
    assert "q_proj" in problems[0]


def test_rounding_to_bfloat16_passes_as_bfloat16_only() -> None:
    rounded = [Weight("w", weights=1.1e-3, change=0.1, dtype="bfloat16")]
    assert export.weights(rounded, MERGED["bfloat16"], "bfloat16")[1] == []
    assert len(export.weights(rounded, MERGED["float32"], "float32")[1]) == 3
