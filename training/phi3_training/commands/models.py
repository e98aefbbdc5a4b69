"""`phi3 models | recipes | init | adapters | export`: what can be trained, and what came of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import console
from ..errors import MissingExtraError, UsageError
from ..manifests import EXPORTS
from ..models.catalogue import CATALOGUE, SMALL, TINY, KnownModel, weights_folder
from ..project import RECIPES, copy_project, find
from ..recipe import Recipe
from ..recipe.keys import keys_of
from ..run import Run
from ..runs import current_of
from . import HELP
from .common import named_run, tuned_run
from .options import Subparsers, add_command, add_run


def register_models(subparsers: Subparsers) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers,
        "models",
        HELP["models"],
        "phi3 models\n  phi3 models convert ./TinyLlama-1.1B-Chat --to ./tinyllama-phi3",
        run_models,
    )
    parser.add_argument(
        "convert",
        nargs="*",
        metavar="convert FOLDER",
        help="write a Llama-class folder (SmolLM2, TinyLlama, …) in Phi-3's architecture",
    )
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="output folder of `convert`")


def run_models(args: argparse.Namespace) -> int:
    """List the catalogue, or convert."""
    if args.convert:
        word, *folders = args.convert
        if word != "convert" or len(folders) != 1 or args.to is None:
            raise UsageError(
                "expected: phi3 models convert FOLDER --to FOLDER (or phi3 models alone for the "
                "list)"
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
        return console.show(
            args.output,
            {"folder": str(target), "largest_logit_difference": difference},
            f"Written: {target}",
            f"Largest difference in logits: {difference:g}",
            f"Use it with: phi3 up RECIPE model.name_or_path={target}",
        )
    rows = [_facts_of(model) for model in CATALOGUE]
    if args.output == "json":
        console.print_json(rows)
        return 0
    for row in rows:
        here = "created in each run" if row["name"] == TINY else row["folder"] or "not downloaded"
        console.line(str(row["name"]), "bold")
        console.line(
            f"    {row['what']}\n"
            f"    licence {row['license']}, chat template {row['template']}, "
            f"{row['weights']} from: {row['source']}\n"
            f"    memory to train {row['memory_to_train']}, to serve {row['memory_to_serve']}\n"
            f"    recipe {row['recipe']}; {here}"
        )
    console.line("Memory as `phi3 plan` calculates it for the recipe and its chats.", "dim")
    console.line(
        "You can also name any folder with a causal language model as safetensors and a chat "
        "template:\n  phi3 up RECIPE model.name_or_path=/path/to/folder"
    )
    return 0


def _facts_of(model: KnownModel) -> dict[str, str | None]:
    """What is known of a model, and the memory that training and serving it take."""
    from ..memory import memory_plan, of_size, row_sizes
    from ..memory.model import gib, shape_from
    from ..recipe import load_recipe

    weights = "3 MB"
    # A tiny model has no shape in the catalogue: each run makes its own.
    if model.shape:
        parameters = shape_from(model.shape, model.name).parameters
        # As phi3 stores them: bf16, or float32 for `small`.
        weights = f"{parameters * (4 if model.name == SMALL else 2) / 1e9:.1f} GB"
    recipe = load_recipe(find(RECIPES / model.recipe), [f"model.name_or_path={model.name}"])
    # What `phi3 up` takes for each: the two small ones fit a laptop, the others an 80 GB GPU.
    on_cpu = model.name in (TINY, SMALL)
    # Of a run that need not exist: row lengths are then estimated from the recipe's chats.
    rows = row_sizes(recipe, Run(Path("runs") / recipe.name))
    held: dict[str, int] = {}  # bytes, by stage
    for line in memory_plan(recipe, of_size(80, "cpu" if on_cpu else "cuda"), rows):
        if "bytes" in line.details:
            held[line.stage] = max(held.get(line.stage, 0), line.details["bytes"])
    train, serve = (
        f"{gib(held[stage])} {'CPU' if on_cpu else 'GPU'}" if stage in held else "unknown"
        for stage in ("finetune", "deploy")
    )
    folder = None if model.name == TINY else weights_folder(model.name)
    return {
        "name": model.name,
        "what": model.what,
        "license": model.license,
        "template": model.template,
        "source": model.source,
        "recipe": str(RECIPES / model.recipe),
        "weights": weights,
        "memory_to_train": train,
        "memory_to_serve": serve,
        "folder": None if folder is None else str(folder),
    }


# ---- `phi3 recipes`: the shipped recipes, and every key a recipe may have


def register_recipes(subparsers: Subparsers) -> None:
    """Add the command of this module."""
    parser = add_command(subparsers, "recipes", HELP["recipes"], "phi3 recipes --keys", run_recipes)
    parser.add_argument(
        "--keys",
        nargs="?",
        const="",
        metavar="PART",
        help="list every key with its meaning, allowed values and default (PART: those that "
        "contain it, such as finetune)",
    )


def run_recipes(args: argparse.Namespace) -> int:
    """List recipes with the first line of their header, or all keys."""
    if args.keys is not None:
        keys = [key for key in keys_of(Recipe) if args.keys in key.name]
        if not keys:
            raise UsageError(
                f"No key of a recipe contains {args.keys!r}; all keys: phi3 recipes --keys"
            )
        if args.output == "json":
            shown = ("default", "allowed", "description")
            console.print_json({key.name: {n: getattr(key, n) for n in shown} for key in keys})
            return 0
        for key in keys:
            default = "(required)" if key.default is None else f"default {key.default}"
            console.out.print(key.name, style="bold", markup=False, end="  ")
            console.line(f"{default}; {key.allowed}\n    {key.description}")
        return 0
    paths = sorted(find(RECIPES).glob("*.yaml"))
    headers = [path.read_text(encoding="utf-8").splitlines()[0] for path in paths]
    listed = {
        str(RECIPES / path.name): header.lstrip("# ")
        for path, header in zip(paths, headers, strict=True)
    }
    width = max(len(name) for name in listed)
    lines = (f"{name:<{width}}  {text}" for name, text in listed.items())
    return console.show(args.output, listed, *lines)


# ---- `phi3 init`: a new project, from the files that come with the package


def register_init(subparsers: Subparsers) -> None:
    """Add the command of this module."""
    parser = add_command(subparsers, "init", HELP["init"], "phi3 init my-phi3", run_init)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty folder")


def run_init(args: argparse.Namespace) -> int:
    """Write the project and say what to do with it."""
    written = copy_project(args.folder)
    return console.show(
        args.output,
        {"folder": str(args.folder), "written": [str(path) for path in written]},
        f"Created in {args.folder}: {', '.join(map(str, written))}",
        f"Next: cd {args.folder} && phi3 up recipe.yaml",
    )


# ---- `phi3 adapters`: lists the named adapters of a run, or merges one into full weights


def register_adapters(subparsers: Subparsers) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers,
        "adapters",
        HELP["adapters"],
        "phi3 adapters --merge french",
        run_adapters,
    )
    add_run(parser)
    parser.add_argument("--merge", metavar="ADAPTER", help="write run/merged/ADAPTER")


def run_adapters(args: argparse.Namespace) -> int:
    """List them, or merge one."""
    run = named_run(args.runs, args.run) if args.run else current_of(args.runs)
    if run is None:
        raise UsageError(f"There is no run under {args.runs}; create one with: phi3 up")
    # Here, after the run is known to exist: torch takes seconds to load.
    from ..finetune.weights import list_adapters, merge_adapter

    if args.merge is not None:
        with run.lock():
            folder = merge_adapter(run, args.merge)
        merged = {"name": args.merge, "path": str(folder)}
        return console.show(args.output, merged, f"Merged {args.merge}: {folder}")
    adapters = list_adapters(run)
    if args.output == "json":
        console.print_json([adapter.as_dict() for adapter in adapters])
        return 0
    if not adapters:
        console.line(
            f"The run {run.name!r} has no named adapter; train one: "
            "phi3 train RECIPE --adapter NAME"
        )
        return 0
    rows = []
    for adapter in adapters:
        stale = "" if adapter.fits else " (trained on an earlier base: train it again)"
        method, loss = adapter.notes.get("method", "?"), adapter.notes.get("final_loss", "")
        rows.append([adapter.name, str(method), str(loss), f"{adapter.path}{stale}"])
    console.table(f"Adapters of {run.name}", ["adapter", "method", "final loss", "folder"], rows)
    return 0


# ---- `phi3 export`: the tuned model in another format, compared with the original

# Spelled out, so that `--help` needs no heavy package.
FORMATS = ("merged", "onnx-int4", "onnx-int8", "onnx-fp32")


def register_export(subparsers: Subparsers) -> None:
    """Add the command of this module."""
    parser = add_command(
        subparsers,
        "export",
        HELP["export"],
        "phi3 export --to onnx-int4 --run phi3-tiny",
        run_export,
    )
    parser.add_argument("--to", choices=FORMATS, required=True, help="target format")
    add_run(parser)


def run_export(args: argparse.Namespace) -> int:
    """Export and compare; exit 1 when the export is too far from the original."""
    from ..verify.export import export

    run = tuned_run(args)
    with run.lock(), console.progress_bar("export") as progress:
        check = export(run, args.to, progress)
    manifest = run.require(EXPORTS[args.to])
    if args.output == "json":
        console.print_json(manifest.as_json())
        return 0 if check.passed else 1
    console.line(f"Written: {run.path / manifest.path}")
    limits = check.limits
    if limits is None:
        console.line(check.note or "")
        return 0 if check.passed else 1
    rows = [
        ["same token chosen", f"{check.token_agreement:.2%}",
         f"at least {limits.token_agreement:.1%}"],
        ["mean KL (nats)", f"{check.mean_kl:.2g}", f"at most {limits.mean_kl:g}"],
        ["worst KL of a prompt", f"{check.worst_kl:.2g}", f"at most {limits.worst_kl:g}"],
    ]  # fmt: skip
    if held := check.held_out:
        rows.append(
            [f"exact match, {held.rows} held-out rows",
             f"{held.exact_match_before:.1%} → {held.exact_match:.1%}",
             f"drops by at most {limits.lost_answers:.1%}"]
        )  # fmt: skip
    if layers := check.layers:
        rows.append(
            [f"largest weight difference, {layers.layer}", f"{layers.largest:.2g}",
             f"at most {limits.weights:g}"]
        )  # fmt: skip
    title = f"Compared with {check.compared_with}, {check.prompts} fixed prompts"
    console.table(title, ["figure", "measured", "limit"], rows)
    for problem in check.problems:
        console.line(f"Over the limit: {problem}")
    return 0 if check.passed else 1
