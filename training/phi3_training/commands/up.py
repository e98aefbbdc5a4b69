"""`phi3 train | evaluate | register | deploy | connect`: the journey up to one stage."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import console, sunset
from ..current import is_current, make_current, remarks
from ..errors import MissingExtraError, StageError, UsageError
from ..journey import Journey, Stage, finished, go
from ..manifests import (
    AnswerManifest,
    BaseManifest,
    Comparison,
    ConnectionManifest,
    EndpointManifest,
    GateManifest,
    Manifest,
    MetricsManifest,
    ModelManifest,
    RegistrationManifest,
)
from ..packages import NO_PROMPT_FLOW, has_prompt_flow
from ..progress import PlanLine
from ..recipe import Recipe, Source
from ..run import Run
from ..stages import stages_of, stages_until
from ..targets import HERE, Target, get_target, is_here, target_of
from . import HELP
from .common import (
    add_adapter,
    add_allow,
    add_command,
    add_force,
    add_no_plan,
    add_recipe,
    add_rehearse,
    add_replace,
    from_options,
    journey_of,
    recipe_of,
    where_to_run,
)

# What a finished `phi3 up` shows: before and after, the answer, and what to type next.

# What `phi3 up` shows of each part; `phi3 evaluate` shows all.
HEADLINES = {
    "validation": ("contains", "exact_match", "token_f1"),
    "train": ("contains", "exact_match"),
    "replay": ("contains", "exact_match"),
    "canary": ("contains",),
    "probes": ("refusal_rate",),
}


def show_summary(journey: Journey) -> None:
    """Print the metrics and the answer of a finished run."""
    before = journey.run.require(MetricsManifest).ask
    console.out.print()
    show_comparison(journey.run)
    answer = journey.run.require(AnswerManifest)
    console.out.print()
    console.out.print(f"You ask:  {answer.question}", markup=False)
    if before is not None and before.question == answer.question:
        console.out.print(f"Before:   {before.before or '(nothing)'}", markup=False)
    console.out.print(f"After:    {answer.answer}", markup=False, style="bold green")
    console.out.print()
    console.out.print("Next, type:", style="bold")
    for command, why in _next_steps(journey):
        console.out.print(f"  {command}", markup=False)
        console.out.print(f"      {why}", markup=False, style="dim")


def show_comparison(run: Run, *, every: bool = False) -> None:
    """Both models' metrics side by side, the gate's verdict, and where the report is."""
    from ..evaluate import gate

    metrics = run.require(MetricsManifest)
    verdict = run.require(GateManifest)
    change = f"change ({metrics.settings.confidence * 100:g} % interval)"
    if every:
        for part, compared in metrics.comparisons.items():
            title = f"{_title(part, compared)}, before and after tuning"
            console.table(title, ["", "before", "after", change], _rows(compared))
    else:
        rows = [
            [_title(part, compared) if not number else "", *row]
            for part, compared in metrics.comparisons.items()
            for number, row in enumerate(_rows(compared, HEADLINES[part]))
        ]
        console.table("Before and after tuning", ["questions", "", "before", "after", change], rows)
    console.out.print(f"Gate:     {gate.summary(verdict)}", markup=False)
    if every or not verdict.passed:
        for rule in verdict.rules:
            console.out.print(f"  {gate.line(rule)}", markup=False)
        for text in verdict.remarks:
            console.out.print(f"  {text}", markup=False)
    report, here = run.path / verdict.report, Path.cwd()
    shown = report.relative_to(here) if report.is_relative_to(here) else report
    console.out.print(f"Report:   {shown}", markup=False)


def _title(part: str, compared: Mapping[str, Comparison]) -> str:
    from ..evaluate.questions import PARTS

    return f"{next(iter(compared.values())).rows} {PARTS[part]}"


def _rows(
    compared: Mapping[str, Comparison], wanted: tuple[str, ...] | None = None
) -> list[list[str]]:
    from ..evaluate.figures import METRICS

    rows = []
    for name, figures in compared.items():
        if wanted is None or name in wanted:
            metric = METRICS[name]
            before, after = (metric.text(n) for n in (figures.before, figures.after))
            low, high = (metric.change(n) for n in (figures.low, figures.high))
            rows.append([metric.label, before, after, f"{low} to {high}{metric.unit}"])
    return rows


def _next_steps(journey: Journey) -> list[tuple[str, str]]:
    if journey.in_cloud:
        return _next_on(journey.target.name, journey.run.name)
    flow = os.path.relpath(journey.flow)
    binary = _prefix()
    question = journey.run.require(AnswerManifest).question
    if not has_prompt_flow():
        return [
            (f"{binary}phi3 chat", "a conversation in this terminal"),
            (f"{binary}phi3 batch questions.jsonl", "many questions, in parallel"),
            (f'eval "$({binary}phi3 env)"', "endpoint and key for any other client"),
        ]
    return [
        (f"{binary}phi3 chat", "a conversation in this terminal"),
        (
            f"{binary}phi3 chat --web",
            "Prompt flow's chat page in the browser; Ctrl-C closes it",
        ),
        (
            f'{binary}pf flow test --flow {flow} --inputs input_data="{question}"',
            "one question through the flow",
        ),
    ]


def _next_on(target: str, run: str) -> list[tuple[str, str]]:
    where = f"--on {target} --run {run}"
    binary = _prefix()
    return [
        (f"{binary}phi3 chat {where}", "a conversation in this terminal"),
        (f"{binary}phi3 invoke {where}", "the answer to a held-out conversation"),
        (f"{binary}phi3 status {where}", "what exists, and what bills"),
        (f"{binary}phi3 down --on {target} {run}", "delete what bills; it bills until then"),
    ]


def _prefix() -> str:
    """`.venv/bin/` where the commands are not on the PATH as the user's shell sees it."""
    here = Path(sys.executable).parent
    on_path = str(here) in os.environ.get("PATH", "").split(os.pathsep)
    return "" if on_path else f"{os.path.relpath(here)}/"


# `phi3 up | plan`: the whole journey, and what it would do.


def register_up(subparsers: Any) -> None:
    """Add the commands of this module."""
    up = add_command(
        subparsers,
        "up",
        HELP["up"],
        "phi3 up training/recipes/phi3-tiny.yaml finetune.num_train_epochs=10",
        run_up,
    )
    add_recipe(up)
    up.add_argument(
        "--again", action="append", default=[], metavar="STAGE", help="run this stage again"
    )
    add_adapter(up)
    add_allow(up)
    add_force(up)
    add_no_plan(up)
    add_replace(up)
    add_rehearse(up)
    plan = add_command(
        subparsers,
        "plan",
        HELP["plan"],
        "phi3 plan training/recipes/phi3-mini-lora.yaml",
        run_plan,
    )
    add_recipe(plan)
    add_rehearse(plan)
    plan.add_argument(
        "--device-gb",
        type=_size,
        metavar="GB",
        help="plan memory only, for a GPU of this size instead of this machine",
    )
    plan.add_argument(
        "--device", choices=("cuda", "cpu"), help="type of that device (default: cuda)"
    )


def run_up(args: argparse.Namespace) -> int:
    """Do the journey and show what came out of it."""
    # Before the run folder and its weights: a misspelt name costs no download.
    stages = stages_of(in_cloud=where_to_run(args) != HERE)
    again = _stages_named(args.again, stages)
    journey = journey_of(args)
    # A shell that ran `eval "$(phi3 env)"` names some endpoint; `up` asks the one it started.
    os.environ.pop("PHI3_ENDPOINT", None)
    with journey.run.lock():
        journey.target.begin(journey.recipe, journey.run)
        go(journey, stages, again=again)
        make_current(journey.run)
    if args.output == "json":
        console.print_json(state_of(journey.run, journey.target))
    else:
        show_summary(journey)
    return 0


def _stages_named(titles: list[str], stages: Sequence[Stage[Any]]) -> frozenset[type[Manifest]]:
    known = {stage.title: stage.manifest for stage in stages}
    wrong = [title for title in titles if title not in known]
    if wrong:
        raise UsageError(f"No stage {', '.join(wrong)}; stages: {', '.join(known)}")
    return frozenset(known[title] for title in titles)


def run_plan(args: argparse.Namespace) -> int:
    """Say what would be done."""
    journey = journey_of(args, make_run=False)
    stages = stages_of(in_cloud=journey.in_cloud)
    todo = [
        stage.title
        for stage in stages
        if not stage.left_out(journey) and not _is_done(journey, stages, stage)
    ]
    lines = _plan_elsewhere(args, journey) or [
        _plan_data(journey.recipe),
        *journey.target.plan(journey.recipe, journey.run),
        *_plan_without_prompt_flow(journey),
        *_plan_dates(),
    ]
    if args.output == "json":
        plan = [asdict(line) for line in lines]
        console.print_json({"run": str(journey.run.path), "to_do": todo, "plan": plan})
    else:
        stops = [line.stage for line in lines if line.stops]
        at = ", ".join(dict.fromkeys(stops))
        verdict = f"Would stop at {at}" if stops else "Nothing stops it"
        how = "see STOPS below" if stops else "start with: phi3 up and the same words"
        console.out.print(f"{verdict}; {how}", markup=False, style="bold")
        console.out.print(f"Run folder: {journey.run.path}", markup=False)
        console.out.print(f"To do: {', '.join(todo) or 'nothing, all is done'}", markup=False)
        for line in lines:
            mark = "STOPS" if line.stops else "     "
            console.out.print(f"  {mark} {line.stage:<10} {line.text}", markup=False)
    return 1 if any(line.stops for line in lines) else 0


def _plan_elsewhere(args: argparse.Namespace, journey: Journey) -> list[PlanLine]:
    """What a device that is not here would hold; nothing where no such one is named."""
    if args.device_gb is not None:
        from ..memory import memory_plan, of_size, row_sizes

        device = of_size(args.device_gb, args.device or "cuda")
        return memory_plan(journey.recipe, device, row_sizes(journey.recipe, journey.run))
    if args.device is not None:
        raise UsageError("--device needs --device-gb; add e.g. --device-gb 24")
    return []


def _plan_data(recipe: Recipe) -> PlanLine:
    """Which chats are learnt, which are held out, and what is asked at the end."""
    data = recipe.data
    held = f"a share of {data.validation_share:.0%} of them is held out"
    if data.validation:
        held = f"held out: {_named(data.validation)}"
    replay = f"mixed in: {_named(data.replay)}" if data.replay else "no older chats are mixed in"
    ask = repr(recipe.ask) if recipe.ask else "the first held-out question"
    return PlanLine(
        "prepare",
        f"trains on {_named(data.train)}; {held}; {replay}; asks {ask}",
        details=data.model_dump(mode="json", include={"train", "validation", "replay"}),
    )


def _named(sources: Sequence[Source]) -> str:
    return ", ".join(str(source) for source in sources)


def _plan_without_prompt_flow(journey: Journey) -> list[PlanLine]:
    """What is left out where Prompt flow is missing; on Azure the target needs it."""
    if journey.in_cloud or has_prompt_flow():
        return []
    left_out = "the connection, and the question through the flow"
    return [PlanLine("connect", f"left out: {left_out}. {NO_PROMPT_FLOW}")]


def _plan_dates() -> list[PlanLine]:
    """What ends soon, with the command that moves on; it never stops anything."""
    day = sunset.today()
    return [
        PlanLine("dates", f"{row.said(day)}. Fix: {row.cure}", details=row.as_dict(day))
        for row in sunset.due(day)
    ]


def _size(text: str) -> float:
    """A size in gigabytes, more than none."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise argparse.ArgumentTypeError(f"expected gigabytes such as 24, got {text!r}")
    return size


def _is_done(journey: Journey, stages: Sequence[Stage[Any]], stage: Stage[Any]) -> bool:
    """Done with unchanged inputs, and everything before it as well."""
    before = stages[: stages.index(stage) + 1]
    return all(
        earlier.left_out(journey) or finished(journey, earlier) is not None for earlier in before
    )


def state_of(run: Run, target: Target | None = None) -> dict[str, Any]:
    """Which stages of a run are done and what is up; read from Azure if `target` is given.

    A manifest that cannot be read is named and hides nothing else.
    """
    from ..finetune.weights import list_adapters

    name, here = target_of(run), is_here(run)
    done: list[str] = []
    broken: dict[type[Manifest], str] = {}
    for stage in stages_of(in_cloud=not here):
        try:
            if run.read(stage.manifest) is not None:
                done.append(stage.title)
        except StageError as error:
            broken[stage.manifest] = str(error)
    if EndpointManifest in broken:
        status: dict[str, Any] = {"endpoint": {"state": "unknown"}}
    elif target is None and not here:
        endpoint = run.read(EndpointManifest)
        where = {} if endpoint is None else {"url": endpoint.endpoint}
        status = {"endpoint": {"state": "not asked", **where}}
    else:
        status = (target or get_target(name)).status(run)
    unreadable = {EndpointManifest, ModelManifest} & broken.keys()
    answer = None if AnswerManifest in broken else run.read(AnswerManifest)
    adapters = [] if BaseManifest in broken else list_adapters(run)
    return {
        "run": run.name,
        "path": str(run.path),
        "on": name,
        "current": is_current(run),
        "remarks": [] if unreadable else remarks(run),
        "done": done,
        "broken": list(broken.values()),
        **status,
        "adapters": [adapter.name for adapter in adapters],
        "question": None if answer is None else answer.question,
        "answer": None if answer is None else answer.answer,
    }


# `phi3 train RECIPE --search FILE`: many trainings; the best settings are saved as a recipe.


def run_search(args: argparse.Namespace, journey: Journey) -> int:
    """Do the trials that are missing and show what was found."""
    from ..search.plan import load_plan

    def make(overrides: Sequence[str]) -> Recipe:
        return recipe_of([*args.words, *from_options(args), *overrides])

    plan = load_plan(args.search, make)
    if importlib.util.find_spec("optuna") is None:
        raise MissingExtraError("optuna", "local")
    from ..search.study import search

    with journey.run.lock():
        report = search(journey, plan, make)
    if args.output == "json":
        console.print_json(report)
    else:
        _show(journey, report)
    return 0


def _show(journey: Journey, report: dict[str, Any]) -> None:
    keys = list(report["best"]["parameters"])
    columns = ["trial", report["metric"], *(key.rpartition(".")[2] for key in keys), "seconds"]
    sign = -1 if report["direction"] == "maximize" else 1
    ranked = sorted(
        report["trials"],
        key=lambda trial: (trial["value"] is None, sign * (trial["value"] or 0), trial["number"]),
    )
    console.table(
        f"Trials, best first ({report['direction']})",
        columns,
        [_row(trial, keys) for trial in ranked],
    )
    folder = journey.run.path
    console.out.print(f"Best recipe:  {folder / report['best_recipe']}", markup=False)
    console.out.print(f"Picture:      {folder / report['picture']}", markup=False)
    console.out.print(
        "The best was chosen on the held-out chats, so judge it on chats that played no part in "
        "the search.",
        style="dim",
    )


def _row(trial: dict[str, Any], keys: Sequence[str]) -> list[str]:
    figure = trial["state"] if trial["value"] is None else f"{trial['value']:.5g}"
    return [
        str(trial["number"]),
        figure,
        *(_value(trial["parameters"].get(key)) for key in keys),
        "" if trial["seconds"] is None else f"{trial['seconds']:.1f}",
    ]


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# command: (its manifest, help)
STAGE_COMMANDS: dict[str, tuple[type[Manifest], str]] = {
    "train": (ModelManifest, HELP["train"]),
    "evaluate": (
        GateManifest,
        HELP["evaluate"],
    ),
    "register": (RegistrationManifest, HELP["register"]),
    "deploy": (EndpointManifest, HELP["deploy"]),
    "connect": (ConnectionManifest, HELP["connect"]),
}


def register_stages(subparsers: Any) -> None:
    """Add the commands of this module."""
    for name, (_manifest, help_text) in STAGE_COMMANDS.items():
        parser = add_command(
            subparsers,
            name,
            help_text,
            f"phi3 {name} training/recipes/phi3-tiny.yaml",
            run_stage,
        )
        add_recipe(parser)
        add_adapter(parser)
        add_no_plan(parser)
        add_replace(parser)
        if name == "train":
            add_allow(parser)
            parser.add_argument(
                "--search",
                type=Path,
                metavar="FILE",
                help="search for better settings as described in this YAML file (docs/search.md)",
            )
        if name in ("deploy", "connect"):
            add_force(parser)


def run_stage(args: argparse.Namespace) -> int:
    """Do what is missing up to the stage."""
    journey = journey_of(args)
    if getattr(args, "search", None) is not None:
        if journey.in_cloud:
            raise UsageError("A search runs on this machine: remove --on azure")
        return run_search(args, journey)
    kind = STAGE_COMMANDS[args.command][0]
    if kind is ConnectionManifest and not journey.in_cloud and not has_prompt_flow():
        raise MissingExtraError("promptflow", "flow")
    with journey.run.lock():
        stages = stages_until(kind, in_cloud=journey.in_cloud)
        journey.target.begin(journey.recipe, journey.run)
        go(journey, stages)
    if kind is ConnectionManifest:
        make_current(journey.run)
    elif not is_current(journey.run):
        console.note(
            f"Run {journey.run.name}; the current run is still another one (change it with: "
            f"phi3 use {journey.run.name})"
        )
    if args.command == "evaluate":
        return _show_evaluation(journey.run, args.output)
    if args.output == "json":
        console.print_json(journey.run.require(kind).as_json())
    return 0


def _show_evaluation(run: Run, form: str) -> int:
    """The metrics and the gate's verdict; 1 if the model did not pass."""
    verdict = run.require(GateManifest)
    if form == "json":
        metrics = run.require(MetricsManifest).as_json()
        console.print_json({**metrics, "gate": verdict.as_json()})
    else:
        show_comparison(run, every=True)
    return 0 if verdict.passed else 1
