"""What `phi3 flow image` writes, started without a container: its requirements, its start command.

Writes the context and, where no Python is named, a virtual environment into the temporary place.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from .place import KEY, ROOT, Place

#: In place of a Python's path: make an environment, which needs the network.
NEW = "new"


def write_context(where: Place, flow: Path) -> Path:
    """`phi3 flow image`, as its users type it; the folder it wrote."""
    out = where.folder / "dist"
    command = [sys.executable, "-m", "phi3_training.cli", "flow", "image", str(flow)]
    done = subprocess.run(
        [*command, "--out", str(out), "-o", "json"],
        env=where.env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(json.loads(done.stdout)["folder"])


def image_python(where: Place, flow: Path, given: str | None) -> str:
    """A Python with the context's requirements and nothing else: the one given, or a NEW one."""
    if given and given != NEW:
        return given
    context, folder = write_context(where, flow), where.folder / "image-venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    print("Installing the image's requirements (once for this run) …", flush=True)
    wanted = ["-r", str(context / "requirements.txt"), "-r", str(context / "flow/requirements.txt")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def image_command(
    where: Place, flow: Path, url: str, port: int, python: str
) -> tuple[list[str], dict[str, str], Path]:
    """Command, environment and folder to start the context with, as its Dockerfile says."""
    context = write_context(where, flow)
    dockerfile = (context / "Dockerfile").read_text(encoding="utf-8")
    start = json.loads(re.findall(r"^CMD (.+)$", dockerfile, re.MULTILINE)[-1])
    env = {
        **dict(re.findall(r"^\s*(?:ENV )?(PF_\w+)=(\S+)", dockerfile, re.MULTILINE)),
        "PATH": where.env["PATH"],
        "HOME": str(where.folder / "image-home"),
        "PF_HOME_DIRECTORY": str(where.folder / "image-home" / ".promptflow"),
        "REQUESTS_CA_BUNDLE": str(where.bundle),
        "PHI3_ENDPOINT": url,
        "PHI3_KEY": KEY,
        "PORT": str(port),
        "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{port}",
    }
    Path(env["HOME"]).mkdir(exist_ok=True)
    return [python, "-m", *start], env, context
