"""`phi3 up | plan | train | evaluate | register | deploy | connect`: the journey or a part."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from .. import console, sunset
from ..errors import MissingExtraError, UsageError
from ..journey import Journey, finished, go
from ..manifests import (
    AnswerManifest,
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
from ..recipe import AuditRule, Recipe
from ..run import Run
from ..runs import is_current, make_current, state_of
from ..stages import stages_of, stages_until
from ..targets import HERE
from . import HELP
from .common import from_options, journey_of, recipe_of, where_to_run
from .options import Subparsers, add_command, add_recipe, add_rehearse, add_replace

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
    console.line(f"You ask:  {answer.question}")
    # The recipe may have another question since: the old model was not asked it.
    if before is not None and before.question == answer.question:
        console.line(f"Before:   {before.before or '(nothing)'}")
    console.line(f"After:    {answer.answer}", "bold green")
    console.out.print()
    console.line("Next, type:", "bold")
    for command, why in _next_steps(journey):
        console.line(f"  {command}")
        console.line(f"      {why}", "dim")


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
    console.line(f"Gate:     {gate.summary(verdict)}")
    if every or not verdict.passed:
        for text in (*map(gate.line, verdict.rules), *verdict.remarks):
            console.line(f"  {text}")
    report, here = run.path / verdict.report, Path.cwd()
    # Short where it can be: the line is for copying into a browser or an editor.
    shown = report.relative_to(here) if report.is_relative_to(here) else report
    console.line(f"Report:   {shown}")


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
    """Commands and what each does."""
    # `.venv/bin/` where the commands are not on the PATH as the user's shell sees it.
    folder = Path(sys.executable).parent
    on_path = str(folder) in os.environ.get("PATH", "").split(os.pathsep)
    prefix = "" if on_path else f"{os.path.relpath(folder)}/"
    if journey.in_cloud:
        on, run = journey.target.name, journey.run.name
        where = f"--on {on} --run {run}"
        return [
            (f"{prefix}phi3 chat {where}", "a conversation in this terminal"),
            (f"{prefix}phi3 invoke {where}", "the answer to a held-out conversation"),
            (f"{prefix}phi3 status {where}", "what exists, and what bills"),
            (f"{prefix}phi3 down --on {on} {run}", "delete what bills; it bills until then"),
        ]
    chat = (f"{prefix}phi3 chat", "a conversation in this terminal")
    if not has_prompt_flow():
        return [
            chat,
            (f"{prefix}phi3 batch questions.jsonl", "many questions, in parallel"),
            (f'eval "$({prefix}phi3 env)"', "endpoint and key for any other client"),
        ]
    flow = os.path.relpath(journey.flow)
    question = journey.run.require(AnswerManifest).question
    return [
        chat,
        (
            f"{prefix}phi3 chat --web",
            "Prompt flow's chat page in the browser; Ctrl-C closes it",
        ),
        (
            f'{prefix}pf flow test --flow {flow} --inputs input_data="{question}"',
            "one question through the flow",
        ),
    ]


# ---- `phi3 up | plan`: the whole journey, and what it would do


def register_up(subparsers: Subparsers) -> None:
    """Add `phi3 up` and `phi3 plan`."""
    up = add_command(
        subparsers,
        "up",
        HELP["up"],
        "phi3 up training/recipes/phi3-tiny.yaml finetune.num_train_epochs=10",
        run_up,
    )
    _add_options(up, trains=True, deploys=True)
    up.add_argument(
        "--again", action="append", default=[], metavar="STAGE", help="run this stage again"
    )
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
        type=_gigabytes,
        metavar="GB",
        help="plan memory only, for a GPU of this size instead of this machine",
    )
    plan.add_argument(
        "--device", choices=("cuda", "cpu"), help="type of that device (default: cuda)"
    )


def _add_options(parser: argparse.ArgumentParser, *, trains: bool, deploys: bool) -> None:
    """The options of a command that does stages."""
    add_recipe(parser)
    parser.add_argument(
        "--adapter", metavar="NAME", help="train a named adapter (short for finetune.adapter=NAME)"
    )
    if trains:
        parser.add_argument(
            "--allow",
            action="append",
            default=[],
            choices=get_args(AuditRule),
            metavar="RULE",
            help="train even though this rule of the label audit is broken (repeatable; recorded "
            "in the run)",
        )
    if deploys:
        parser.add_argument(
            "--force",
            action="store_true",
            help="deploy even if the model did not pass the gate (recorded in the run)",
        )
    parser.add_argument(
        "--no-plan", action="store_true", help="start even if the plan says it cannot fit"
    )
    add_replace(parser)


def run_up(args: argparse.Namespace) -> int:
    """Run the journey and show the result."""
    # Before the run folder and its weights: a misspelt name costs no download.
    stages = stages_of(in_cloud=where_to_run(args) != HERE)
    known = {stage.title: stage.manifest for stage in stages}
    wrong = [title for title in args.again if title not in known]
    if wrong:
        raise UsageError(f"No stage {', '.join(wrong)}; stages: {', '.join(known)}")
    journey = journey_of(args)
    # A shell that ran `eval "$(phi3 env)"` names some endpoint; `up` asks the one it started.
    os.environ.pop("PHI3_ENDPOINT", None)
    # Locked from here on: a second `up` of the same run would write the same files.
    with journey.run.lock():
        journey.target.begin(journey.recipe, journey.run)
        go(journey, stages, again=frozenset(known[title] for title in args.again))
        make_current(journey.run)
    if args.output == "json":
        console.print_json(state_of(journey.run, journey.target).as_json())
    else:
        show_summary(journey)
    return 0


def run_plan(args: argparse.Namespace) -> int:
    """Show what would be done."""
    journey = journey_of(args, make_run=False)
    todo = []
    all_done = True  # a stage counts as done only if all before it are
    for stage in stages_of(in_cloud=journey.in_cloud):
        if not stage.left_out(journey):
            all_done = all_done and finished(journey, stage) is not None
            todo += [] if all_done else [stage.title]
    lines = _plan_lines(args, journey)
    stops = [line.stage for line in lines if line.stops]
    at = ", ".join(dict.fromkeys(stops))
    console.show(
        args.output,
        {
            "run": str(journey.run.path),
            "to_do": todo,
            "plan": [asdict(line) for line in lines],
        },
        f"Would stop at {at}; see STOPS below"
        if stops
        else "Nothing stops it; start with: phi3 up and the same words",
        f"Run folder: {journey.run.path}",
        f"To do: {', '.join(todo) or 'nothing, all is done'}",
        *(f"  {'STOPS' if line.stops else '     '} {line.stage:<10} {line.text}" for line in lines),
    )
    return 1 if stops else 0


def _plan_lines(args: argparse.Namespace, journey: Journey) -> list[PlanLine]:
    """What would be done at each stage; with --device-gb, what such a device would hold."""
    if args.device_gb is not None:
        from ..memory import memory_plan, of_size, row_sizes

        device = of_size(args.device_gb, args.device or "cuda")
        return memory_plan(journey.recipe, device, row_sizes(journey.recipe, journey.run))
    if args.device is not None:
        raise UsageError("--device needs --device-gb; add e.g. --device-gb 24")
    data, ask = journey.recipe.data, journey.recipe.ask
    train, validation, replay = (
        ", ".join(map(str, sources)) for sources in (data.train, data.validation, data.replay)
    )
    held_out = f"a share of {data.validation_share:.0%} of them is held out"
    if validation:
        held_out = f"held out: {validation}"
    mixed_in = f"mixed in: {replay}" if replay else "no older chats are mixed in"
    question = repr(ask) if ask else "the first held-out question"
    chats = PlanLine(
        "prepare",
        f"trains on {train}; {held_out}; {mixed_in}; asks {question}",
        details=data.model_dump(mode="json", include={"train", "validation", "replay"}),
    )
    lines = [chats, *journey.target.plan(journey.recipe, journey.run)]
    if not journey.in_cloud and not has_prompt_flow():  # on Azure the target needs it
        left_out = "the connection, and the question through the flow"
        lines.append(PlanLine("connect", f"left out: {left_out}. {NO_PROMPT_FLOW}"))
    day = sunset.today()
    for row in sunset.due(day):  # never stops anything
        text = f"{row.said(day)}. Fix: {row.cure}"
        lines.append(PlanLine("dates", text, details=row.as_dict(day)))
    return lines


def _gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise argparse.ArgumentTypeError(f"expected gigabytes such as 24, got {text!r}")
    return size


# ---- `phi3 train RECIPE --search FILE`: many trainings; the best settings are saved as a recipe


def run_search(args: argparse.Namespace, journey: Journey) -> int:
    """Run the missing trials and show the results."""
    from ..search.plan import load_plan

    def make(overrides: Sequence[str]) -> Recipe:
        return recipe_of([*args.words, *from_options(args), *overrides])

    # The file's faults first: they cost nothing to find, a package may cost a download.
    plan = load_plan(args.search, make)
    if importlib.util.find_spec("optuna") is None:
        raise MissingExtraError("optuna", "local")
    from ..search.study import search

    with journey.run.lock():
        report = search(journey, plan, make)
    if args.output == "json":
        console.print_json(report)
    else:
        _show_trials(journey, report)
    return 0


def _show_trials(journey: Journey, report: dict[str, Any]) -> None:
    keys = list(report["best"]["parameters"])
    sign = -1 if report["direction"] == "maximize" else 1
    # Trials without a value (failed, or cut short) last.
    ranked = sorted(
        report["trials"],
        key=lambda trial: (trial["value"] is None, sign * (trial["value"] or 0), trial["number"]),
    )
    rows = []
    for trial in ranked:
        # A trial that was cut short may lack the later parameters.
        values = (trial["parameters"].get(key) for key in keys)
        rows.append(
            [
                str(trial["number"]),
                trial["state"] if trial["value"] is None else f"{trial['value']:.5g}",
                *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values),
                "" if trial["seconds"] is None else f"{trial['seconds']:.1f}",
            ]
        )
    columns = ["trial", report["metric"], *(key.rpartition(".")[2] for key in keys), "seconds"]
    console.table(f"Trials, best first ({report['direction']})", columns, rows)
    folder = journey.run.path
    console.line(f"Best recipe:  {folder / report['best_recipe']}")
    console.line(f"Picture:      {folder / report['picture']}")
    console.line(
        "The best was chosen on the held-out chats, so judge it on chats that played no part in "
        "the search.",
        "dim",
    )


STAGE_COMMANDS: dict[str, type[Manifest]] = {
    "train": ModelManifest,
    "evaluate": GateManifest,
    "register": RegistrationManifest,
    "deploy": EndpointManifest,
    "connect": ConnectionManifest,
}


def register_stages(subparsers: Subparsers) -> None:
    """Add a command for each of STAGE_COMMANDS."""
    for name in STAGE_COMMANDS:
        example = f"phi3 {name} training/recipes/phi3-tiny.yaml"
        parser = add_command(subparsers, name, HELP[name], example, run_stage)
        _add_options(parser, trains=name == "train", deploys=name in ("deploy", "connect"))
        if name == "train":
            parser.add_argument(
                "--search",
                type=Path,
                metavar="FILE",
                help="search for better settings as described in this YAML file (docs/search.md)",
            )


def run_stage(args: argparse.Namespace) -> int:
    """Run the missing stages up to this one."""
    journey = journey_of(args)
    if getattr(args, "search", None) is not None:
        if journey.in_cloud:
            raise UsageError("A search runs on this machine: remove --on azure")
        return run_search(args, journey)
    kind = STAGE_COMMANDS[args.command]
    # `phi3 up` leaves the connection out without Prompt flow; who asks for it by name gets an
    # error.
    if kind is ConnectionManifest and not journey.in_cloud and not has_prompt_flow():
        raise MissingExtraError("promptflow", "flow")
    with journey.run.lock():
        stages = stages_until(kind, in_cloud=journey.in_cloud)
        journey.target.begin(journey.recipe, journey.run)
        go(journey, stages)
    # Training another run does not redirect `phi3 chat`; connecting one is meant to.
    if kind is ConnectionManifest:
        make_current(journey.run)
    elif not is_current(journey.run):
        console.note(
            f"Run {journey.run.name}; the current run is still another one (change it with: "
            f"phi3 use {journey.run.name})"
        )
    if args.command != "evaluate":
        if args.output == "json":
            console.print_json(journey.run.require(kind).as_json())
        return 0
    verdict = journey.run.require(GateManifest)
    if args.output == "json":
        metrics = journey.run.require(MetricsManifest).as_json()
        console.print_json({**metrics, "gate": verdict.as_json()})
    else:
        show_comparison(journey.run, every=True)
    return 0 if verdict.passed else 1
