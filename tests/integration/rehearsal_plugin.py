"""One rehearsed Azure for all tests that need one.

A plugin (`pytest_plugins = …`), so that all test modules share it. Its catalogue holds the taught
model of the endpoint's tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import forked
from tests.integration.server_fixture import Taught

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.identity import EnvironmentCredential
from tests.integration.rehearsal_fixture import Azure, provision

from phi3_rehearsal import Rehearsal, start, tiny_model


@pytest.fixture(scope="session")
def rehearsed(taught: Taught, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    """A rehearsed Azure whose catalogue has the taught model."""
    folder: Path = tmp_path_factory.mktemp("rehearsal") / "azure"
    tiny_model.as_mlflow(taught.model_dir, folder / "catalogue" / "mlflow")
    with forked.forked_modules():
        rehearsal = start(folder)
    yield rehearsal
    rehearsal.close()


@pytest.fixture(scope="module")
def azure(rehearsed: Rehearsal) -> Iterator[Azure]:
    """The rehearsed Azure with a workspace; in this module the environment leads to it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rehearsed.env.items():
            patch.setenv(name, value)
        found = Azure(rehearsed, EnvironmentCredential(), rehearsed.env["AZURE_SUBSCRIPTION_ID"])
        if found.call("GET", found.workspace).status_code == 404:
            provision(found)
        yield found
