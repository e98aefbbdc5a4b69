"""Sets of the Hugging Face hub, through the `datasets` library: a split, or a share of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import MissingExtraError
from ..recipe_data import HubSet
from .blocks import Raw
from .faults import Problem


def hub_rows(source: HubSet) -> Iterator[Raw]:
    """The rows of a set; rows count from 1 in the order of the split."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "local") from None
    datasets.disable_progress_bars()
    # datasets and huggingface_hub raise many kinds of errors; all of them are one of these.
    kinds = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        rows = datasets.load_dataset(source.name, split=source.split, revision=source.revision)
    except kinds as error:
        yield Raw(0, None, [_unreachable(source, error)])
        return
    for number, row in enumerate(rows, start=1):
        yield Raw(number, {key: value for key, value in row.items() if value is not None}, [])


def _unreachable(source: HubSet, error: Exception) -> Problem:
    why = " ".join(str(error).split())[:200]
    folder = Path(source.name)
    if folder.is_dir():
        return Problem("hub-set", f"the folder cannot be read as a set ({why})", "check its files")
    return Problem(
        "hub-set",
        f"the set cannot be had from the Hugging Face hub: {type(error).__name__}: {why}",
        "check its name, its split and the network (HF_HUB_OFFLINE, proxy, HF_TOKEN for gated "
        "sets), or download it and name the files",
    )
