"""What comes with this package: recipes, chats, a handbook, flows and connection templates.

They are found in the current folder, in the clone that the package is installed from, or inside
the installed wheel; `copy_project` writes the ones that a user edits.
"""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from .errors import UsageError

_PACKAGE = Path(__file__).resolve().parent
CLONE = _PACKAGE.parents[1]
# In a wheel the same tree is inside the package (setup.py, `SHIPPED`).
_INSTALLED = _PACKAGE / "shipped"

RECIPES = Path("training/recipes")
DATA = Path("training/data")
FLOW = Path("flows/phi3_chat")
RAG_FLOW = Path("flows/phi3_rag_chat")
TOOL = Path("tools/phi3_tool")
AGENT = Path("agents/phi3_agent")
DEFAULT_RECIPES = {
    "local": RECIPES / "phi3-small.yaml",
    "azure": RECIPES / "phi3-mini-azure.yaml",
}
DOCUMENTS_RUN = "documents"  # the run of `phi3 rag index`, unless another is named
TINY_RECIPE = RECIPES / "phi3-tiny.yaml"

_OWN_RECIPE = "recipe.yaml"
_SAMPLES = (
    "outdoor_chats.jsonl",
    "outdoor_chats_heldout.jsonl",
    "general_chats.jsonl",
    "handbook_questions.jsonl",
    "handbook_changes.json",
)
_NEVER = shutil.ignore_patterns(
    "__pycache__", ".promptflow", "*.pyc", "index.sqlite*", "index.json"
)


def find(path: Path) -> Path:
    """`path` under the current folder, the clone or the wheel. Raises UsageError if in none."""
    for folder in (Path.cwd(), CLONE, _INSTALLED):
        if (folder / path).exists():
            return folder / path
    raise UsageError(
        f"{path} is missing from this installation; "
        'reinstall it: pip install --force-reinstall "phi3-promptflow[flow,local]"'
    )


def find_recipe(word: str) -> Path:
    """A recipe's file: a path, or the name of a shipped one (`phi3-tiny`, or `tiny` for short)."""
    path = Path(word)
    if path.exists() or path.suffix:
        return path
    shipped = [RECIPES / f"{name}.yaml" for name in (word, f"phi3-{word}")]
    there = [folder / name for folder in (Path.cwd(), CLONE, _INSTALLED) for name in shipped]
    return next((recipe for recipe in there if recipe.is_file()), path)


def recipe_names() -> list[str]:
    """The names of the shipped recipes, as `find_recipe` takes them, without their short forms."""
    return sorted(path.stem for path in find(RECIPES).glob("*.yaml"))


def shipped_data(name: str) -> Path | None:
    """A shipped file of chats or questions; None where the package came without (a cloud job)."""
    places = [folder / DATA / name for folder in (CLONE, _INSTALLED)]
    return next((path for path in places if path.is_file()), None)


def copy_project(target: Path) -> list[Path]:
    """Write a new project into `target`; returns the files and folders written, relative to it.

    The flows with the tool's source (their `additional_includes` names it), a recipe, sample
    chats, a sample handbook with questions, the connection templates, a README and a .gitignore.
    Raises UsageError where `target` is a folder with something in it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and is not empty; name a new folder: phi3 init FOLDER")
    target.mkdir(parents=True, exist_ok=True)
    for folder in (FLOW, RAG_FLOW, TOOL, Path("connections")):
        shutil.copytree(find(folder), target / folder, ignore=_NEVER)
    shutil.copytree(find(DATA / "handbook"), target / "data" / "handbook")
    for name in _SAMPLES:
        shutil.copyfile(find(DATA / name), target / "data" / name)
    recipe = find(DEFAULT_RECIPES["local"]).read_text(encoding="utf-8")
    # In the clone the recipe is two folders down; in a project it is at the top, next to data/.
    recipe = recipe.replace("../data/", "data/").replace(
        str(DEFAULT_RECIPES["local"].as_posix()), _OWN_RECIPE
    )
    (target / _OWN_RECIPE).write_text(recipe, encoding="utf-8")
    template = files("phi3_training") / "project_files"
    for name in ("README.md", "gitignore"):
        text = (template / name).read_text(encoding="utf-8")
        own_name = ".gitignore" if name == "gitignore" else name
        (target / own_name).write_text(text, encoding="utf-8")
    return sorted(path.relative_to(target) for path in target.iterdir())
