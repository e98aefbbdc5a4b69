"""Which way the model is tuned: the catalogue's pipeline or a job with our own trainer; and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import StageError
from ...recipe import Recipe
from .catalogue import ARCHIVED, Foundation, find_foundation
from .clients import Clients
from .sizes import refuse_outside, refuse_retired

Route = Literal["pipeline", "job"]


@dataclass(frozen=True)
class Choice:
    """The route, its reason, and the catalogue's model (route `pipeline` only)."""

    route: Route
    reason: str
    foundation: Foundation | None = None


def foundation_name(recipe: Recipe) -> str | None:
    """The model's name in the catalogue: given, or the last part of its Hugging Face id."""
    given = recipe.azure.train.foundation_model.name
    if given is not None:
        return given
    name = recipe.model.name_or_path
    if recipe.model.is_tiny or Path(name).expanduser().is_dir():
        return None
    return name.rsplit("/", 1)[-1]


def without_asking(recipe: Recipe) -> Choice | None:
    """The choice where the recipe alone settles it; nothing is sent for it."""
    train = recipe.azure.train
    if train.route == "job":
        return Choice("job", "azure.train.route says so")
    name = foundation_name(recipe)
    if name is None:
        reason = f"{recipe.model.name_or_path} is not in Azure's catalogue"
        if train.route == "pipeline":
            raise StageError(
                f"azure.train.route=pipeline tunes a catalogue model, and {reason}. Name one "
                "(azure.train.foundation_model.name=Phi-4-mini-instruct), or take "
                "azure.train.route=job"
            )
        return Choice("job", reason)
    if train.route == "pipeline":
        return None
    beyond = _beyond_pipeline(recipe)
    return Choice("job", beyond) if beyond else None


def choose(clients: Clients, recipe: Recipe) -> Choice:
    """The route. StageError for a pipeline that is asked for and cannot be.

    `auto` takes the pipeline where the catalogue still keeps the model and allows the size.
    """
    refuse_retired(recipe.azure.compute.size, "azure.compute.size")
    settled = without_asking(recipe)
    if settled is not None:
        return settled
    train, size = recipe.azure.train, recipe.azure.compute.size
    name = foundation_name(recipe) or ""
    registry = train.foundation_model.registry_name
    asked = train.route == "pipeline"
    if not asked and name.lower() in ARCHIVED:
        return Choice("job", f"{name} is {ARCHIVED[name.lower()]}")
    found = find_foundation(clients, train.foundation_model, name)
    if found is None:
        reason = f"the registry {registry} has no model {name}"
        if train.foundation_model.version != "latest":
            reason += f" version {train.foundation_model.version}"
        if asked:
            raise StageError(
                f"azure.train.route=pipeline cannot be: {reason}. Give another "
                "azure.train.foundation_model, or take azure.train.route=job"
            )
        return Choice("job", reason)
    if asked:
        refuse_outside(found.allowed, size, "azure.compute.size", found.name)
        old = f", although it is {found.archived}" if found.archived else ""
        return Choice("pipeline", f"azure.train.route says so{old}", found)
    if found.archived:
        return Choice("job", f"{found.name} is {found.archived}")
    try:
        refuse_outside(found.allowed, size, "azure.compute.size", found.name)
    except StageError as error:
        return Choice("job", f"the catalogue's pipeline cannot: {error}")
    return Choice(
        "pipeline",
        f"{found.name} version {found.version} is in the catalogue and takes {size}",
        found,
    )


def _beyond_pipeline(recipe: Recipe) -> str | None:
    """What the recipe asks for that only our own trainer does."""
    settings, data = recipe.finetune, recipe.data
    found = [
        text
        for asked, text in (
            (settings.method in ("qlora", "dora"), f"finetune.method={settings.method}"),
            (settings.packing, "finetune.packing"),
            (settings.loss is not None, f"finetune.loss={settings.loss}"),
            (bool(data.replay), "data.replay"),
            (data.casual_copies, "data.casual_copies"),
            (recipe.model.revision is not None, "model.revision"),
        )
        if asked
    ]
    return f"the catalogue's pipeline does not know {', '.join(found)}" if found else None
