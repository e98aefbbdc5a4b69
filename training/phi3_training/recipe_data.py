"""The recipe's section `data:`: where the chats come from and what is done with repeated ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer

from .recipe_types import Section

HUB = "hub:"
DEFAULT_SET = "HuggingFaceH4/ultrachat_200k"
DEFAULT_SPLIT = "train_sft[:1%]"
_HUB_FORM = re.compile(r"hub:(?P<name>[^@:]*)(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?")


class HubSet(BaseModel):
    """A data set of the Hugging Face hub (or its folder): `hub:NAME[@REVISION][:SPLIT]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = DEFAULT_SET
    split: str = DEFAULT_SPLIT
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubSet:
        """Read the short form; what is left out is the set of the tutorials.

        Raises ValueError for any other form.
        """
        match = _HUB_FORM.fullmatch(text)
        if match is None:
            raise ValueError(f"expected hub:NAME[@REVISION][:SPLIT], such as hub:{DEFAULT_SET}")
        return cls(**{key: value for key, value in match.groupdict().items() if value})

    @model_serializer
    def _short(self) -> str:
        return str(self)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.name}{revision}:{self.split}"


def _source(value: Any) -> Any:
    if value == {"hub": None}:  # YAML's reading of a bare `hub:`
        return HubSet()
    if isinstance(value, str) and value.startswith(HUB):
        return HubSet.parse(value)
    if not isinstance(value, (str, Path, HubSet)):
        raise ValueError('expected a file, a folder, or "hub:NAME:SPLIT" in quotes')  # noqa: TRY004 - pydantic collects ValueErrors
    return value


Source = Annotated[HubSet | Path, BeforeValidator(_source)]


class DataSection(Section):
    """The chats: training files, held-out files or a share, and old chats against forgetting.

    A source is a file (JSON lines, JSON, CSV, parquet), a folder of them, or `hub:NAME:SPLIT`.
    """

    train: Annotated[list[Source], Field(min_length=1)]
    validation: list[Source] = []
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    replay: list[Source] = []
    duplicates: Literal["auto", "refuse", "remove"] = "auto"
    near_duplicates: Literal["auto", "warn", "remove"] = "auto"
    casual_copies: bool = False
    rewordings: Annotated[int, Field(ge=0, le=20)] = 0
    seed: int = 42
    max_length: Annotated[int, Field(ge=16)] = 2048
