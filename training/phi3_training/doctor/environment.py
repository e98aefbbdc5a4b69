"""The environment: Python, package versions with known bad combinations, keyring, dates.

Reads the metadata of installed packages; asks the keyring once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import requests
import yaml
from packaging.version import Version

from phi3_tool.connection import environment_names_endpoint

from .. import sunset
from ..flow import store
from ..packages import ADD_PROMPT_FLOW, RULES, Installed, installed
from .finding import Finding, Group

HERE, DATES = Group("environment"), Group("dates")
TESTED_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 13)
OF_ONE_VERSION = (
    "promptflow",
    "promptflow-core",
    "promptflow-devkit",
    "promptflow-tracing",
    "promptflow-azure",
)


def environment(
    version_of: Installed = installed, python: tuple[int, ...] = sys.version_info[:3]
) -> Iterator[Finding]:
    """All checks of this group."""
    yield check_python(python)
    yield check_versions(version_of)
    yield from check_rules(version_of)
    if version_of("promptflow") is None:
        yield HERE.skipped("keyring", "only Prompt flow's store needs one")
    else:
        yield check_keyring()


def check_python(python: tuple[int, ...]) -> Finding:
    """A Python that Prompt flow is known to run on."""
    shown = ".".join(map(str, python))
    if python[:2] > NEWEST_PYTHON:
        return HERE.warning(
            "python",
            f"{shown} is newer than any version tested with Prompt flow",
            f"recreate the environment with Python {'.'.join(map(str, TESTED_PYTHON))}",
        )
    return HERE.ok("python", shown)


def check_versions(version_of: Installed) -> Finding:
    """Prompt flow's own packages are all of one version."""
    versions = {name: version for name in OF_ONE_VERSION if (version := version_of(name))}
    if not versions:
        return HERE.skipped("versions", "Prompt flow is not installed")
    if len(set(versions.values())) == 1:
        return HERE.ok("versions", f"{', '.join(versions)}: {next(iter(versions.values()))}")
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    # The newest of those that are here: the others can be raised to it.
    newest = max(versions.values(), key=Version)
    return HERE.fault(
        "versions",
        f"Prompt flow's packages have different versions: {shown}",
        "pip install " + " ".join(f'"{name}=={newest}"' for name in versions),
    )


def check_rules(version_of: Installed) -> Iterator[Finding]:
    """Every package with versions that are known to break something."""
    for rule in RULES:
        if rule.with_package and version_of(rule.with_package) is None:
            continue
        version = version_of(rule.package)
        if version is None and rule.package == "promptflow":
            why = "not installed; connect, ask, chat --web and the flow commands need it"
            yield HERE.skipped(rule.package, why, ADD_PROMPT_FLOW)
        elif version is None:
            if rule.needed:
                yield HERE.fault(rule.package, f"not installed; {rule.why}", ADD_PROMPT_FLOW)
        elif rule.broken_by(version):
            yield HERE.fault(rule.package, f"{version}: {rule.why}", rule.fix)
        else:
            yield HERE.ok(rule.package, version)


def check_keyring() -> Finding:
    """Something keeps the key that encrypts Prompt flow's store."""
    try:
        # Asks the keyring itself, in a process that can be stopped: a locked one waits for ever.
        keeper = store.find_keeper()
    except store.KeyringError as error:
        fix = 'pip install "keyrings.alt>=5"'
        if environment_names_endpoint():
            why = "none works; not needed while PHI3_ENDPOINT and PHI3_KEY are set"
            return HERE.warning("keyring", why, fix)
        return HERE.fault("keyring", str(error), fix)
    said = store.describe(keeper, tighten=False)
    if store.exposed(keeper):
        return HERE.warning("keyring", said, f"chmod 600 {keeper.file}")
    return HERE.ok("keyring", said)


# What Prompt flow does by itself on this machine: usage reports, and its local service. Each port
# that the service remembered is asked whether the service is there; none is started or stopped.
SECONDS = 2.0


def promptflow_home() -> Path:
    """Where Prompt flow keeps its settings, store and runs."""
    return Path(os.environ.get("PF_HOME_DIRECTORY") or Path.home() / ".promptflow")


def service(home: Path, folder: Path, version_of: Installed = installed) -> Iterator[Finding]:
    """Prompt flow's settings and service; `folder` is where commands are typed."""
    if version_of("promptflow") is None:
        for check in ("telemetry", "service"):
            yield HERE.skipped(check, "Prompt flow is not installed")
        return
    try:
        settings = read_settings(home, folder)
    except (yaml.YAMLError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        yield HERE.fault(
            "settings",
            f"Prompt flow's settings cannot be read: {reason}",
            f"fix or remove the pf.yaml in {home} or above {folder}",
        )
        return
    yield check_telemetry(settings)
    yield check_service(home, settings, version_of)


def read_settings(home: Path, folder: Path) -> dict[str, object]:
    """The settings in force: those of the nearest pf.yaml above, then those of the home."""
    settings: dict[str, object] = {}
    # As Prompt flow looks for it: from the folder where a command is typed upwards.
    nearest = next(
        (d / "pf.yaml" for d in (folder, *folder.parents) if (d / "pf.yaml").is_file()), None
    )
    for path in (nearest, home / "pf.yaml"):
        if path is not None and path.is_file():
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            if not isinstance(content, dict):
                raise ValueError(f"{path} contains no settings")
            settings.update(content)
    return settings


def check_telemetry(settings: dict[str, object]) -> Finding:
    """Usage reports are on unless they were switched off."""
    section = settings.get("telemetry")
    enabled = section.get("enabled", True) if isinstance(section, dict) else True
    if str(enabled).lower() == "false":
        return HERE.ok("telemetry", "off")
    # Measured: ten seconds where a proxy drops the packets, none where the name is unknown.
    return HERE.warning(
        "telemetry",
        "on: Prompt flow reports usage to Microsoft, and each command waits up to ten seconds "
        "where the network blocks that",
        "pf config set telemetry.enabled=false",
    )


def check_service(home: Path, settings: dict[str, object], version_of: Installed) -> Finding:
    """The local service, where one runs, is Prompt flow's and of this version."""
    # 23333 by default, the next free one where that is taken.
    ports = set()
    for path in [*home.glob("pfs/*pfs.port"), *home.glob("pfs.port")]:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, OSError):
            continue
        port = (content or {}).get("service", {}).get("port") if isinstance(content, dict) else None
        ports |= {port} if isinstance(port, int) else set()
    alive = {port: version for port in sorted(ports) if (version := _heartbeat(port)) is not None}
    installed_version = version_of("promptflow")
    for port, version in alive.items():
        if version == "":  # `pf service stop` kills whatever listens on a remembered port
            return HERE.fault(
                "service",
                f"port {port}, which Prompt flow uses for its service, belongs to another "
                f"program; `pf service stop` would kill it",
                "pf service start --port PORT, with a free port",
            )
        if installed_version and version != installed_version:
            return HERE.fault(
                "service",
                f"Prompt flow's service on port {port} has version {version}, but "
                f"{installed_version} is installed",
                "pf service start --force",
            )
    if alive:
        return HERE.ok("service", f"running on port {', '.join(map(str, alive))}")
    trace = settings.get("trace")
    off = isinstance(trace, dict) and str(trace.get("destination")).lower() == "none"
    why = "traces are off" if off else "`pf flow test` and the chat page start it"
    return HERE.ok("service", f"not running ({why})")


def _heartbeat(port: int) -> str | None:
    """The service's version; "" for another program, None where nobody listens."""
    session = requests.Session()
    session.trust_env = False  # this machine is queried directly, never through a proxy
    try:
        answer = session.get(f"http://127.0.0.1:{port}/heartbeat", timeout=SECONDS)
    except requests.exceptions.ConnectTimeout:
        return None
    except requests.exceptions.ConnectionError as error:
        return None if "refused" in str(error).lower() else ""
    except requests.exceptions.RequestException:
        return ""
    finally:
        session.close()
    try:
        # {"promptflow": "1.18.5"}: another program on the port answers something else.
        versions = json.loads(answer.text)
    except ValueError:
        return ""
    return str(versions.get("promptflow", "")) if isinstance(versions, dict) else ""


def dates() -> Iterator[Finding]:
    """A warning for each end that is near or past; one line that says so when there is none."""
    day = sunset.today()
    rows = sunset.due(day)
    for row in rows:
        yield DATES.warning("ends", row.said(day), row.cure)
    if not rows:
        yield DATES.ok(
            "ends",
            f"nothing that is used here ends within {sunset.WITHIN} days of {day}; "
            "all dates: phi3 doctor --dates",
        )
