"""`phi3 recipes`: the shipped recipes, and every key a recipe may have."""

from __future__ import annotations

import argparse
from typing import Any

from pydantic import BaseModel

from .. import console
from ..project import RECIPES, find
from ..recipe import Recipe
from .common import add_command


def register(subparsers: Any) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers, "recipes", "list the shipped recipes", "phi3 recipes --keys", run_recipes
    )
    parser.add_argument("--keys", action="store_true", help="list every key and its default")


def run_recipes(args: argparse.Namespace) -> int:
    """List recipes with the first line of their header, or all keys."""
    listed = _keys(Recipe) if args.keys else _shipped()
    if args.output == "json":
        console.print_json(listed)
        return 0
    width = max(len(name) for name in listed)
    for name, text in listed.items():
        console.out.print(f"{name:<{width}}  {text}", markup=False)
    return 0


def _shipped() -> dict[str, str]:
    return {
        str(RECIPES / path.name): path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for path in sorted(find(RECIPES).glob("*.yaml"))
    }


def _keys(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            found.update(_keys(inner, f"{prefix}{name}."))
        elif field.is_required():
            found[prefix + name] = "(required)"
        else:
            found[prefix + name] = f"default {field.get_default(call_default_factory=True)!r}"
    return found


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class of `Section` or `Section | None`."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
