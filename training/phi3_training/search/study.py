"""The search itself: Optuna proposes, a trial measures, everything is kept in run/search/study.db.

An interrupted search resumes: finished trials are not run again, and the interrupted trial is
proposed again with the same values and resumes from its checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace

import optuna
from optuna.trial import TrialState

from .. import console
from ..errors import DataError, RecipeError, StageError, UsageError
from ..journey import Journey, PlanCheck, do, finished, go
from ..manifests import BaseManifest, DatasetManifest, MetricsManifest, ModelManifest
from ..progress import Progress
from ..recipe import Recipe
from ..run import Run, fingerprint
from ..stages import stages_until
from .plan import (
    TRAINING_METRICS,
    Choices,
    IntRange,
    MakeRecipe,
    SearchPlan,
    Value,
    overrides_of,
)
from .report import Finished, best_of, write_report

# Gets each held-out loss with its step; ends the trial by raising.
Watch = Callable[[float, int], None]
# So many trials are drawn at random before Optuna's sampler (TPE) models what is good.
_RANDOM_TRIALS = 5
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)
# Keys of a recipe that do not change what a trial measures.
_NO_PART = {"save_steps", "save_seconds", "save_total_limit", "allow", "num_threads"}


def trial_journey(whole: Journey, recipe: Recipe, number: int) -> Journey:
    """The journey of trial `number`, with chats and base where its recipe has the same ones."""
    run = Run.open(whole.run.path / "search" / "trials" / f"trial-{number:03d}")
    # A trial that changes the chats or the base makes its own.
    if recipe.data == whole.recipe.data:
        dataset = whole.run.require(DatasetManifest)
        for part in dataset.outputs.values():
            target = run.file(part.path)
            target.unlink(missing_ok=True)
            try:
                os.link(whole.run.path / part.path, target)  # large chats are on the disk once
            except OSError:  # a file system without links
                shutil.copyfile(whole.run.path / part.path, target)
        run.write(dataset)
    if (recipe.base, recipe.model) == (whole.recipe.base, whole.recipe.model):
        manifest = whole.run.require(BaseManifest)
        place = whole.run.path / manifest.path  # an absolute path stays what it is
        run.write(manifest.model_copy(update={"path": str(place)}))
    return replace(whole, recipe=recipe, run=run)


def measure(journey: Journey, metric: str, progress: Progress, watch: Watch) -> float:
    """Train (and evaluate, if the metric needs it) what is not done yet; the metric's value.

    Raises what the stages and `watch` raise, and StageError when there is no such figure.
    """
    stages = stages_until(ModelManifest if metric in TRAINING_METRICS else MetricsManifest)
    check = PlanCheck(journey)
    for number, stage in enumerate(stages):
        if finished(journey, stage) is None:
            check.before(stages[number:])
            training = stage.manifest is ModelManifest
            shown = _watched(progress, journey.run, watch) if training else progress
            do(journey, stage, shown)
    part, _, figure = metric.partition(".")
    value: float | None
    if figure:
        value = journey.run.require(MetricsManifest).after.get(part, {}).get(figure)
    else:
        value = getattr(journey.run.require(ModelManifest), metric)
    if value is None or not math.isfinite(value):
        raise StageError(f"The trial has no value for {metric} (found: {value}).")
    return float(value)


def _watched(progress: Progress, run: Run, watch: Watch) -> Progress:
    """`progress` that also reports each new held-out loss that training logs."""
    log = run.path / "finetune" / "eval.jsonl"
    reported: set[int] = set()
    size = 0

    def step(done: int, total: int, text: str) -> None:
        nonlocal size
        progress(done, total, text)
        if done == 0 or not log.is_file() or log.stat().st_size == size:
            return
        size = log.stat().st_size
        for line in log.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["step"] <= done and entry["step"] not in reported:
                reported.add(entry["step"])
                watch(float(entry["loss"]), int(entry["step"]))

    return step


def search(journey: Journey, plan: SearchPlan, make: MakeRecipe) -> dict[str, object]:
    """Run the trials that are missing; the report (also run/search/report.json).

    Raises StageError when no trial came to a figure, and UsageError when the run folder holds
    another search.
    """
    go(journey, stages_until(BaseManifest))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if plan.pruning is not None:
        pruner = optuna.pruners.MedianPruner(plan.pruning.startup_trials, plan.pruning.warmup_steps)
    study = optuna.create_study(
        study_name="search",
        storage=f"sqlite:///{journey.run.file('search', 'study.db')}",
        direction=plan.direction,
        pruner=pruner,
        load_if_exists=True,
    )
    _check_same(study, journey, plan)
    # A trial that a killed process left running does not count: its values are proposed again.
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    while len(done := finished_trials(study)) < plan.trials:
        _run_trial(journey, plan, make, study, len(done) + 1)
        done = finished_trials(study)
        best = best_of(done, maximize=plan.direction == "maximize")
        # Figures and adapters stay; what takes room stays of the best alone.
        for other in done:
            for name in ("model", "finetune/checkpoints"):
                if other is not best:
                    shutil.rmtree(journey.run.path / other.folder / name, ignore_errors=True)
    return write_report(journey, plan, make, finished_trials(study))


def finished_trials(study: optuna.Study) -> list[Finished]:
    """The outcome of each trial that was not interrupted, in the order of proposal."""
    ended = [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state in _DONE or (trial.state == TrialState.FAIL and "remark" in trial.user_attrs)
    ]
    return [
        Finished(
            number=number,
            state=trial.state.name.lower(),
            value=trial.value if trial.state == TrialState.COMPLETE else None,
            parameters=trial.params,
            seconds=trial.user_attrs.get("seconds"),
            remark=trial.user_attrs.get("remark"),
        )
        for number, trial in enumerate(ended, start=1)
    ]


def _check_same(study: optuna.Study, journey: Journey, plan: SearchPlan) -> None:
    """Trials of another search would be compared with what they cannot be compared with."""
    recipe = journey.recipe
    sections = {
        name: section.model_dump(mode="json", exclude=_NO_PART)
        for name in ("model", "finetune", "evaluate")
        if (section := getattr(recipe, name)) is not None
    }
    # Not the number of trials: a search may be continued with more of them.
    parts = {
        "search file": fingerprint(plan.model_dump(mode="json", exclude={"trials"})),
        "recipe": fingerprint(sections),
        "chats": str(journey.run.require(DatasetManifest).done_id),
        "base model": str(journey.run.require(BaseManifest).done_id),
    }
    known = study.user_attrs
    other = [name for name, value in parts.items() if known.get(name, value) != value]
    if other:
        raise UsageError(
            f"{journey.run.path / 'search'} contains a search from before the "
            f"{' and '.join(other)} changed; its trials cannot be compared with new ones. Name "
            "another run folder with --run NAME, or delete that folder."
        )
    for name, value in parts.items():
        study.set_user_attr(name, value)


def _run_trial(
    journey: Journey, plan: SearchPlan, make: MakeRecipe, study: optuna.Study, number: int
) -> None:
    # Seeded again for each trial: the proposal depends only on the earlier trials, so a resumed
    # search proposes what it would have proposed.
    seed = int(fingerprint([plan.seed, number])[:8], 16)
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS)
    trial = study.ask()
    values: dict[str, Value] = {}
    for key, given in plan.parameters.items():
        if isinstance(given, Choices):
            values[key] = trial.suggest_categorical(key, given.choices)
        elif isinstance(given, IntRange):
            values[key] = trial.suggest_int(
                key, given.low, given.high, step=given.step or 1, log=given.log
            )
        else:
            values[key] = trial.suggest_float(
                key, given.low, given.high, step=given.step, log=given.log
            )
    title = f"trial {number}/{plan.trials}"
    short = {
        key.rpartition(".")[2]: f"{v:.4g}" if isinstance(v, float) else json.dumps(v).strip('"')
        for key, v in values.items()
    }
    shown = ", ".join(f"{name}={text}" for name, text in short.items())
    started = time.monotonic()

    def watch(loss: float, step: int) -> None:
        # The loss falls while the metric may rise: the pruner needs both in the same direction.
        trial.report(loss if plan.direction == "minimize" else -loss, step)
        if trial.should_prune():
            raise optuna.TrialPruned(f"pruned after step {step}: held-out loss {loss:.3f}")

    remark = None
    try:
        with console.progress_bar(title) as progress:
            own = trial_journey(journey, make(overrides_of(values)), number)
            value = measure(own, plan.metric, progress, watch)
        outcome = f"{plan.metric} {value:.4g}"
        result: tuple[float | None, TrialState | None] = (value, None)
    except optuna.TrialPruned as pruned:
        outcome = remark = str(pruned)
        result = (None, TrialState.PRUNED)
    except (StageError, DataError, RecipeError) as error:
        outcome, remark = f"failed. {error}", str(error)
        result = (None, TrialState.FAIL)
    if remark is not None:
        trial.set_user_attr("remark", remark)
    seconds = time.monotonic() - started
    trial.set_user_attr("seconds", round(seconds, 3))
    study.tell(trial, result[0], state=result[1])
    console.stage_done(title, f"{shown}: {outcome}", seconds)
