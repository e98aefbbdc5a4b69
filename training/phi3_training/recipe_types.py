"""What the sections of a recipe are made of: their base class and the kinds of values."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0, le=1.0)]
Confidence = Annotated[float, Field(ge=0.5, lt=1.0)]
Rule = TypeVar("Rule")
OneOrMany = Annotated[list[Rule], BeforeValidator(lambda v: [v] if isinstance(v, dict) else v)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Section(BaseModel):
    """Base of the recipe's sections: unknown keys are faults, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
