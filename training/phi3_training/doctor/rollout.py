"""Whether a rollout on Azure was interrupted: its traffic then stays half changed.

Reads the run folders' rollout.json; asks Azure nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..errors import StageError
from ..manifests import RolloutManifest
from ..run import Run
from .finding import Finding, Group

ROLLOUT = Group("rollout")


def unfinished_rollouts(runs: Iterable[Run]) -> Iterator[Finding]:
    """A fault for each run whose last change of an endpoint's traffic was not ended."""
    for run in runs:
        try:
            record = run.read(RolloutManifest)
        except StageError as error:
            yield ROLLOUT.fault(run.name, str(error), f"phi3 azure traffic --run {run.name}")
            continue
        if record is not None and record.unfinished:
            yield ROLLOUT.fault(
                run.name,
                record.unfinished,
                f"phi3 up --run {run.name}, or undo it: phi3 azure rollback --run {run.name}",
            )
