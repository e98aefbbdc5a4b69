"""Stop strings and token choice: the parts of an answer that need no model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from phi3_training.serve.engines.base import Sampling, StopCutter
from phi3_training.serve.engines.batch import Sampler, defaults_of, with_defaults


def cut(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    cutter = StopCutter(stops)
    sent = "".join(cutter.push(piece) for piece in pieces)
    return sent + cutter.flush(), cutter.hit


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "hit"),
    [
        ([], ["a", "b"], "ab", False),
        (["END"], ["one EN", "D two"], "one ", True),
        (["END"], ["one E", "N", "DLESS"], "one ", True),
        (["END"], ["one EN", "OUGH"], "one ENOUGH", False),
        (["END"], ["one EN"], "one EN", False),
        (["\n\n", "User:"], ["a\n", "b User", ":c"], "a\nb ", True),
        (["aab"], ["aa", "ab"], "a", True),
        ([""], ["a"], "a", False),
    ],
)
def test_stop_strings_across_pieces(
    stops: list[str], pieces: list[str], text: str, hit: bool
) -> None:
    assert cut(stops, pieces) == (text, hit)


def test_nothing_after_a_stop_string() -> None:
    cutter = StopCutter(["x"])
    assert cutter.push("axb") == "a"
    assert cutter.push("more") == ""
    assert cutter.flush() == ""


def test_text_before_a_possible_stop_is_not_held_back() -> None:
    cutter = StopCutter(["END"])
    assert cutter.push("hello E") == "hello "


LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def draws(sampling: Sampling, count: int = 400) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.pick(LOGITS) for _ in range(count)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(draws(Sampling(temperature=0.0), 5)) == {0}


def test_one_seed_one_sequence() -> None:
    assert draws(Sampling(temperature=1.0, seed=7)) == draws(Sampling(temperature=1.0, seed=7))
    assert draws(Sampling(temperature=1.0, seed=7)) != draws(Sampling(temperature=1.0, seed=8))


def test_shares_follow_the_probabilities() -> None:
    drawn = draws(Sampling(temperature=1.0, seed=1), 4000)
    shares = [drawn.count(token) / len(drawn) for token in range(4)]
    assert shares == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)


def test_top_k_and_top_p_leave_the_rest_out() -> None:
    assert set(draws(Sampling(temperature=1.0, top_k=2, seed=1))) == {0, 1}
    assert set(draws(Sampling(temperature=1.0, top_p=0.75, seed=1))) == {0, 1}
    assert set(draws(Sampling(temperature=1.0, top_p=0.01, seed=1))) == {0}


def test_penalties_make_room_for_other_tokens() -> None:
    assert draws(Sampling(temperature=0.0, presence_penalty=2.0), 2) == [0, 1]
    assert draws(Sampling(temperature=0.0, frequency_penalty=0.6), 3) == [0, 1, 0]


def test_defaults_come_from_the_model_folder(tmp_path: Path) -> None:
    assert defaults_of(tmp_path).temperature == 0.0
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    merged = with_defaults(Sampling(top_p=0.5, max_new_tokens=9), defaults_of(tmp_path))
    assert (merged.temperature, merged.top_p, merged.top_k) == (0.6, 0.5, 20)
    assert merged.max_new_tokens == 9
    config["do_sample"] = False
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert defaults_of(tmp_path).temperature == 0.0
