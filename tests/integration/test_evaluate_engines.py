"""What is judged is what is served: by weights, by both conversions; the base is asked once."""

from __future__ import annotations

from typing import Any

import pytest
from tests.integration.tiny_model import KNOWN, tiny_recipe, tiny_run, write_chats

from phi3_training.evaluate import evaluate
from phi3_training.evaluate.answers import Asked, Judge, ask_served, choose_judge
from phi3_training.evaluate.rows import PATH
from phi3_training.finetune.weights import chat_format
from phi3_training.manifests import BaseManifest, ModelManifest
from phi3_training.progress import no_progress
from phi3_training.recipe import Recipe
from phi3_training.run import Run
from phi3_training.serve.engines import onnxruntime
from phi3_training.serve.export import converted
from phi3_training.targets.local import server_config

PROMPTS = [[{"role": "user", "content": question}] for question in (*KNOWN, "Who are you?")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose tuned model is its base."""
    run = tiny_run(tmp_path_factory.mktemp("judged"))
    base = run.require(BaseManifest)
    run.write(base.model_copy(update={"done_id": "base"}))
    run.write(ModelManifest(path=base.path, done_id="model", summary="none"))
    for part in ("train", "validation"):
        write_chats(run.path / "data" / f"{part}.jsonl", KNOWN)
    return run


def recipe_of(run: Run, precision: str, **sections: Any) -> Recipe:
    return tiny_recipe(
        run.path / "data" / "train.jsonl",
        serve={"engine": "onnxruntime", "precision": precision},
        evaluate={"max_new_tokens": 24, "canary": [], "probes": [], "resamples": 100},
        **sections,
    )


def judge_of(run: Run, precision: str) -> Judge:
    return choose_judge(recipe_of(run, precision), run)


def test_weights_answer_as_the_fp32_conversion_that_is_served(run: Run) -> None:
    judge = judge_of(run, "fp32")
    folder = run.path / run.require(ModelManifest).path
    asked = [Asked(prompt, KNOWN.get(prompt[0]["content"], "")) for prompt in PROMPTS]

    ours = judge.examine_tuned(folder, asked, lambda _count: None)

    onnx = converted(run, "fp32", no_progress)
    served = ask_served(
        onnxruntime.load(onnx, slots=8), chat_format(onnx), PROMPTS, max_new_tokens=24, at_once=8
    )
    assert judge.precision == "fp32"
    assert [one.said for one in ours] == served


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_a_quantised_endpoint_is_judged_by_its_own_conversion(run: Run, precision: str) -> None:
    recipe = recipe_of(run, precision)

    metrics = evaluate(recipe, run)

    assert metrics.answered_by["precision"] == precision
    assert metrics.answered_by["engine"] == "onnxruntime"
    # Base and tuned model are the same here, and converted in the same way.
    assert metrics.before == metrics.after
    assert metrics.after["train"]["perplexity"] > 0
    graph = run.path / f"onnx-{precision}" / "model.onnx"
    made = graph.stat().st_mtime_ns
    config, _engine, _reason = server_config(recipe, run, no_progress)
    assert config.onnx_dir == graph.parent
    assert graph.stat().st_mtime_ns == made, "deploy serves what was judged"
    assert not list(run.path.glob(".onnx-base*"))


def test_the_base_is_asked_once(run: Run) -> None:
    recipe = recipe_of(run, "fp32")
    shown: list[str] = []

    def progress(_done: int, _total: int, text: str) -> None:
        shown.append(text)

    (run.path / PATH).unlink(missing_ok=True)
    first = evaluate(recipe, run, progress)
    assert any(text.startswith("base model") for text in shown)
    shown.clear()
    assert evaluate(recipe, run, progress) == first
    assert not any(text.startswith("base model") for text in shown)

    run.write(run.require(BaseManifest).model_copy(update={"done_id": "another"}))
    evaluate(recipe, run, progress)
    assert any(text.startswith("base model") for text in shown), "other weights are asked"


def test_right_answers_are_counted_by_their_words(run: Run) -> None:
    metrics = evaluate(recipe_of(run, "fp32"), run)

    trained = metrics.after["train"]
    assert trained["contains"] == pytest.approx(trained["correct"] / len(KNOWN), abs=1e-6)
    assert trained["contains"] >= trained["exact_match"] > 0.8
