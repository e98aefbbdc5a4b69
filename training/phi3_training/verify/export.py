"""Exports a tuned model in another form and proves that it still is the same model.

Reads a run's base, adapter and model; writes run/onnx-<precision> and export-<format>.json.
torch is imported inside the functions only, so that the package itself is cheap to import.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from ..evaluate.metrics import exact_match
from ..finetune.rows import read_rows
from ..manifests import (
    EXPORTS,
    BaseManifest,
    ExportCheck,
    ExportManifest,
    HeldOutCheck,
    LayerDeviation,
    LayersCheck,
    Limits,
    MergedExport,
    ModelManifest,
    Part,
)
from ..progress import Progress
from ..prompt import ChatFormat
from ..recipe import EvaluateSection
from ..recipe.loading import read_yaml
from ..run import RECIPE_FILE, Run
from ..serve.engines.batch import StepModel
from ..serve.engines.tokens import share_limit
from ..serve.export import Precision, converted
from .parity import Vocabulary, golden

# Compares how two models continue the same prompts, token by token.
# Pure: works on step models and ids; reads and writes nothing.

Logits = NDArray[np.float32]
Step = Callable[[], None]


@dataclass(frozen=True)
class Prompt:
    """A prompt: how a report names it, and its ids."""

    name: str
    ids: list[int]


@dataclass(frozen=True)
class Trace:
    """A greedy answer and, for each of its tokens, the logits that it was chosen from."""

    tokens: list[int]
    logits: Logits


@dataclass(frozen=True)
class Deviation:
    """One prompt: mean KL over its answer, the number of equal tokens, the first different one."""

    prompt: str
    kl: float
    tokens: int
    alike: int
    first_other: tuple[int, int, int] | None  # place in the answer, its token, the other's token


def greedy(
    model: StepModel,
    prompt: Sequence[int],
    stops: Sequence[int],
    most: int,
    switch: int | None = None,
) -> Trace:
    """The likeliest answer, its end included. `switch`: see `engines.tokens.share_limit`."""
    # Copies: an engine may write the next logits into the same memory.
    rows = [model.add(prompt, len(prompt) + most).copy()]
    tokens = [int(rows[0].argmax())]
    while len(tokens) < most and tokens[-1] not in stops:
        rows.append(_after(model, [*prompt, *tokens], len(prompt) + most, switch))
        tokens.append(int(rows[-1].argmax()))
    model.drop(0)
    model.reset()
    return Trace(tokens, np.stack(rows))


def forced(
    model: StepModel, prompt: Sequence[int], tokens: Sequence[int], switch: int | None = None
) -> Logits:
    """The logits of a model that is made to say `tokens`. `switch`: as in `greedy`."""
    length = len(prompt) + len(tokens)
    rows = [model.add(prompt, length).copy()]
    rows += [
        _after(model, [*prompt, *tokens[:said]], length, switch) for said in range(1, len(tokens))
    ]
    model.drop(0)
    model.reset()
    return np.stack(rows)


def _after(model: StepModel, ids: Sequence[int], length: int, switch: int | None) -> Logits:
    """The logits after `ids`, of which the model has read all but the last one."""
    if len(ids) - 1 != switch:
        logits: Logits = model.step([ids[-1]])[0].copy()
        return logits
    # The rotation changes here: keys that were rotated before cannot be used any more.
    model.drop(0)
    return model.add(ids, length).copy()


def deviation(prompt: Prompt, trace: Trace, logits: Logits) -> Deviation:
    """How far `logits` are from the trace; KL in nats, of the trace's distribution to the other."""
    # A conversion may pad the vocabulary; no token has those ids.
    size = min(trace.logits.shape[1], logits.shape[1])
    first, second = _log_softmax(trace.logits[:, :size]), _log_softmax(logits[:, :size])
    kl = (np.exp(first) * (first - second)).sum(axis=1)
    chosen = logits.argmax(axis=1)
    other = np.flatnonzero(chosen != np.array(trace.tokens))
    where = int(other[0]) if other.size else None
    return Deviation(
        prompt.name,
        # Rounding may make it a little less than 0; a NaN or an overflow is a broken export.
        max(0.0, float(kl.mean())) if np.isfinite(kl).all() else float("inf"),
        len(trace.tokens),
        len(trace.tokens) - len(other),
        None if where is None else (where, trace.tokens[where], int(chosen[where])),
    )


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    # In float64, and from the largest on: exp overflows a float32 above 88.
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return result


# How far an export may differ from the original, and why.

Format = Literal["merged", "onnx-int4", "onnx-int8", "onnx-fp32"]
FORMATS: tuple[Format, ...] = get_args(Format)
PRECISIONS: dict[Format, Precision] = {
    "onnx-int4": "int4",
    "onnx-int8": "int8",
    "onnx-fp32": "fp32",
}


_ROUNDED = "each weight is rounded to the nearest {}; that is noise, not a trend"

# Merging in exactly the number type of the training. The rounding of a weight is uniform within
# half a step, so its share is about step/sqrt(12): 1e-3 for bfloat16, 1.4e-4 for float16.
MERGED: dict[str, Limits] = {
    "float32": Limits(0.999, 1e-6, 1e-5, 0.0, 1e-6, 1e-3, "float32 sums are exact to about 1e-7"),
    "float16": Limits(0.99, 1e-3, 1e-2, 0.02, 4e-4, 0.5, _ROUNDED.format("float16")),
    "bfloat16": Limits(0.98, 1e-2, 1e-1, 0.02, 3e-3, 0.5, _ROUNDED.format("bfloat16")),
}

ONNX: dict[str, Limits] = {
    "onnx-fp32": Limits(
        0.999,
        1e-5,
        1e-4,
        0.0,
        0.0,
        0.0,
        "the same sums in another order: only near-ties may differ",
    ),
    # Measured on SmolLM2-135M: 90 % of the tokens, mean KL 0.05, nine parts in ten of it from the
    # activations (with 8-bit weights alone: 97 %, 0.005).
    "onnx-int8": Limits(0.85, 0.1, 1.0, 0.1, 0.0, 0.0, "eight bits per weight and per activation"),
    # Measured on the tiny Phi-3: 93 % of the tokens, mean KL 0.03, 2 of 39 answers lost. A broken
    # conversion is far outside: KL above 1, next to no answer left.
    "onnx-int4": Limits(
        0.85,
        0.1,
        1.0,
        0.1,
        0.0,
        0.0,
        "four bits per weight: tokens change where the model is unsure",
    ),
}


# What the compared models are asked: fixed prompts, and the run's held-out conversations.
# Reads run/data/validation.jsonl.

HELD_OUT_ROWS = 64
_QUESTIONS = (
    "Who founded Microsoft?",
    "What is the capital of France?",
    "How do I boil an egg?",
    "Write a short poem about the sea.",
    "Name three colours.",
    "What is 17 plus 25?",
    "Explain photosynthesis in one sentence.",
    "Translate 'good morning' into German.",
    "What should I pack for a hike in the rain?",
    "Thanks, that was helpful!",
    "Give me a Python function that adds two numbers.",
    "When did the Second World War end?",
    "Which tent is best for two people?",
    "Tell me a joke.",
    "Why is the sky blue?",
    "Summarise: The cat sat on the mat and slept.",
)


@dataclass(frozen=True)
class HeldOut:
    """A held-out conversation: its prompt and the answer that is expected."""

    prompt: Prompt
    expected: str


def fixed_prompts(chat: ChatFormat) -> list[Prompt]:
    """The same for every run: everyday questions and the golden conversations."""
    asked = [(text, [{"role": "user", "content": text}]) for text in _QUESTIONS]
    cases = [(case.name, list(case.messages)) for case in golden(chat, ["<|end|>"])]
    prompts = (Prompt(name, chat.encode_prompt(messages)) for name, messages in [*asked, *cases])
    return [prompt for prompt in prompts if _fits(prompt, chat)]


def held_out(run: Run, chat: ChatFormat) -> list[HeldOut]:
    """At most 64 of the run's held-out rows, spread over all of them."""
    path = run.path / "data" / "validation.jsonl"
    rows = read_rows([path]) if path.is_file() else []
    chosen = rows[:: -(-len(rows) // HELD_OUT_ROWS)] if rows else []
    rows_held_out = []
    for messages in chosen:
        question = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        prompt = Prompt(question, chat.encode_prompt(messages[:-1]))
        rows_held_out.append(HeldOut(prompt, messages[-1]["content"]))
    return [row for row in rows_held_out if _fits(row.prompt, chat)]


def _fits(prompt: Prompt, chat: ChatFormat) -> bool:
    return len(prompt.ids) < chat.context_length


def answer_length(run: Run) -> int:
    """Tokens of an answer at most: as many as the evaluation gives it (run/recipe.yaml)."""
    path = run.path / RECIPE_FILE
    section = read_yaml(path).get("evaluate") if path.is_file() else None
    return EvaluateSection.model_validate(section or {}).max_new_tokens


# Figures of a comparison against their limits; what breaks one is named by prompt or layer.
# Pure: works on what was measured; reads and writes nothing.


class LayerFigures(Protocol):
    """What is needed of a compared weight."""

    @property
    def name(self) -> str: ...
    @property
    def weights(self) -> float: ...
    @property
    def change(self) -> float: ...
    @property
    def dtype(self) -> str: ...


def behaviour(
    deviations: Sequence[Deviation],
    limits: Limits,
    token: Callable[[int], str],
    sides: tuple[str, str],
) -> ExportCheck:
    """Figures over all prompts, and the problems; `sides` names the two models."""
    tokens = sum(d.tokens for d in deviations)
    agreement = sum(d.alike for d in deviations) / tokens
    mean_kl = sum(d.kl * d.tokens for d in deviations) / tokens
    worst = max(deviations, key=lambda d: d.kl)
    least = min(deviations, key=lambda d: d.alike / d.tokens)
    problems = []
    if agreement < limits.token_agreement:
        problems.append(
            f"only {agreement:.2%} of the tokens are the same (at least "
            f"{limits.token_agreement:.1%}); worst prompt: {_named(least, token, sides)}"
        )
    if mean_kl > limits.mean_kl:
        problems.append(
            f"mean KL {mean_kl:.2g} (at most {limits.mean_kl:g}); "
            f"worst prompt: {_named(worst, token, sides)}"
        )
    if worst.kl > limits.worst_kl:
        problems.append(
            f"KL {worst.kl:.2g} at one prompt (at most {limits.worst_kl:g}): "
            f"{_named(worst, token, sides)}"
        )
    return ExportCheck(
        passed=not problems,
        problems=problems,
        compared_with=sides[0],
        prompts=len(deviations),
        tokens=tokens,
        token_agreement=round(agreement, 6),
        answers_alike=sum(d.first_other is None for d in deviations),
        mean_kl=mean_kl,
        worst_kl=worst.kl,
        worst_prompt=worst.prompt,
        limits=limits,
    )


def answers(
    before: Sequence[bool], after: Sequence[bool], names: Sequence[str], limits: Limits
) -> tuple[HeldOutCheck, list[str]]:
    """Exact match on held-out rows before and after, and the rows that were lost."""
    rows = len(before)
    lost = [n for n, was, now in zip(names, before, after, strict=True) if was and not now]
    delta = (sum(after) - sum(before)) / rows
    figures = HeldOutCheck(
        rows=rows,
        exact_match_before=round(sum(before) / rows, 6),
        exact_match=round(sum(after) / rows, 6),
        delta=round(delta, 6),
        lost=lost,
    )
    if -delta <= limits.lost_answers:
        return figures, []
    shown = ", ".join(repr(name[:60]) for name in lost[:3])
    return figures, [
        f"exact match on {rows} held-out rows drops by {-delta:.1%} "
        f"(at most {limits.lost_answers:.1%}); lost: {shown}"
    ]


def weights(
    layers: Sequence[LayerFigures], limits: Limits, dtype: str
) -> tuple[LayersCheck, list[str]]:
    """The layers that are furthest from base plus adapter."""
    by_weights = sorted(layers, key=lambda layer: layer.weights, reverse=True)
    by_change = max(layers, key=lambda layer: layer.change)
    problems = []
    wrong = [layer for layer in layers if layer.dtype != dtype]
    if wrong:
        problems.append(
            f"{len(wrong)} weights are {wrong[0].dtype}, but the model was trained in {dtype} and "
            f"must be merged in it; the first: {wrong[0].name}"
        )
    if by_weights[0].weights > limits.weights:
        problems.append(
            f"the layer {by_weights[0].name} is off by {by_weights[0].weights:.2g} of its size "
            f"(at most {limits.weights:g})"
        )
    if by_change.change > limits.change:
        problems.append(
            f"the layer {by_change.name} lost {by_change.change:.1%} of what the adapter changes "
            f"in it (at most {limits.change:.1%})"
        )
    check = LayersCheck(
        count=len(layers),
        largest=by_weights[0].weights,
        layer=by_weights[0].name,
        largest_change=by_change.change,
        furthest=[
            LayerDeviation(name=layer.name, weights=layer.weights, change=layer.change)
            for layer in by_weights[:5]
        ],
    )
    return check, problems


def _named(deviation: Deviation, token: Callable[[int], str], sides: tuple[str, str]) -> str:
    text = f"{deviation.prompt[:60]!r}"
    if deviation.first_other is None:
        return text
    place, first, second = deviation.first_other
    return (
        f"{text}, answer token {place + 1}: {sides[0]} says {token(first)!r}, "
        f"{sides[1]} says {token(second)!r}"
    )


# Exports one format of a run's model and compares it with the original.
# Reads run/base, run/adapter and run/model; writes run/onnx-<precision> and export-<format>.json.


def export(run: Run, to: Format, progress: Progress) -> ExportCheck:
    """Make the export, compare, and write `export-<format>.json`; `passed` is the verdict.

    Raises StageError when a part is missing or cannot be loaded.
    """
    model = run.require(ModelManifest)
    folder = run.path / model.path
    exam = _Exam(run, folder, progress)
    exported: ExportManifest
    if to == "merged":
        check, exported = _merged(run, model, folder, exam), MergedExport(path=model.path)
    else:
        onnx = converted(run, PRECISIONS[to], progress)
        limits = ONNX[to]
        from ..finetune.runtime import quiet_libraries
        from ..serve.engines import onnxruntime
        from . import models

        quiet_libraries()
        reference = models.merged_rows(folder)
        said = exam.first(reference, "merged")
        del reference
        candidate = onnxruntime.step_model(onnx)
        check = exam.second(candidate, said, limits, ("merged", to))
        exported = run.require(EXPORTS[to])
    run.write(exported.model_copy(update={"of": model.done_id, "check": check}))
    return check


class _Exam:
    """The same questions for both models, and the first one's answers."""

    def __init__(self, run: Run, folder: Path, progress: Progress) -> None:
        self._chat = ChatFormat.from_folder(folder)
        self._prompts = fixed_prompts(self._chat)
        self._rows = held_out(run, self._chat)
        self._most = answer_length(run)
        self._switch = share_limit(folder)
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
    ) -> ExportCheck:
        """The figures of the other model against those, and the problems."""
        deviations = []
        for prompt, trace in zip(self._prompts, said[0], strict=True):
            logits = forced(model, prompt.ids, trace.tokens, self._switch)
            deviations.append(deviation(prompt, trace, logits))
            self._step(sides[1])
        check = behaviour(deviations, limits, self.token, sides)
        if not self._rows:
            return check
        names = [row.prompt.name for row in self._rows]
        held_out, lost = answers(said[1], self._right(model, sides[1]), names, limits)
        return _with_part(check, lost, held_out=held_out)

    def _trace(self, model: StepModel, prompt: Prompt, name: str) -> Trace:
        self._step(name)
        most = min(self._most, self._chat.context_length - len(prompt.ids))
        return greedy(model, prompt.ids, self._chat.stop_token_ids, most, self._switch)

    def _right(self, model: StepModel, name: str) -> list[bool]:
        matches = []
        for row in self._rows:
            tokens = self._trace(model, row.prompt, name).tokens
            ended = tokens and tokens[-1] in self._chat.stop_token_ids
            answer = self._chat.decode(tokens[:-1] if ended else tokens)
            matches.append(exact_match(answer, row.expected))
        return matches

    def _step(self, name: str) -> None:
        self._done += 1
        self._progress(self._done, self._total, f"asking {name}")


def _with_part(check: ExportCheck, problems: Sequence[str], **part: Part) -> ExportCheck:
    """The check with one more part and its problems."""
    listed = [*check.problems, *problems]
    return check.model_copy(update={**part, "problems": listed, "passed": not listed})


def _merged(run: Run, model: ModelManifest, folder: Path, exam: _Exam) -> ExportCheck:
    """The merged model against base and adapter side by side: behaviour, then every weight."""
    from ..finetune.runtime import quiet_libraries
    from . import models

    quiet_libraries()
    dtype = str(model.settings["dtype"])
    if model.adapter is None:
        note = "all weights were trained, so there is no merged adapter to check"
        return ExportCheck(passed=True, problems=[], note=note)
    base = run.path / run.require(BaseManifest).path
    limits = MERGED[dtype]
    side = models.unmerged(base, run.path / model.adapter)
    said = exam.first(models.rows_of(side), "base and adapter")
    layers, wrong = weights(list(models.layers(side, base, folder)), limits, dtype)
    del side
    sides = ("base and adapter", "merged")
    check = exam.second(models.merged_rows(folder), said, limits, sides)
    return _with_part(check, wrong, layers=layers)
