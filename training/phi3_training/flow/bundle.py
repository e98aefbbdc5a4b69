"""A Prompt flow folder made ready to travel: with its tool's source, and nothing it does not need.

Reads a flow folder; writes a folder and a zip file that is the same, byte for byte, every time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from phi3_tool import __version__

from ..errors import MissingExtraError, StageError, UsageError
from ..run import sha256_of
from .source import DAG, FlowSource, connection_of

# ---- the text of a bundle's own files: flow.dag.yaml, requirements.txt and .amlignore
# Pure functions; comments and layout of the flow's own YAML are kept where that is possible.

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
    # Line by line, so that comments and layout stay: the block, and the comment right above it.
    lines = source.text.splitlines(keepends=True)
    start = next((i for i, li in enumerate(lines) if li.startswith("additional_includes:")), None)
    if start is not None:
        end = start + 1
        while end < len(lines) and (lines[end][:1] in " \t-" or not lines[end].strip()):
            end += 1
        while start and lines[start - 1].startswith("#"):
            start -= 1
        del lines[start:end]
    text = "".join(lines)
    if image is not None:
        text = re.sub(r"(?m)^environment:[ \t]*$", f"environment:\n  image: {image}", text, count=1)
    with contextlib.suppress(yaml.YAMLError):
        if yaml.safe_load(text) == wanted:
            return text
    # Written in a way that cannot be edited line by line: rewritten, without its comments.
    return str(yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True))


def requirements(text: str, feed: str | None) -> str:
    """requirements.txt; with a feed, the tool's package out of it and everything else too."""
    faults = [line.strip() for line in text.splitlines() if _LOCAL_REQUIREMENT.search(line)]
    if faults:
        raise UsageError(
            "requirements.txt names local files, which a compute session cannot install: "
            f"{'; '.join(faults)}. Install them from a feed (--feed URL) or use an image "
            "(--image NAME)"
        )
    if feed is None:
        return text
    parts = urlsplit(feed)
    if parts.scheme != "https" or not parts.hostname or "@" in parts.netloc or parts.query:
        raise UsageError(
            "--feed must be the https URL of a package index, without a user name or token in it "
            "(the bundle must not contain a secret; the workspace's connection to the feed holds "
            "it)"
        )
    # The feed alone: with a public index as well, a stranger's package of that name could win.
    head = f"--index-url {feed}\n{DISTRIBUTION}=={__version__}\n"
    return head + text


def checked_image(image: str) -> str:
    """An image's name that can be used in YAML and in a Dockerfile as it is."""
    if not _IMAGE.fullmatch(image):
        raise UsageError(f"{image!r} is not an image name: expected [REGISTRY/]NAME[:TAG]")
    return image


# ---- a folder and a zip file, ready to be imported or uploaded elsewhere
# Writes OUT/<name>/ and OUT/<name>.zip, both whole or not at all.

TOOLS_JSON = ".promptflow/flow.tools.json"
IGNORE = ".amlignore"
README, CONNECTION = "README.md", "connection.yaml"
_README = """\
# {name}

A Prompt flow, packed with everything it needs. In this folder:

```bash
{steps}
```

In Azure AI Foundry or ML Studio: Prompt flow, Create, Upload from local; create the connection
there under the same name.

A filelock from 3.30 on breaks Prompt flow's chat page (`pf flow test --flow . --ui`). Prompt flow
reports usage and leaves a service for traces running; this turns both off:

```bash
pf config set telemetry.enabled=false
pf config set trace.destination=none
```

Without a desktop (server, container) keyrings.alt, which the requirements name, keeps the key that
encrypts Prompt flow's connections: in ~/.local/share/python_keyring, not encrypted itself. Let only
its owner read that folder and ~/.promptflow.
"""
CONNECTION_SCHEMA = (
    "https://azuremlschemas.azureedge.net/promptflow/latest/CustomConnection.schema.json"
)
_CONNECTION = """\
# Give both values with --set, so that no key is written into a file (see README.md).
$schema: {schema}
type: custom
name: {name}
configs:
  endpoint: <the full address, such as https://HOST/score or https://HOST/v1/chat/completions>
secrets:
  key: <the endpoint's key>
"""
_KEYRING = """\
# Where there is no desktop, Prompt flow can store a connection only with this.
keyrings.alt>=5
"""
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
    overwrite: bool = False,
) -> Bundle:
    """Pack the flow folder `flow` under `out`.

    The tool's source travels inside the folder unless `feed` (a package index) or `image` (of the
    compute session) names where the package is installed from. `extra` names further files of the
    flow folder. Raises UsageError for a flow that cannot be packed, and for an earlier zip of other
    bytes without `overwrite`; nothing is written then.
    """
    source = FlowSource.read(flow)
    if image is not None:
        checked_image(image)
    carry_tool = feed is None and image is None
    if carry_tool and source.package_tools:
        raise UsageError(
            f"{flow} uses {', '.join(source.package_tools)} from an installed package, which a "
            f"compute session needs from a feed or an image: --feed URL or --image NAME "
            f"(flows/phi3_chat carries its tool's source and needs neither)"
        )
    folder, zip_path = out / source.name, out / f"{source.name}.zip"
    if folder.resolve() == flow.resolve():
        raise UsageError(f"{folder} is the flow itself; choose another folder with --out FOLDER")
    # Only a bundle is ever replaced: never another folder of that name.
    if folder.exists() and not ((folder / IGNORE).is_file() and (folder / TOOLS_JSON).is_file()):
        raise UsageError(f"{folder} exists and is not a bundle; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    # Under `out`: a rename puts it in its place, which works inside one file system only.
    with tempfile.TemporaryDirectory(dir=out, prefix=f".{source.name}.") as scratch:
        staged = Path(scratch) / source.name
        copy_flow(source, staged, feed=feed, image=image, extra=extra, carry_tool=carry_tool)
        (staged / IGNORE).write_text(AMLIGNORE, encoding="utf-8")
        needed = staged / (source.requirements or REQUIREMENTS)
        text = needed.read_text(encoding="utf-8")
        if "keyrings.alt" not in text:
            end = "\n" if text and not text.endswith("\n") else ""
            needed.write_text(f"{text}{end}{_KEYRING}", encoding="utf-8")
        _explain(source, staged)
        refuse_secrets(staged)
        _describe_tools(source, staged)
        files = tuple(path.relative_to(staged).as_posix() for path in files_in(staged))
        archive = Path(scratch) / "bundle.zip"
        # The same bytes for the same files: sorted, no times or rights, no compressor's choices.
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as bundle:
            for name in files:
                entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
                entry.create_system = 3  # whatever this machine is
                entry.external_attr = 0o100644 << 16
                bundle.writestr(entry, (staged / name).read_bytes())
        if not overwrite and zip_path.exists() and sha256_of(zip_path) != sha256_of(archive):
            raise UsageError(
                f"{zip_path} exists and is another bundle; replace it with --overwrite, or choose "
                f"another folder with --out FOLDER"
            )
        replace(staged, folder)
        archive.replace(zip_path)
    return Bundle(folder, zip_path, files, sha256_of(zip_path))


def _explain(source: FlowSource, staged: Path) -> None:
    """README.md for who gets the bundle alone, and the connection it needs, without its values."""
    name = connection_of(source.dag)
    inputs = source.dag.get("inputs") or {}
    chat = [key for key, about in inputs.items() if about.get("is_chat_input")]
    needed = source.requirements or REQUIREMENTS
    steps = [f'pip install "promptflow>=1.18.5,<2" "filelock<3.30" -r {needed}']
    if name is not None:
        text = _CONNECTION.format(name=name, schema=CONNECTION_SCHEMA)
        (staged / CONNECTION).write_text(text, encoding="utf-8")
        steps.append(
            f"pf connection create --file {CONNECTION} \\\n"
            "    --set configs.endpoint=https://HOST/score secrets.key=KEY"
        )
    given = f' --inputs {chat[0]}="Hello?"' if chat else ""
    steps.append(f"pf flow test --flow .{given}")
    if not (staged / README).exists():
        readme = _README.format(name=source.name, steps="\n".join(steps))
        (staged / README).write_text(readme, encoding="utf-8")


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


def _describe_tools(source: FlowSource, staged: Path) -> None:
    """Write flow.tools.json as Prompt flow would, in a separate process."""
    if importlib.util.find_spec("promptflow") is None:
        raise MissingExtraError("promptflow-core", "flow")
    tools = {"sources": source.tool_sources, "package_tools": source.package_tools}
    # -B: no __pycache__ in the folder that is being packed.
    command = [sys.executable, "-B", str(Path(__file__).with_name("describe.py"))]
    try:
        done = subprocess.run(  # noqa: S603 - our own file
            [*command, str(staged), str(staged / TOOLS_JSON)],
            input=json.dumps(tools),
            capture_output=True,
            text=True,
            timeout=_DESCRIBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StageError(
            f"The flow's code did not load within {_DESCRIBE_SECONDS} s; move slow work from "
            f"import time into the node's function"
        ) from None
    if done.returncode:
        reasons = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise StageError(
            "Prompt flow cannot load the packed flow's tools:\n  "
            + "\n  ".join(reasons[-5:])
            + f"\nTry the unpacked flow: pf flow test --flow {source.folder}"
        )


def refuse_secrets(staged: Path) -> None:
    """The endpoint's key of this environment must not be in what is about to leave."""
    key = os.environ.get("PHI3_KEY", "").strip().encode()
    if not key:
        return
    exposed = [p.relative_to(staged).as_posix() for p in files_in(staged) if key in p.read_bytes()]
    if exposed:
        raise UsageError(
            f"The key in PHI3_KEY occurs in {', '.join(exposed)}; remove it there and keep it in a "
            f"connection"
        )


def files_in(folder: Path) -> list[Path]:
    """Every file of a folder, in an order that does not change."""
    return sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.as_posix())


def replace(staged: Path, folder: Path) -> None:
    """Put a finished folder in its place, replacing what was there."""
    if folder.exists():
        old = staged.with_name("old")
        folder.replace(old)
    staged.replace(folder)


# ---- a container context that serves a flow: Dockerfile, pinned requirements, application, flow
# Reads a flow folder and image_files/; writes one folder, whole or not at all. No key goes in.

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
        raise UsageError(
            f"{folder} exists and is not an image folder; choose another folder with --out"
        )
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
