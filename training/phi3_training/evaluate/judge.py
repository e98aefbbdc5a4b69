"""Which engine answers the questions: what the endpoint will compute is what is judged.

Reads model folders. An `int4` endpoint is asked through its own engine, on both models converted in
the same way; the tuned model's conversion is the one that `deploy` serves. Everything else is
answered by the loaded weights: float32 on a CPU gives the same tokens as the fp32 conversion.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..finetune import no_progress
from ..finetune.runtime import choose_runtime, torch_threads
from ..finetune.weights import chat_format, count_weights, load_model
from ..recipe import Recipe
from ..run import Run, fingerprint
from ..serve.choice import choose_engine
from ..serve.converted import converted
from ..serve.engines.rope import share_limit
from ..serve.export import export_onnx
from .asking import ask_served
from .greedy import Asked, examine
from .perplexity import answer_losses
from .rows import Answered, AnswerLoss, Said

Step = Callable[[int], None]


@dataclass(frozen=True)
class Judge:
    """Examines a model folder in the number type of the endpoint."""

    recipe: Recipe
    run: Run
    engine: str
    precision: str
    reason: str

    @property
    def sentence(self) -> str:
        """The choice and its reason, for people."""
        return f"answered by {self.engine} in {self.precision}: {self.reason}"

    def as_dict(self) -> dict[str, str]:
        """For the manifest."""
        return {"engine": self.engine, "precision": self.precision, "reason": self.reason}

    def base_key(self, asked: Sequence[Asked]) -> str | None:
        """What the base model's answers depend on; None where its weights have no id."""
        base = self.run.require("base", "phi3 train")
        if "done_id" not in base:
            return None
        limit = self.recipe.evaluate.max_new_tokens
        prompts = [one.whole for one in asked]
        return fingerprint([base["done_id"], self.engine, self.precision, limit, prompts])

    def examine(self, folder: Path, asked: Sequence[Asked], step: Step) -> list[Answered]:
        """The answers and losses of a model that is not to be served."""
        if self.precision != "int4":
            return self._by_weights(folder, asked, step)
        with tempfile.TemporaryDirectory(dir=self.run.path, prefix=".onnx-base.") as scratch:
            onnx = Path(scratch) / "onnx"
            export_onnx(folder, onnx, "int4")
            said = self._by_endpoint(onnx, asked, step)
        return self._with_losses(folder, asked, said)

    def examine_tuned(self, folder: Path, asked: Sequence[Asked], step: Step) -> list[Answered]:
        """The same for the run's model; a conversion is kept, and `deploy` serves it."""
        if self.precision != "int4":
            return self._by_weights(folder, asked, step)
        onnx = converted(self.run, "int4", no_progress)
        return self._with_losses(folder, asked, self._by_endpoint(onnx, asked, step))

    def _by_weights(self, folder: Path, asked: Sequence[Asked], step: Step) -> list[Answered]:
        settings = self.recipe.evaluate
        with self._loaded(folder) as model:
            return examine(
                model,
                chat_format(folder),
                asked,
                max_new_tokens=settings.max_new_tokens,
                at_once=settings.per_device_eval_batch_size,
                share_limit=share_limit(folder),
                step=step,
            )

    def _by_endpoint(self, onnx: Path, asked: Sequence[Asked], step: Step) -> list[Said | None]:
        from ..serve.engines import ort_genai

        settings = self.recipe.evaluate
        at_once = settings.per_device_eval_batch_size
        engine = ort_genai.load(onnx, slots=at_once, num_threads=self.recipe.finetune.num_threads)
        chat = chat_format(onnx)
        # Like lengths together, so that rows of one batch end together.
        order = sorted(range(len(asked)), key=lambda i: len(chat.encode_prompt(asked[i].prompt)))
        answers = ask_served(
            engine,
            chat,
            [asked[i].prompt for i in order],
            max_new_tokens=settings.max_new_tokens,
            at_once=at_once,
            step=step,
        )
        found = dict(zip(order, answers, strict=True))
        return [found[i] for i in range(len(asked))]

    def _with_losses(
        self, folder: Path, asked: Sequence[Asked], said: Sequence[Said | None]
    ) -> list[Answered]:
        """Losses are of the weights themselves: an engine gives tokens, not their probabilities."""
        known = [i for i, one in enumerate(asked) if one.expected]
        losses: list[AnswerLoss | None] = [None] * len(asked)
        with self._loaded(folder) as model:
            found = answer_losses(model, chat_format(folder), [asked[i].whole for i in known])
        for index, loss in zip(known, found, strict=True):
            losses[index] = loss
        return [Answered(*pair) for pair in zip(said, losses, strict=True)]

    @contextmanager
    def _loaded(self, folder: Path) -> Iterator[Any]:
        runtime = choose_runtime(self.recipe, count_weights(folder))
        # On a CPU the endpoint computes in float32, whatever the training did.
        dtype = torch.float32 if runtime.device == "cpu" else runtime.torch_dtype
        with torch_threads(runtime.threads):
            model = load_model(folder, dtype, self.recipe.model.attn_implementation)
            yield model.to(runtime.device).eval()


def choose_judge(recipe: Recipe, run: Run) -> Judge:
    """The judge for a recipe, on this machine."""
    served, _reason = choose_engine(
        "transformers" if recipe.serve.adapters else recipe.serve.engine
    )
    if served == "ort-genai" and recipe.serve.precision == "int4":
        return Judge(recipe, run, "ort-genai", "int4", "as it will be served")
    runtime = choose_runtime(recipe, 0)
    if runtime.device != "cpu":
        return Judge(recipe, run, "transformers", runtime.dtype, f"on this {runtime.device}")
    same = "the same tokens as the fp32 conversion that is served"
    reason = same if served == "ort-genai" else "as it will be served"
    return Judge(recipe, run, "transformers", "fp32", reason)
