"""The server's settings, as one JSON file holds them. Never a key.

Read by `python -m phi3_training.serve`; written by `process.start`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..engine import EngineName, Origin
from ..errors import UsageError

Positive = Annotated[int, Field(ge=1)]


class ServerConfig(BaseModel):
    """One server. Limits carry the names that Azure ML gives them."""

    # "model_" is a prefix that pydantic reserves by default.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    engine: EngineName = "auto"
    model_dir: Path | None = None
    onnx_dir: Path | None = None
    model_name: str = "phi3"
    num_threads: int | None = None  # None: one for a small model, else one for each core
    upstream_url: str | None = None
    upstream_model: str | None = None
    # Named adapters over `base_dir`; `adapter_dir` is the run's own, which needs no name.
    base_dir: Path | None = None
    adapter_dir: Path | None = None
    adapters: dict[str, Path] = {}

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    status_file: Path | None = None
    deployment: str = "local"
    # Which of Azure's two serving images `/score` imitates: they name parameters, wrap answers and
    # report errors differently (see score_api.py).
    dialect: Literal["loi", "fms"] = "loi"

    max_concurrent_requests_per_instance: Positive = 32
    # Azure ML: 5,000 by default and 180,000 at most
    # (learn.microsoft.com/azure/machine-learning/reference-yaml-deployment-managed-online).
    request_timeout_ms: Annotated[int, Field(ge=100, le=180_000)] = 60_000
    # Azure's documents named this size until 2022; the current ones name none.
    max_request_bytes: Annotated[int, Field(ge=1024)] = 1_500_000
    max_new_tokens: Positive = 256  # where a request names none; OpenAI's routes on Azure too
    drain_seconds: Annotated[int, Field(ge=0)] = 30
    # A connection without a request in progress is closed then. Longer than clients keep an idle
    # one, so that they close first.
    idle_seconds: Positive = 75
    cors_origins: tuple[Origin, ...] = ()

    @classmethod
    def from_file(cls, path: Path) -> ServerConfig:
        """Read the settings; raises UsageError naming each fault."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror})") from None
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise UsageError(f"{path} has faults: {'; '.join(faults)}") from None

    def to_json(self) -> str:
        """What `from_file` reads."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
