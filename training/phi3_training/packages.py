"""Packages with versions that are known to break something, and the versions that work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from packaging.specifiers import SpecifierSet

# What writes the tokens and runs the model must be the same where it is trained and served.
MODEL_PACKAGES = ("torch", "transformers", "tokenizers", "jinja2")

Installed = Callable[[str], "str | None"]

ADD_PROMPT_FLOW = 'pip install "phi3-promptflow[flow]"'
#: Printed wherever a command continues without Prompt flow.
NO_PROMPT_FLOW = f"Prompt flow is not installed; add it with: {ADD_PROMPT_FLOW}"


@dataclass(frozen=True)
class Rule:
    """A package, the versions of it that work, and what the others break."""

    package: str
    works: str = ""
    why: str = ""
    needed: bool = True
    with_package: str = ""  # only where this one is installed too

    def broken_by(self, version: str) -> bool:
        """Whether this version is outside."""
        return not SpecifierSet(self.works).contains(version, prereleases=True)

    @property
    def fix(self) -> str:
        """The pip command that gets a version that works."""
        return f'pip install "{self.package}{self.works}"'


RULES = (
    Rule(
        "promptflow",
        ">=1.18.5,<2",
        "older versions have known vulnerabilities in their local service",
    ),
    Rule("filelock", ">=3.20,<3.30", "3.30 forbids inherited locks: the chat page's server dies"),
    Rule(
        "azure-ai-ml",
        "<1.33",  # 1.32.0 is the last that promptflow-azure 1.18.5 can be imported with
        "1.33 dropped a module that every pfazure command imports",
        needed=False,
        with_package="promptflow-azure",
    ),
    Rule("uvicorn", why="`pf flow serve --engine fastapi` needs it and does not install it"),
    Rule("requests", ">=2.28", "the client is built on it"),
)


def installed(package: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_prompt_flow() -> bool:
    """Whether Prompt flow's SDK is here: without it flows, their chat page and store are left out.

    Both are asked: a folder of that name remains where it was uninstalled, and the metadata
    do not say whether it can be imported.
    """
    return installed("promptflow-devkit") is not None and find_spec("promptflow") is not None
