"""A container context that serves a flow: Dockerfile, pinned requirements, application, flow.

Reads a flow folder and image_files/; writes one folder, whole or not at all. No key goes in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .definition import REQUIREMENTS, checked_image
from .pack import copy_flow, files_in, refuse_secrets, replace
from .source import FlowSource

BASE = "python:3.13-slim"
START = ("gunicorn", "app:app")
_FILES = Path(__file__).with_name("image_files")


@dataclass(frozen=True)
class Context:
    """A written context; `start` is the command that the container runs in it."""

    folder: Path
    files: tuple[str, ...]
    start: tuple[str, ...] = START


def write_image(
    flow: Path, out: Path, *, base: str = BASE, feed: str | None = None, extra: Sequence[str] = ()
) -> Context:
    """Write the context of the flow `flow` as the folder OUT/<name>-image.

    Raises UsageError for a flow whose tool would be missing in it; nothing is written then.
    """
    source = FlowSource.read(flow)
    checked_image(base)
    if feed is None and source.package_tools:
        raise UsageError(
            f"{flow} uses {', '.join(source.package_tools)} from an installed package; name where "
            "the image installs it from with --feed URL"
        )
    folder = out / f"{source.name}-image"
    if folder.exists() and not (folder / "gunicorn.conf.py").is_file():
        raise UsageError(f"{folder} is there and is no image; choose another place with --out")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{source.name}.") as scratch:
        staged = Path(scratch) / "image"
        copy_flow(source, staged / "flow", feed=feed, extra=extra, carry_tool=feed is None)
        for path in sorted(_FILES.iterdir()):
            if path.is_file():
                text = path.read_text(encoding="utf-8").replace("@BASE@", base)
                text = text.replace("@REQUIREMENTS@", source.requirements or REQUIREMENTS)
                (staged / path.name).write_text(text, encoding="utf-8")
        refuse_secrets(staged)
        files = tuple(path.relative_to(staged).as_posix() for path in files_in(staged))
        replace(staged, folder)
    return Context(folder, files)
