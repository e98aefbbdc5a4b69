"""What is searched: search.yaml, read and checked; every fault at once. Reads YAML."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from ..errors import RecipeError
from ..recipe import Recipe, read_yaml
from ..recipe.faults import plain
from ..recipe.sections import Positive, Section

# A recipe with these overrides applied; raises RecipeError.
MakeRecipe = Callable[[Sequence[str]], Recipe]
Value = bool | int | float | str | None

# Metrics of the training itself: they need no evaluation.
TRAINING_METRICS = ("validation_loss", "final_loss")
_SECTIONS = ("finetune", "data", "base", "model")  # what a training depends on
# Trials that are asked other questions cannot be compared.
_FIXED = ("data.seed", "data.validation", "data.validation_share")


def _check_range(given: FloatRange | IntRange) -> FloatRange | IntRange:
    # The rules of Optuna's suggest_float and suggest_int, which would raise only in a trial.
    if given.low >= given.high:
        raise ValueError(f"low must be below high, got {given.low} and {given.high}")
    if given.log and given.low <= 0:
        raise ValueError(f"log needs a low above 0, got {given.low}")
    if given.log and given.step is not None:
        raise ValueError("log and step exclude each other")
    return given


class FloatRange(Section):
    """Any number from low to high; log: spread evenly over the powers of ten."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False
    step: Annotated[float, Field(gt=0.0)] | None = None
    _range = model_validator(mode="after")(_check_range)


class IntRange(Section):
    """Any whole number from low to high, in steps."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: Positive | None = None
    _range = model_validator(mode="after")(_check_range)


class Choices(Section):
    """One of the listed values."""

    type: Literal["categorical"]
    choices: Annotated[list[Value], Field(min_length=2)]


Parameter = Annotated[FloatRange | IntRange | Choices, Field(discriminator="type")]


class Pruning(Section):
    """Ends a trial whose held-out loss is worse than the median of earlier trials there."""

    startup_trials: Positive = 5
    warmup_steps: Annotated[int, Field(ge=0)] = 0


class SearchPlan(Section):
    """A whole search.yaml."""

    metric: str
    direction: Literal["maximize", "minimize"]
    trials: Positive
    seed: Annotated[int, Field(ge=0)] = 42
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    pruning: Pruning | None = None


def load_plan(path: Path, make: MakeRecipe) -> SearchPlan:
    """Read search.yaml for the recipe that `make` makes.

    Raises RecipeError with every fault: of the form, of the metric, and of keys and values that
    the recipe does not take.
    """
    from ..evaluate.figures import METRICS
    from ..evaluate.questions import PARTS

    recipe = make([])
    if not path.is_file():
        raise RecipeError(str(path), ["no such file; docs/search.md shows how to write one"])
    content = read_yaml(path)
    faults: list[str] = []
    try:
        plan = SearchPlan.model_validate(content)
    except ValidationError as error:
        for item in error.errors():
            # In the file's own terms: pydantic adds the type that it took a parameter for.
            parts = [
                str(part) for part in item["loc"] if part not in ("float", "int", "categorical")
            ]
            what = {
                "extra_forbidden": "unknown key; check its spelling",
                "missing": "is missing",
                "union_tag_invalid": "needs type: float, int or categorical",
                "union_tag_not_found": "needs type: float, int or categorical",
            }.get(item["type"]) or plain(item)
            faults.append(f"{'.'.join(parts)}: {what}")
    # The following look at the file as it was written, so that a fault of its form hides no other.
    metric = content.get("metric")
    evaluates = recipe.finetune.eval_steps or "finetune.eval_steps" in _parameters(content)
    part, _, figure = str(metric).partition(".")
    known = metric in TRAINING_METRICS or (part in PARTS and figure in METRICS)
    if metric is not None and not known:
        faults.append(
            f"metric: {metric!r} is unknown; expected {' or '.join(TRAINING_METRICS)}, or a part "
            f"and a metric such as validation.token_f1 (parts: {', '.join(PARTS)}; metrics: "
            f"{', '.join(METRICS)})"
        )
    if metric == "validation_loss" and not evaluates:
        faults.append("metric: validation_loss needs finetune.eval_steps in the recipe")
    if content.get("pruning") is not None and not evaluates:
        faults.append("pruning: needs finetune.eval_steps in the recipe, to judge trials early")
    faults += _parameter_faults(content, make)
    if faults:
        raise RecipeError(str(path), faults)
    return plan


def overrides_of(values: Mapping[str, Value]) -> list[str]:
    """`key=value` for each parameter, as the command line takes it: text as it is."""
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items()
    ]


def _parameter_faults(content: Mapping[str, object], make: MakeRecipe) -> list[str]:
    faults: dict[str, None] = {}
    probes: dict[str, list[Value]] = {}
    for key, parameter in _parameters(content).items():
        if key.partition(".")[0] not in _SECTIONS:
            sections = ", ".join(_SECTIONS)
            faults[f"parameters.{key}: does not affect training; expected {sections}"] = None
        elif key in _FIXED:
            faults[f"parameters.{key}: trials with other held-out chats cannot be compared"] = None
        elif isinstance(parameter, dict):
            choices = parameter.get("choices")
            ends = [parameter.get("low"), parameter.get("high")]
            values: list[Value] = [end for end in ends if isinstance(end, (int, float))]
            if len(values) == 2 and parameter.get("type") == "float":
                low, high = (float(str(end)) for end in values)
                values.append(low + 0.37 * (high - low))  # shows keys that need whole numbers
            values += choices if isinstance(choices, list) else []
            if values:
                probes[key] = values
    # The others are set as well: some keys make sense only together.
    first = {key: values[0] for key, values in probes.items()}
    for key, values in probes.items():
        for value in values:
            try:
                make(overrides_of({**first, key: value}))
            except RecipeError as error:
                faults.update(dict.fromkeys(f"parameters.{fault}" for fault in error.faults))
    return list(faults)


def _parameters(content: Mapping[str, object]) -> dict[str, object]:
    listed = content.get("parameters")
    return {str(key): value for key, value in listed.items()} if isinstance(listed, dict) else {}
