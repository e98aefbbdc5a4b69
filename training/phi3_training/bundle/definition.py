"""The text of a bundle's own files: flow.dag.yaml, requirements.txt and .amlignore.

Pure functions; comments and layout of the flow's own YAML are kept where that is possible.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import yaml

from phi3_tool import __version__

from ..errors import UsageError
from .source import FlowSource

DISTRIBUTION = "phi3-promptflow"
REQUIREMENTS = "requirements.txt"
# The last match wins: of what Prompt flow writes only the tools' description travels.
AMLIGNORE = """\
# What Prompt flow and Python write next to a flow stays on this machine: transcripts, logs, caches.
.promptflow/*
!.promptflow/flow.tools.json
.runs/
__pycache__/
*.py[cod]
*.log
.env
.git/
.venv*/
"""
_LOCAL_REQUIREMENT = re.compile(r"^\s*(?:-e\b|--editable\b|\.{1,2}/|/|file:|.*\.whl\b)|@\s*file:")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")


def definition(source: FlowSource, image: str | None) -> str:
    """flow.dag.yaml for a folder that holds everything itself."""
    wanted = {key: value for key, value in source.dag.items() if key != "additional_includes"}
    environment = {"python_requirements_txt": source.requirements or REQUIREMENTS}
    if image is not None:
        environment["image"] = image
    wanted["environment"] = {**(wanted.get("environment") or {}), **environment}
    text = _without_block(source.text, "additional_includes")
    if image is not None:
        text = re.sub(r"(?m)^environment:[ \t]*$", f"environment:\n  image: {image}", text, count=1)
    if _loaded(text) == wanted:
        return text
    # Written in a way that cannot be edited line by line: anew, without its comments.
    return str(yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True))


def requirements(text: str, feed: str | None) -> str:
    """requirements.txt; with a feed, the tool's package out of it and everything else too."""
    faults = [line.strip() for line in text.splitlines() if _LOCAL_REQUIREMENT.search(line)]
    if faults:
        raise UsageError(
            "requirements.txt names what only this machine has, and a compute session installs no "
            f"local files: {'; '.join(faults)}. Take it from a feed (--feed URL) or an image "
            "(--image NAME)"
        )
    if feed is None:
        return text
    parts = urlsplit(feed)
    if parts.scheme != "https" or not parts.hostname or "@" in parts.netloc or parts.query:
        raise UsageError(
            "--feed must be the https URL of a package index, without a user name or token in it "
            "(the bundle is no place for a secret; the workspace's connection to the feed holds it)"
        )
    # The feed alone: beside a public index, a stranger's package of that name could win.
    head = f"--index-url {feed}\n{DISTRIBUTION}=={__version__}\n"
    return head + text


def checked_image(image: str) -> str:
    """An image's name that can stand in YAML and in a Dockerfile as it is."""
    if not _IMAGE.fullmatch(image):
        raise UsageError(f"{image!r} is no image name: expected [REGISTRY/]NAME[:TAG]")
    return image


def _without_block(text: str, key: str) -> str:
    """The YAML text without a top-level key, its lines and the comment right above it."""
    lines = text.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{key}:")), None)
    if start is None:
        return text
    end = start + 1
    while end < len(lines) and (lines[end][:1] in " \t-" or not lines[end].strip()):
        end += 1
    while start and lines[start - 1].startswith("#"):
        start -= 1
    return "".join(lines[:start] + lines[end:])


def _loaded(text: str) -> Mapping[str, Any] | None:
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return loaded if isinstance(loaded, dict) else None
