"""Azure Machine Learning as target: thin methods; each stage's work is in a module of its own.

Reads and writes the run folder's manifests; signs in at the first call that needs Azure.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ...console import ProgressCallback
from ...recipe import Recipe
from .clients import Clients
from .provision import PARTS, Provisioned, Report, provision
from .workplace import find_workplace


class AzureTarget:
    """The journey on Azure ML. One sign-in serves all stages; keys stay in memory."""

    name = "azure"

    def __init__(self, clients: Clients | None = None) -> None:
        self._clients = clients

    def clients(self, recipe: Recipe) -> Clients:
        """The clients for the place that the recipe, the environment or config.json name."""
        if self._clients is None:
            place = find_workplace(recipe.azure, os.environ, Path.cwd())
            self._clients = Clients(place, recipe.azure.poll)
        return self._clients

    def provision(
        self,
        recipe: Recipe,
        progress: ProgressCallback,
        report: Report = lambda _step: None,
        *,
        parts: Iterable[str] = PARTS,
    ) -> Provisioned:
        """Make what is missing of `parts`; safe to repeat."""
        return provision(self.clients(recipe), recipe, progress, report, parts=parts)
