"""Packs a flow into a folder and a zip file, ready to be imported or uploaded elsewhere.

Reads a flow folder; writes OUT/<name>/ and OUT/<name>.zip, both whole or not at all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MissingExtraError, StageError, UsageError
from ..run import sha256_of
from .definition import AMLIGNORE, REQUIREMENTS, checked_image, definition, requirements
from .source import DAG, FlowSource

TOOLS_JSON = ".promptflow/flow.tools.json"
IGNORE = ".amlignore"
_DESCRIBE_SECONDS = 120
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment a zip file can name


@dataclass(frozen=True)
class Bundle:
    """A packed flow; `files` are names inside the folder and the zip, `sha256` is the zip's."""

    folder: Path
    zip_path: Path
    files: tuple[str, ...]
    sha256: str


def pack(
    flow: Path,
    out: Path,
    *,
    feed: str | None = None,
    image: str | None = None,
    extra: Sequence[str] = (),
) -> Bundle:
    """Pack the flow folder `flow` under `out`.

    The tool's source travels inside the folder unless `feed` (a package index) or `image` (of the
    compute session) names where the package is installed from. `extra` names further files of the
    flow folder. Raises UsageError for a flow that cannot be packed; nothing is written then.
    """
    source = FlowSource.read(flow)
    if image is not None:
        checked_image(image)
    carry_tool = feed is None and image is None
    if carry_tool and source.package_tools:
        raise UsageError(
            f"{flow} uses {', '.join(source.package_tools)} from an installed package, which a "
            "compute session takes from a feed or an image: --feed URL or --image NAME (the flow "
            "flows/phi3_chat carries its tool's source and needs neither)"
        )
    folder, zip_path = out / source.name, out / f"{source.name}.zip"
    if folder.resolve() == flow.resolve():
        raise UsageError(f"{folder} is the flow itself; pack it elsewhere with --out FOLDER")
    _check_replaceable(folder)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{source.name}.") as scratch:
        staged = Path(scratch) / source.name
        copy_flow(source, staged, feed=feed, image=image, extra=extra, carry_tool=carry_tool)
        (staged / IGNORE).write_text(AMLIGNORE, encoding="utf-8")
        refuse_secrets(staged)
        _describe_tools(source, staged)
        archive = Path(scratch) / "bundle.zip"
        files = _write_zip(staged, archive)
        replace(staged, folder)
        archive.replace(zip_path)
    return Bundle(folder, zip_path, files, sha256_of(zip_path))


def copy_flow(
    source: FlowSource,
    folder: Path,
    *,
    feed: str | None = None,
    image: str | None = None,
    extra: Sequence[str] = (),
    carry_tool: bool = True,
) -> None:
    """A folder with the flow and all it needs, free of links to anywhere else."""
    named = source.requirements or REQUIREMENTS
    text = ""
    for name, path in source.files(extra=extra, carry_tool=carry_tool).items():
        if name == named:
            text = path.read_text(encoding="utf-8")
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    wanted = requirements(text, feed if source.uses_phi3_tool else None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / named).write_text(wanted, encoding="utf-8")
    (folder / DAG).write_text(definition(source, image), encoding="utf-8")


def _check_replaceable(folder: Path) -> None:
    """Only a bundle is ever replaced: never somebody's own folder of that name."""
    if folder.exists() and not ((folder / IGNORE).is_file() and (folder / TOOLS_JSON).is_file()):
        raise UsageError(f"{folder} is there and is no bundle; choose another place with --out")


def _describe_tools(source: FlowSource, staged: Path) -> None:
    """Write flow.tools.json as Prompt flow would, in a process of its own."""
    if importlib.util.find_spec("promptflow") is None:
        raise MissingExtraError("promptflow-core", "flow")
    asked = {"sources": source.tool_sources, "package_tools": source.package_tools}
    command = [sys.executable, "-B", str(Path(__file__).with_name("describe.py"))]
    try:
        done = subprocess.run(  # noqa: S603 - our own file
            [*command, str(staged), str(staged / TOOLS_JSON)],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=_DESCRIBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StageError(
            f"The flow's code was not loaded within {_DESCRIBE_SECONDS} s; what it does when it is "
            "imported, it should do when it is called"
        ) from None
    if done.returncode:
        reasons = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise StageError(
            "Prompt flow cannot load the packed flow's tools:\n  "
            + "\n  ".join(reasons[-5:])
            + f"\nTry the flow where it lies: pf flow test --flow {source.folder}"
        )


def refuse_secrets(staged: Path) -> None:
    """The endpoint's key of this environment must not be in what is about to leave."""
    key = os.environ.get("PHI3_KEY", "").strip().encode()
    if not key:
        return
    found = [p.relative_to(staged).as_posix() for p in files_in(staged) if key in p.read_bytes()]
    if found:
        raise UsageError(
            f"The key in PHI3_KEY stands in {', '.join(found)}; take it out there: a connection is "
            "its place"
        )


def _write_zip(staged: Path, target: Path) -> tuple[str, ...]:
    """The same bytes for the same files: sorted, no times or rights, no compressor's choices."""
    names = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in files_in(staged):
            name = path.relative_to(staged).as_posix()
            entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
            entry.create_system = 3  # whatever this machine is
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, path.read_bytes())
            names.append(name)
    return tuple(names)


def files_in(folder: Path) -> list[Path]:
    """Every file of a folder, in an order that does not change."""
    return sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.as_posix())


def replace(staged: Path, folder: Path) -> None:
    """Put a finished folder in its place, whatever stood there before."""
    if folder.exists():
        old = staged.with_name("old")
        folder.replace(old)
    staged.replace(folder)
