"""The environment: Python, package versions with known bad combinations, and the keyring.

Reads the metadata of installed packages; asks the keyring once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from phi3_tool.connection import environment_names_endpoint

from .. import keyring_guard
from .finding import Finding, Group

Installed = Callable[[str], "str | None"]

HERE = Group("environment")
TESTED_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 13)
OF_ONE_VERSION = (
    "promptflow",
    "promptflow-core",
    "promptflow-devkit",
    "promptflow-tracing",
    "promptflow-azure",
)


@dataclass(frozen=True)
class Rule:
    """A package and the versions of it that work: at least `low`, below `high`."""

    package: str
    low: str = ""
    high: str = ""
    why: str = ""
    needed: bool = True
    with_package: str = ""  # only where this one is installed too

    def broken_by(self, version: str) -> bool:
        """Whether this version is outside."""
        found = _numbers(version)
        return bool(self.low and found < _numbers(self.low)) or bool(
            self.high and found >= _numbers(self.high)
        )

    @property
    def mend(self) -> str:
        """The pip command that gets a version that works."""
        wanted = [f">={self.low}"] if self.low else []
        wanted += [f"<{self.high}"] if self.high else []
        return f'pip install "{self.package}{",".join(wanted)}"'


RULES = (
    Rule("promptflow", "1.18.5", "2", "older versions have known holes in their local service"),
    Rule("filelock", "3.20", "3.30", "3.30 forbids inherited locks: the chat page's server dies"),
    Rule(
        "azure-ai-ml",
        high="1.33",
        why="1.33 dropped a module that every pfazure command imports",
        needed=False,
        with_package="promptflow-azure",
    ),
    Rule("uvicorn", why="`pf flow serve --engine fastapi` needs it and does not ask for it"),
    Rule("requests", "2.28", why="the client is built on it"),
)


def installed(package: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(
    version_of: Installed = installed, python: tuple[int, ...] = sys.version_info[:3]
) -> Iterator[Finding]:
    """All checks of this group."""
    yield check_python(python)
    yield check_versions(version_of)
    yield from check_rules(version_of)
    yield check_keyring()


def check_python(python: tuple[int, ...]) -> Finding:
    """A Python that Prompt flow is known to run on."""
    shown = ".".join(map(str, python))
    if python[:2] > NEWEST_PYTHON:
        return HERE.warning(
            "python",
            f"{shown} is newer than any that Prompt flow was tried with",
            f"make the environment anew with Python {'.'.join(map(str, TESTED_PYTHON))}",
        )
    return HERE.ok("python", shown)


def check_versions(version_of: Installed) -> Finding:
    """Prompt flow's own packages are all of one version."""
    found = {name: version for name in OF_ONE_VERSION if (version := version_of(name))}
    if not found:
        return HERE.skipped("versions", "Prompt flow is not installed")
    shown = ", ".join(f"{name} {version}" for name, version in found.items())
    if len(set(found.values())) > 1:
        newest = max(found.values(), key=_numbers)
        return HERE.fault(
            "versions",
            f"Prompt flow's packages are of different versions: {shown}",
            "pip install " + " ".join(f'"{name}=={newest}"' for name in found),
        )
    return HERE.ok("versions", f"{', '.join(found)}: {next(iter(found.values()))}")


def check_rules(version_of: Installed) -> Iterator[Finding]:
    """Every package with versions that are known to break something."""
    for rule in RULES:
        if rule.with_package and version_of(rule.with_package) is None:
            continue
        version = version_of(rule.package)
        if version is None:
            if rule.needed:
                mend = 'pip install "phi3-promptflow[flow]"'
                yield HERE.fault(rule.package, f"not installed; {rule.why}", mend)
        elif rule.broken_by(version):
            yield HERE.fault(rule.package, f"{version}: {rule.why}", rule.mend)
        else:
            yield HERE.ok(rule.package, version)


def check_keyring() -> Finding:
    """Something keeps the key that encrypts Prompt flow's store."""
    try:
        keeper = keyring_guard.find_keeper()
    except keyring_guard.KeyringError as error:
        mend = 'pip install "keyrings.alt>=5"'
        if environment_names_endpoint():
            why = "none works; not needed while PHI3_ENDPOINT and PHI3_KEY are set"
            return HERE.warning("keyring", why, mend)
        return HERE.fault("keyring", str(error), mend)
    said = keyring_guard.describe(keeper, tighten=False)
    if keyring_guard.exposed(keeper):
        return HERE.warning("keyring", said, f"chmod 600 {keeper.file}")
    return HERE.ok("keyring", said)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
