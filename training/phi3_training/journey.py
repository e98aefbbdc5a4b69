"""The journey: prepare → base → finetune → evaluate → gate → register → deploy → connect → ask.

Reads a recipe and the run folder; each stage writes its manifest and is skipped while its
inputs are unchanged, so an interrupted `phi3 up` resumes where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from . import console
from .errors import StageError, UsageError
from .finetune.runtime import release
from .manifests import DatasetManifest, Manifest
from .models.catalogue import weights_folder
from .models.folder import check_rope
from .models.layers import matrices_of, targets_in
from .progress import Progress, no_progress
from .recipe import Recipe, read_yaml, save_recipe
from .run import RECIPE_FILE as RECIPE_FILE
from .run import Run, fingerprint, sha256_of
from .targets import Target, target_of

M = TypeVar("M", bound=Manifest)

_NEEDS_A_DEVICE = {"base", "finetune", "evaluate", "deploy"}  # what a plan can refuse, by title


@dataclass
class Journey:
    """What the stages share: the recipe, the run folder, the target and the flow to ask."""

    recipe: Recipe
    run: Run
    target: Target
    flow: Path
    force: bool = False  # deploy even what the gate refuses
    no_plan: bool = False  # begin even what the plan refuses
    again: frozenset[type[Manifest]] = frozenset()  # of the stages that always run again
    to_come: frozenset[type[Manifest]] = frozenset()  # of the stages after the one at work
    progress: Progress = no_progress

    @property
    def in_cloud(self) -> bool:
        """Whether the target is away from this machine."""
        return self.target.cloud is not None


@dataclass(frozen=True)
class Stage(Generic[M]):
    """One stage. `inputs` is what its result depends on, in addition to the stages in `needs`."""

    manifest: type[M]
    title: str
    needs: tuple[type[Manifest], ...]
    inputs: Callable[[Journey], Any]
    work: Callable[[Journey], M]
    summary: Callable[[M], str]
    outputs: Callable[[M], Sequence[str]] = lambda _manifest: ()  # files inside the run folder
    still_good: Callable[[Journey, M], bool] = lambda _journey, _manifest: True
    passed: Callable[[M], bool] = lambda _manifest: True
    left_out: Callable[[Journey], str] = lambda _journey: ""  # why it is not done here, and a fix
    only_in_cloud: bool = False
    needs_in_cloud: tuple[type[Manifest], ...] | None = None  # instead of `needs`


def go(
    journey: Journey,
    stages: Sequence[Stage[Any]],
    *,
    again: frozenset[type[Manifest]] = frozenset(),
) -> None:
    """Do every stage that is not done; those whose manifests are in `again` always run.

    Raises what a stage raises (Phi3TrainingError and its kin), and StageError for what the plan
    says would fail; finished stages stay finished.
    """
    save_recipe(journey.recipe, journey.run.file(RECIPE_FILE))
    journey.again = again
    check = PlanCheck(journey)
    for number, stage in enumerate(stages):
        if why := stage.left_out(journey):
            console.stage_left_out(stage.title, why)
            continue
        done = None if stage.manifest in again else finished(journey, stage)
        if done is not None:
            console.stage_done(stage.title, stage.summary(done), None, good=stage.passed(done))
            continue
        check.before(stages[number:])
        journey.to_come = frozenset(later.manifest for later in stages[number + 1 :])
        with console.progress_bar(stage.title) as progress:
            manifest = do(journey, stage, progress)
        good = stage.passed(manifest)
        console.stage_done(stage.title, stage.summary(manifest), manifest.seconds, good=good)
        for choice in manifest.choices:
            console.note(choice)


class PlanCheck:
    """Refuses what the plan says would fail, before the first stage that uses a device.

    That is after `prepare`, because the plan is about the chats as well as the model. `base` may
    bring the tokenizer that counts them, so what follows it is looked at again.
    """

    def __init__(self, journey: Journey) -> None:
        self._journey = journey
        self._is_done = journey.no_plan

    def before(self, to_do: Sequence[Stage[Any]]) -> None:
        """Look at the first of the stages that are to be done, and at those after it.

        Raises StageError, which names the key that fixes it, where one of them would fail.
        """
        first = to_do[0].title
        if self._is_done or first not in _NEEDS_A_DEVICE:
            return
        if self._journey.in_cloud:
            return  # elsewhere the plan is not of this machine's memory
        self._is_done = first != "base"
        titles = {stage.title for stage in to_do}
        lines = self._journey.target.plan(self._journey.recipe, self._journey.run)
        stops = [line for line in lines if line.stops and line.stage in titles]
        if stops:
            listed = "\n".join(f"  {line.stage}: {line.text}" for line in stops)
            raise StageError(
                f"Stopped before {first!r}, because the plan says that this would fail:\n{listed}\n"
                "To start anyway, add --no-plan."
            )


def finished(journey: Journey, stage: Stage[M]) -> M | None:
    """The stage's manifest if it still holds: same inputs, outputs there, still working."""
    manifest = journey.run.read(stage.manifest)
    if manifest is None or manifest.fingerprint != _fingerprint(journey, stage):
        return None
    if not all((journey.run.path / output).exists() for output in stage.outputs(manifest)):
        return None
    return manifest if stage.still_good(journey, manifest) else None


def do(journey: Journey, stage: Stage[M], progress: Progress) -> M:
    """Run a stage unconditionally and write its manifest."""
    started = time.monotonic()
    journey.progress = progress
    content = stage.work(journey)
    seconds = time.monotonic() - started
    release()
    # The id changes each time a stage is done, so that what follows is done again as well.
    stamp = {"fingerprint": _fingerprint(journey, stage), "done_id": fingerprint(time.time_ns())}
    manifest = content.model_copy(update={**stamp, "seconds": round(seconds, 3)})
    journey.run.write(manifest)
    return manifest


def _fingerprint(journey: Journey, stage: Stage[M]) -> str:
    needs = stage.needs
    if stage.needs_in_cloud is not None and journey.in_cloud:
        needs = stage.needs_in_cloud
    before = [journey.run.read(kind) for kind in needs]
    ids = [None if manifest is None else manifest.done_id for manifest in before]
    return fingerprint([stage.inputs(journey), ids])


def file_hashes(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file: what the data stage depends on."""
    return [sha256_of(path) for path in paths]


# What is refused before a run folder is touched or anything is downloaded.


def check_model(recipe: Recipe) -> Sequence[str]:
    """Raise what training would stop at, where the base model is known on this machine.

    Returns the choices made for it, such as which of its matrices get an adapter.
    """
    folder = weights_folder(recipe.model.name_or_path)
    if folder is not None:
        check_rope(folder)
    modules = matrices_of(recipe.model.name_or_path)
    if modules is None or recipe.finetune.method == "full":
        return ()
    try:
        return targets_in(recipe.finetune.target_modules, modules).choices
    except ValueError as error:
        raise UsageError(str(error)) from None


def refuse_other_place(run: Run, on: str) -> None:
    """Resources that a run created elsewhere would be forgotten, and might bill for ever."""
    created_on = target_of(run)
    if created_on != on and run.path.is_dir() and any(run.path.glob("*.json")):
        raise UsageError(
            f"The run {run.name!r} was created on {created_on}; resume it there with "
            f"--on {created_on}, or start one on {on} under another name with --run NAME"
        )


def refuse_other_chats(run: Run, recipe: Recipe) -> None:
    """A model trained on other chats would be lost. The same chats at another path are the same."""
    saved = run.path / RECIPE_FILE
    trained = any((run.path / name).exists() for name in ("model.json", "finetune"))
    if not trained or not saved.is_file():
        return
    before, now = read_yaml(saved), recipe.model_dump(mode="json")
    if any((content.get("finetune") or {}).get("adapter") for content in (before, now)):
        return  # each adapter of a run may have chats of its own
    paths = (before.get("data") or {}).get("train")
    if paths == now["data"]["train"]:
        return
    from .data import fingerprints

    dataset = run.read(DatasetManifest)
    known = [] if dataset is None else [part.sha256 for part in dataset.inputs.get("train", ())]
    if known and known == fingerprints(recipe.data.train):
        return
    shown = ", ".join(map(str, paths or ["unknown"]))
    raise UsageError(
        f"The run {run.name!r} was trained on other chats ({shown}) and would be replaced. "
        "Keep both: add --run NAME. Replace it: add --replace"
    )
