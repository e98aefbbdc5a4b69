"""Exports one format of a run's model and holds it against what it was made of.

Reads run/base, run/adapter and run/model; writes run/onnx-<precision> and export-<format>.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..console import ProgressCallback
from ..evaluate.metrics import exact_match
from ..parity.report import Vocabulary
from ..prompt import ChatFormat
from ..run import Run
from ..serve.converted import converted
from ..serve.engines.batch import StepModel
from . import verdict
from .behaviour import Prompt, Trace, deviation, forced, greedy
from .limits import MERGED, ONNX, PRECISIONS, Format, Limits
from .probes import MAX_NEW_TOKENS, HeldOut, fixed_prompts, held_out

Manifest = dict[str, Any]


def export(run: Run, to: Format, progress: ProgressCallback) -> Manifest:
    """Make the export, compare, and write `export-<format>.json`; `check.passed` is the verdict.

    Raises StageError when a part is missing or cannot be loaded.
    """
    model = run.require("model", "phi3 train")
    folder = run.path / str(model["path"])
    exam = _Exam(run, folder, progress)
    if to == "merged":
        check, made = _merged(run, model, folder, exam), {"path": str(model["path"])}
    else:
        onnx = converted(run, PRECISIONS[to], progress)
        check, made = _onnx(folder, onnx, ONNX[to], to, exam), run.require(f"export-{to}", "")
    run.write_manifest(f"export-{to}", {**made, "of": model["done_id"], "check": check})
    return check


class _Exam:
    """The same questions for both models, and what the first one said."""

    def __init__(self, run: Run, folder: Path, progress: ProgressCallback) -> None:
        self._chat = ChatFormat.from_folder(folder)
        self._prompts = fixed_prompts(self._chat)
        self._rows = held_out(run, self._chat)
        self._progress = progress
        self._done, self._total = 0, 2 * (len(self._prompts) + len(self._rows))
        self.token = Vocabulary(folder).text

    def first(self, model: StepModel, name: str) -> tuple[list[Trace], list[bool]]:
        """What the reference says to everything."""
        traces = [self._trace(model, prompt, name) for prompt in self._prompts]
        return traces, self._right(model, name)

    def second(
        self,
        model: StepModel,
        said: tuple[list[Trace], list[bool]],
        limits: Limits,
        sides: tuple[str, str],
    ) -> tuple[Manifest, list[str]]:
        """The figures of the other model against those, and the problems."""
        found = []
        for prompt, trace in zip(self._prompts, said[0], strict=True):
            found.append(deviation(prompt, trace, forced(model, prompt.ids, trace.tokens)))
            self._step(sides[1])
        figures, problems = verdict.behaviour(found, limits, self.token, sides)
        if self._rows:
            names = [row.prompt.name for row in self._rows]
            after = self._right(model, sides[1])
            figures["held_out"], lost = verdict.answers(said[1], after, names, limits)
            problems += lost
        return figures, problems

    def _trace(self, model: StepModel, prompt: Prompt, name: str) -> Trace:
        self._step(name)
        return greedy(model, prompt.ids, self._chat.stop_token_ids, MAX_NEW_TOKENS)

    def _right(self, model: StepModel, name: str) -> list[bool]:
        return [self._is_right(model, row, name) for row in self._rows]

    def _is_right(self, model: StepModel, row: HeldOut, name: str) -> bool:
        tokens = self._trace(model, row.prompt, name).tokens
        return exact_match(self._chat.decode(_answer(tokens, self._chat)), row.expected)

    def _step(self, name: str) -> None:
        self._done += 1
        self._progress(self._done, self._total, f"asking {name}")


def _answer(tokens: Sequence[int], chat: ChatFormat) -> Sequence[int]:
    return tokens[:-1] if tokens and tokens[-1] in chat.stop_token_ids else tokens


def _merged(run: Run, model: Manifest, folder: Path, exam: _Exam) -> Manifest:
    """The merged model against base and adapter side by side: behaviour, then every weight."""
    from ..finetune.runtime import quiet_libraries
    from . import models

    quiet_libraries()
    dtype = str(model["settings"]["dtype"])
    if model.get("adapter") is None:
        note = "all weights were trained: there is no adapter that could be merged wrongly"
        return {"passed": True, "problems": [], "note": note}
    base = run.path / str(run.require("base", "phi3 train")["path"])
    limits = MERGED[dtype]
    side = models.unmerged(base, run.path / str(model["adapter"]))
    said = exam.first(models.rows_of(side), "base and adapter")
    layers, wrong = verdict.weights(list(models.layers(side, base, folder)), limits, dtype)
    del side
    sides = ("base and adapter", "merged")
    figures, problems = exam.second(models.merged_rows(folder), said, limits, sides)
    return _check(sides[0], {**figures, "layers": layers}, [*wrong, *problems], limits)


def _onnx(folder: Path, onnx: Path, limits: Limits, to: str, exam: _Exam) -> Manifest:
    """The ONNX folder against the merged model."""
    from ..finetune.runtime import quiet_libraries
    from ..serve.engines import ort_genai
    from . import models

    quiet_libraries()
    reference = models.merged_rows(folder)
    said = exam.first(reference, "merged")
    del reference
    candidate = ort_genai.step_model(onnx)
    figures, problems = exam.second(candidate, said, limits, ("merged", to))
    return _check("merged", figures, problems, limits)


def _check(against: str, figures: Manifest, problems: list[str], limits: Limits) -> Manifest:
    return {
        "passed": not problems,
        "compared_with": against,
        "problems": problems,
        **figures,
        "limits": limits.as_dict(),
    }
