"""Asks the base and the tuned model of a run, arm by arm; answers are saved and used again.

Reads the run's models; writes run/rag/answers/ARM.json after each arm, so that a comparison that
was interrupted asks only what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Protocol

from phi3_tool.grounding import NOT_IN_DOCUMENTS

from ..evaluate.answers import Asked, ask_all, choose_judge
from ..finetune.runtime import quiet_libraries
from ..finetune.weights import base_folder, chat_format
from ..manifests import BaseManifest, ModelManifest
from ..progress import Progress
from ..recipe import Recipe
from ..run import Run, fingerprint, write_atomically
from .arms import Arm, Prompt

FOLDER = "rag/answers"


@dataclass(frozen=True)
class Reply:
    """An answer; `asked` False where no passage fits and no model was asked."""

    text: str
    cut: bool
    asked: bool
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Replies:
    """All answers of an arm; `seconds` is the time of the model for all of them together."""

    replies: list[Reply]
    seconds: float

    @property
    def seconds_each(self) -> float:
        """For one question that the model was asked."""
        return self.seconds / max(1, sum(reply.asked for reply in self.replies))


class Asker(Protocol):
    """What answers the prompts of arms."""

    @property
    def sentence(self) -> str: ...

    def expect(self, total: int) -> None: ...

    def ask(self, name: str, arm: Arm, prompts: Sequence[Prompt]) -> Replies: ...


class Asking:
    """Answers prompts with a run's models, in the engine and number type of its endpoint."""

    def __init__(self, recipe: Recipe, run: Run, progress: Progress) -> None:
        quiet_libraries()
        self._run, self._recipe, self._progress = run, recipe, progress
        self._judge = choose_judge(recipe, run)
        self._base = base_folder(run)
        self._tuned = run.path / run.require(ModelManifest).path
        self._total = self._done = 0

    def expect(self, total: int) -> None:
        """How many prompts will be asked, for the estimate of the time left."""
        self._total = total

    @property
    def sentence(self) -> str:
        """Which engine answers, and why."""
        return self._judge.sentence

    def ask(self, name: str, arm: Arm, prompts: Sequence[Prompt]) -> Replies:
        """The answer to each prompt, from the file of an earlier run where it is the same."""
        file = self._run.path / FOLDER / f"{name}.json"
        # What the answers depend on; without an id of the weights nothing saved can be trusted.
        kind: type[BaseManifest | ModelManifest] = ModelManifest if arm.tuned else BaseManifest
        weights = self._run.require(kind).done_id
        settings = [self._judge.engine, self._judge.precision]
        limit = self._recipe.evaluate.max_new_tokens
        said_before = [prompt.text for prompt in prompts]
        key = weights and fingerprint([weights, settings, limit, said_before])
        try:
            saved = json.loads(file.read_text("utf-8"))
            if key is not None and saved["key"] == key:
                replies = Replies([Reply(**each) for each in saved["replies"]], saved["seconds"])
                self._done += len(prompts)
                self._progress(self._done, self._total, f"{arm.label}: answered in an earlier run")
                return replies
        except (OSError, ValueError, TypeError, KeyError):
            pass  # nothing was saved, or by another version
        # Each text once: greedy, so the same prompt has the same answer.
        texts = list(dict.fromkeys(prompt.text for prompt in prompts if prompt.text))
        asked = [Asked([{"role": "user", "content": text}]) for text in texts]
        self._done += len(prompts) - len(texts)
        started = time.monotonic()

        def step(count: int) -> None:
            self._done += count
            self._progress(self._done, self._total, arm.label)

        step(0)
        judge = self._judge
        folder = self._tuned if arm.tuned else self._base
        examine = judge.examine_tuned if arm.tuned else judge.examine
        answers = examine(folder, asked, step) if asked else []
        seconds = time.monotonic() - started
        chat = chat_format(folder)
        by_text = {"": Reply(NOT_IN_DOCUMENTS, cut=False, asked=False, prompt_tokens=0,
                             answer_tokens=0)}  # fmt: skip
        for text, question, answered in zip(texts, asked, answers, strict=True):
            said = answered.said
            spoken = said.text if said else ""
            whole = [*question.prompt, {"role": "assistant", "content": spoken}]
            # Counted here for both models alike: engines count in their own ways.
            prompt = len(chat.encode_prompt(question.prompt))
            tokens = len(chat.encode_example(whole).input_ids) - prompt if spoken else 0
            by_text[text] = Reply(spoken, said is None or said.cut, True, prompt, tokens)
        replies = Replies([by_text[prompt.text] for prompt in prompts], seconds)
        content = json.dumps({"key": key, **asdict(replies)}, ensure_ascii=False)
        # After each arm: an interrupted comparison keeps what it paid for.
        write_atomically(file, content)
        return replies


@contextmanager
def answering(
    recipe: Recipe, run: Run, arms: Mapping[str, Arm], max_new_tokens: int
) -> Iterator[Callable[[Arm, Prompt], str]]:
    """Holds the weights that some arms need, for one question after another.

    Yields a function from an arm and a prompt to the answer.
    """
    quiet_libraries()
    judge = choose_judge(recipe, run)
    folders = {False: base_folder(run), True: run.path / run.require(ModelManifest).path}
    with ExitStack() as stack:
        models = {
            tuned: stack.enter_context(judge.loaded(folders[tuned]))
            # Both models only where both are asked: each takes its whole memory.
            for tuned in sorted({arm.tuned for arm in arms.values()})
        }
        chats = {tuned: chat_format(folders[tuned]) for tuned in models}

        def answer(arm: Arm, prompt: Prompt) -> str:
            if not prompt.text:
                return NOT_IN_DOCUMENTS
            (said,) = ask_all(
                models[arm.tuned],
                folders[arm.tuned],
                chats[arm.tuned],
                [[{"role": "user", "content": prompt.text}]],
                max_new_tokens=max_new_tokens,
                at_once=1,
            )
            return said.text if said else "(The prompt does not fit into the model's context.)"

        yield answer
