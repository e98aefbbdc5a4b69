"""`phi3 models`: what a recipe can name as its base model, and Llama-class folders as Phi-3."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import console
from ..errors import MissingExtraError, UsageError
from ..models.catalogue import CATALOGUE, SMALL, TINY, KnownModel, weights_folder
from ..project import RECIPES, find
from .common import add_command

_ANY_RECIPES = (
    "Any folder with a causal language model as safetensors and a chat template can be named as "
    "well:\n  phi3 up RECIPE model.name_or_path=/path/to/folder"
)


def register(subparsers: Any) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers,
        "models",
        "list the base models a recipe can name, or convert a Llama-class folder to Phi-3",
        "phi3 models\n  phi3 models convert ./TinyLlama-1.1B-Chat --to ./tinyllama-phi3",
        run_models,
    )
    parser.add_argument(
        "convert",
        nargs="*",
        metavar="convert FOLDER",
        help="write a Llama-class folder (SmolLM2, TinyLlama, …) in Phi-3's architecture",
    )
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where `convert` writes")


def run_models(args: argparse.Namespace) -> int:
    """List the catalogue, or convert."""
    if args.convert:
        return _convert(args)
    rows = [_row(model) for model in CATALOGUE]
    if args.output == "json":
        console.print_json(rows)
        return 0
    for row in rows:
        console.out.print(row["name"], style="bold", markup=False)
        here = "made in each run" if row["name"] == TINY else row["folder"] or "not here yet"
        console.out.print(
            f"    {row['what']}\n"
            f"    licence {row['license']}, chat template {row['template']}, "
            f"{row['weights']} from: {row['source']}\n"
            f"    memory to train {row['memory_to_train']}, to serve {row['memory_to_serve']}\n"
            f"    recipe {row['recipe']}; {here}",
            markup=False,
        )
    console.out.print(
        "Memory as `phi3 plan` calculates it for the recipe and the chats in it.",
        style="dim",
    )
    console.out.print(_ANY_RECIPES, markup=False)
    return 0


def _row(model: KnownModel) -> dict[str, Any]:
    folder = None if model.name == TINY else weights_folder(model.name)
    train, serve = _memory(model)
    return {
        "name": model.name,
        "what": model.what,
        "license": model.license,
        "template": model.template,
        "source": model.source,
        "recipe": str(RECIPES / model.recipe),
        "weights": _size(model),
        "memory_to_train": train,
        "memory_to_serve": serve,
        "folder": None if folder is None else str(folder),
    }


def _size(model: KnownModel) -> str:
    """The size of the weights on disk, as this project keeps them: bf16, or float32 for `small`."""
    from ..memory.config import shape_from

    if not model.shape:
        return "3 MB"
    parameters = shape_from(model.shape, model.name).parameters
    size = parameters * (4 if model.name == SMALL else 2)
    return f"{size / 1e9:.1f} GB"


def _memory(model: KnownModel) -> tuple[str, str]:
    """What training and serving hold, by the memory plan of the model's own recipe."""
    from ..memory import memory_plan, of_size, row_sizes
    from ..memory.device import gib
    from ..recipe import load_recipe
    from ..run import Run

    recipe = load_recipe(find(RECIPES / model.recipe), [f"model.name_or_path={model.name}"])
    kind = "cpu" if model.name in (TINY, SMALL) else "cuda"
    sizes: dict[str, int] = {}
    rows = row_sizes(recipe, Run(Path("runs") / recipe.name))
    for line in memory_plan(recipe, of_size(80, "cpu" if kind == "cpu" else "cuda"), rows):
        if "bytes" in line.details:
            sizes[line.stage] = max(sizes.get(line.stage, 0), line.details["bytes"])
    where = "CPU" if kind == "cpu" else "GPU"
    return (
        f"{gib(sizes['finetune'])} {where}" if "finetune" in sizes else "unknown",
        f"{gib(sizes['deploy'])} {where}" if "deploy" in sizes else "unknown",
    )


def _convert(args: argparse.Namespace) -> int:
    word, *folders = args.convert
    if word != "convert" or len(folders) != 1 or args.to is None:
        raise UsageError(
            "expected: phi3 models convert FOLDER --to FOLDER (or phi3 models alone for the list)"
        )
    source, target = Path(folders[0]).expanduser(), args.to.expanduser()
    if not source.is_dir():
        raise UsageError(f"{source} is not a folder")
    if target.exists():
        raise UsageError(f"{target} exists already; name a new folder with --to")
    try:
        from ..models.fuse import convert
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "local") from None
    difference = convert(source, target)
    if args.output == "json":
        console.print_json({"folder": str(target), "largest_logit_difference": difference})
    else:
        console.out.print(
            f"Written: {target}\nLargest difference of logits: {difference:g}\n"
            f"Use it with: phi3 up RECIPE model.name_or_path={target}",
            markup=False,
        )
    return 0
