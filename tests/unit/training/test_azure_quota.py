"""Quota: the reserve of a fifth and its exceptions, what is short, what is asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.core.exceptions import ServiceRequestError

from phi3_training.errors import StageError
from phi3_training.recipe import Recipe
from phi3_training.targets.azure import sizes
from phi3_training.targets.azure.sizes import TABLE, gpus_in, refuse_outside

from .azure_wire import Answer, Wire, clients, place

A100, T4 = "Standard_NC24ads_A100_v4", "Standard_NC4as_T4_v3"


@pytest.mark.parametrize(
    ("name", "instances", "online", "cores"),
    [
        (A100, 1, False, 24),
        (A100, 3, True, 72),  # excepted
        (T4, 1, True, 8),  # one instance needs quota for two
        (T4, 5, True, 24),
        (T4, 6, True, 32),  # 7.2 are eight
        (T4, 2, False, 8),  # clusters need no reserve
        ("Standard_ND96amsr_A100_v4", 1, True, 96),
    ],
)
def test_the_reserve_of_a_fifth(name: str, instances: int, online: bool, cores: int) -> None:
    assert sizes.cores_needed(TABLE[name.lower()], instances, online=online)[0] == cores


def _answer(used: int, limit: int) -> Any:
    def answer(_method: str, url: str) -> Answer:
        if "/usages" in url:
            name = {"value": "Standard NCADSA100v4 Family", "localizedValue": "x"}
            usage = {"currentValue": used, "limit": limit, "name": name, "unit": "Count"}
            return 200, {"value": [usage]}
        if "/vmSizes" in url:
            size = {"vCPUs": 24, "gpus": 1, "family": "standardNCADSA100v4Family"}
            cpu = {"name": "Standard_DS3_v2", "vCPUs": 4, "gpus": 0, "family": "standardDSv2Family"}
            return 200, {"value": [{"name": A100, **size}, cpu]}
        return 404, {"error": {"code": "ResourceNotFound", "message": url}}

    return answer


def _recipe(**azure: Any) -> Recipe:
    content = {"name": "x", "model": {"name_or_path": "o/m"}, "data": {"train": ["x"]}}
    return Recipe.model_validate({**content, "azure": azure})


def test_what_is_used_and_allowed_is_found_whatever_the_spaces(tmp_path: Path) -> None:
    train, serve = sizes.quota_needs(clients(Wire(_answer(24, 48)), tmp_path), _recipe())
    assert (train.cores, train.used, train.limit, train.free) == (24, 24, 48, 24)
    assert sizes.short_of_quota([train, serve]) == []


def test_too_little_stops_before_anything_is_made_and_says_how_much_to_ask(tmp_path: Path) -> None:
    found = sizes.quota_needs(clients(Wire(_answer(24, 24)), tmp_path), _recipe())
    short = sizes.short_of_quota(found)
    assert len(short) == 2
    with pytest.raises(StageError, match=r"phi3 azure quota --request 48"):
        sizes.refuse_shortage(short)


def test_an_endpoint_may_wait_for_the_clusters_cores(tmp_path: Path) -> None:
    _train, serve = sizes.quota_needs(clients(Wire(_answer(24, 24)), tmp_path), _recipe())
    assert sizes.short_of_quota([serve])
    assert not sizes.short_of_quota([serve], of_limit=True)


def test_sizes_that_are_not_there_or_have_no_gpu_are_refused(tmp_path: Path) -> None:
    made = clients(Wire(_answer(0, 24)), tmp_path)
    assert gpus_in(made, A100.upper(), "azure.compute.size") == 1
    with pytest.raises(StageError, match="has no GPU"):
        gpus_in(made, "Standard_DS3_v2", "azure.compute.size")
    with pytest.raises(StageError, match="is not offered in eastus") as caught:
        gpus_in(made, "Standard_NC80adis_H100_v5", "azure.compute.size")
    assert A100 in str(caught.value)


@pytest.mark.parametrize("name", ["Standard_NC6s_v3", "STANDARD_NC24RS_V3", "Standard_NC24r"])
def test_retired_sizes_are_refused_with_their_date(name: str) -> None:
    with pytest.raises(StageError, match="retired 20"):
        sizes.refuse_retired(name, "azure.compute.size")


def test_a_size_outside_the_models_list_is_refused_with_the_list() -> None:
    refuse_outside(None, T4, "azure.compute.size", "Phi-4")
    refuse_outside([A100.lower()], A100, "azure.compute.size", "Phi-4")
    with pytest.raises(StageError) as caught:
        refuse_outside(["Standard_NC6s_v3", A100], T4, "azure.compute.size", "Phi-4")
    assert A100 in str(caught.value)
    assert "NC6s_v3" not in str(caught.value)  # retired: no way out


def test_an_azure_that_cannot_be_reached_is_reported(tmp_path: Path) -> None:
    def unreachable(**_where: Any) -> list[Any]:
        raise ServiceRequestError("name resolution failed")

    away = SimpleNamespace(
        place=place(tmp_path),
        subscription=SimpleNamespace(compute=SimpleNamespace(list_usage=unreachable)),
    )
    with pytest.raises(StageError, match="could not be reached"):
        sizes.quota_usage(away)  # type: ignore[arg-type]
