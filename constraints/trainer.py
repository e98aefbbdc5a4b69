"""Writes what our trainer needs in an Azure ML job, in the versions of constraints/azure.txt.

Run by lock.sh with the Python of the environment that was just resolved; reads its packages.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "training" / "phi3_training" / "targets" / "azure" / "trainer.txt"
ROOTS = """requests pydantic PyYAML rich psutil filelock numpy orjson xxhash torch transformers trl
peft accelerate datasets tokenizers jinja2 sacrebleu mlflow fastapi uvicorn httpx safetensors
huggingface_hub"""
HEAD = """\
# What our trainer needs in an Azure ML job: Python 3.11, Linux. The versions are those of
# constraints/azure.txt, which a test holds it to. Renew with: make lock
"""


def plain(name: str) -> str:
    """A package's name in the one form that all of its spellings share."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(name: str, seen: set[str]) -> None:
    """Add a package and all that it asks for."""
    if plain(name) in seen:
        return
    seen.add(plain(name))
    for text in metadata.requires(name) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed(requirement.name, seen)


def main() -> None:
    """Write the file."""
    seen: set[str] = set()
    for root in ROOTS.split():
        needed(root, seen)
    lock = (HERE / "azure.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lock if "==" in line and plain(line.split("==")[0]) in seen]
    OUT.write_text(HEAD + "\n".join(pins) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
