"""A rollout moves the traffic in steps, and ends as it began where anything is worse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi3_tool.errors import ServiceError
from phi3_training.errors import StageError
from phi3_training.evaluate.questions import Question
from phi3_training.evaluate.rows import Answered, Said, make_rows, write_rows
from phi3_training.manifests import RolloutManifest
from phi3_training.progress import no_progress
from phi3_training.recipe import Recipe
from phi3_training.run import Run
from phi3_training.targets.azure.place import ROLLOUT_TAG
from phi3_training.targets.azure.rollout import (
    Interrupted,
    Rollout,
    shares_at,
    tag_of,
    tagged,
    undo_interrupted,
)
from phi3_training.targets.azure.traffic import DeploymentId
from phi3_training.targets.base import Access

from .azure_endpoint import BLUE, Service, refusal
from .azure_wire import clients

RECIPE = {
    "name": "r",
    "data": {"train": ["chats.jsonl"]},
    "model": {"name_or_path": "microsoft/Phi-4-mini-instruct"},
}
# The last one only takes the tag away: until it is judged, 100 % can be undone as well.
STEPS = [{"blue": 95, "green": 5}, {"blue": 75, "green": 25}, {"green": 100}, {"green": 100}]
QUESTIONS = [
    Question("validation", i, [{"role": "user", "content": f"What is {i}?"}], f"It is {i}")
    for i in range(20)
]


class Scripted(Access):
    """Deployments that answer what a test says: `say(deployment, question)` gives or raises it."""

    say: Callable[[str, str], str]

    def client(self, **options: Any) -> Any:
        return _Client(self.say, options["deployment"])


class _Client:
    def __init__(self, say: Callable[[str, str], str], deployment: str) -> None:
        self._say, self._deployment = say, deployment

    def chat(self, messages: list[dict[str, str]], **_parameters: Any) -> Any:
        class Reply:
            text = self._say(self._deployment, messages[-1]["content"])

        return Reply

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def right(_deployment: str, question: str) -> str:
    return f"It is {question.removeprefix('What is ').rstrip('?')}"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.open(tmp_path / "my-run")
    said = [Answered(Said(question.expected), None) for question in QUESTIONS]
    write_rows(run, make_rows(QUESTIONS, said, said))
    return run


def rollout(
    service: Service, run: Run, say: Callable[[str, str], str] = right, **settings: Any
) -> Rollout:
    access = Scripted("https://chat/score", "key")
    object.__setattr__(access, "say", say)
    azure = {"poll": {"interval": 0.05}, "rollout": {"minutes": 0, **settings}}
    recipe = Recipe.model_validate({**RECIPE, "azure": azure})
    before = {name: share for name, share in service.traffic.items() if share}
    target = DeploymentId("chat", "green")
    known = clients(service.wire, run.path)
    return Rollout(known, recipe, run, target, before, access, no_progress, "green bills")


def record(run: Run) -> RolloutManifest:
    return run.require(RolloutManifest)


def sent(service: Service) -> list[dict[str, int]]:
    """The shares that were sent, without those of 0."""
    traffic = [body["properties"]["traffic"] for body in service.puts]
    return [{name: share for name, share in shares.items() if share} for shares in traffic]


def test_the_traffic_moves_in_steps_each_judged(run: Run) -> None:
    service = Service()
    work = rollout(service, run)

    work.go()

    assert sent(service) == STEPS
    assert service.tags == {"team": "ours"}  # the rollout's own tag is gone
    assert [body["tags"].get(ROLLOUT_TAG, "")[:21] for body in service.puts] == [
        *["to green from blue=10"] * 3,
        "",
    ]
    assert record(run).state == "done"
    assert record(run).before == BLUE
    assert [line[:22] for line in work.lines] == [
        "with 0 % of the traffi",
        "with 5 % of the traffi",
        "with 25 % of the traff",
        "with 100 % of the traf",
    ]
    assert "20 of 20 answered (blue: 20 of 20), 20 of 20 right (20)" in work.lines[0]


def test_the_shares_from_before_are_kept_before_the_first_change(run: Run) -> None:
    service = Service()
    seen: list[tuple[str, dict[str, int]]] = []
    change = service.change

    def noted() -> Any:
        seen.append((record(run).state, dict(record(run).before)))
        return change()

    service.change = noted  # type: ignore[method-assign]
    rollout(service, run).go()

    assert seen[0] == ("begun", BLUE)


@pytest.mark.parametrize("share", [0, 5, 25, 100])
@pytest.mark.parametrize("form", ["", "\ufffd\ufffd", "I am glad to help", "It is 999", "fails"])
def test_what_is_worse_at_any_step_is_undone(run: Run, share: int, form: str) -> None:
    service = Service()

    def say(deployment: str, question: str) -> str:
        if deployment == "green" and service.traffic.get("green", 0) == share:
            if form == "fails":
                raise ServiceError("no healthy upstream", status=503)
            return form
        return right(deployment, question)

    with pytest.raises(StageError) as caught:
        rollout(service, run, say).go()

    told = str(caught.value)
    assert f"green of chat is worse than blue, with {share} % of the traffic" in told
    assert "What is" in told  # which answers sank it
    assert "read back from Azure: blue 100 %.\ngreen bills" in told
    assert service.traffic == BLUE
    assert ROLLOUT_TAG not in service.tags
    assert record(run).state == "undone"
    assert "worse than blue" in record(run).reasons[0]


def test_a_refused_step_is_undone_with_azures_reason(run: Run) -> None:
    service = Service()
    change = service.change

    def refuse() -> Any:
        if service.wire.sent[-1][2]["properties"]["traffic"].get("green") == 25:
            return refusal(400, "InvalidTraffic", "green is being moved")
        return change()

    service.change = refuse  # type: ignore[method-assign]
    with pytest.raises(StageError, match="green is being moved") as caught:
        rollout(service, run).go()

    assert "The traffic is as before, read back from Azure: blue 100 %" in str(caught.value)
    assert "green bills" in str(caught.value)
    assert service.traffic == BLUE


def test_before_each_step_azure_is_told_what_to_put_back(run: Run) -> None:
    """With the tag that the endpoint gets next, and for as long as the step takes."""
    service = Service()
    armed: list[tuple[dict[str, int], str, float, int]] = []

    class Keeper:
        def arm(self, before: dict[str, int], tag: str, seconds: float) -> str:
            armed.append((before, tag, seconds, len(service.puts)))
            return "armed"

    work = rollout(service, run, minutes=1e-6)
    work.keeper = Keeper()  # type: ignore[assignment]
    work.go()

    assert [puts for _, _, _, puts in armed] == [0, 1, 2]
    assert {tag for _, tag, _, _ in armed} == {tag_of(record(run))}
    assert {body["tags"].get(ROLLOUT_TAG) for body in service.puts} == {tag_of(record(run)), None}
    assert all(before == BLUE and 0 < seconds < 60 for before, _, seconds, _ in armed)


def test_ctrl_c_gives_the_traffic_back(run: Run) -> None:
    service = Service()

    def say(deployment: str, question: str) -> str:
        if service.traffic.get("green"):
            raise KeyboardInterrupt
        return right(deployment, question)

    with pytest.raises(KeyboardInterrupt):
        rollout(service, run, say).go()

    assert service.traffic == BLUE
    assert record(run).state == "undone"


def test_what_cannot_be_rolled_back_is_reported(run: Run) -> None:
    service = Service()

    def say(deployment: str, question: str) -> str:
        if deployment == "green" and service.traffic.get("green"):
            service.refusals = [refusal(403, "AuthorizationFailed", "no right any more")] * 9
            return ""
        return right(deployment, question)

    with pytest.raises(StageError) as caught:
        rollout(service, run, say).go()

    assert "could not be put back to blue 100 %" in str(caught.value)
    assert "phi3 azure rollback --run my-run" in str(caught.value)
    assert record(run).state == "begun"


def test_the_first_deployment_is_held_against_its_evaluation(run: Run) -> None:
    service = Service(traffic={})
    rollout(service, run).go()
    assert sent(service) == [{"green": 100}]

    service = Service(traffic={})
    with pytest.raises(StageError, match="worse than the evaluated model, with 0 %"):
        rollout(service, run, lambda _deployment, _question: "It is 999").go()
    assert service.puts == []


def test_an_old_one_that_answers_nothing_is_no_measure(run: Run) -> None:
    service = Service()

    def say(deployment: str, question: str) -> str:
        return "" if deployment == "blue" else right(deployment, question)

    rollout(service, run, say).go()

    assert sent(service) == STEPS


def test_one_that_has_the_traffic_is_left_alone(run: Run) -> None:
    service = Service(traffic={"green": 100})
    rollout(service, run).go()
    assert service.puts == []
    assert run.read(RolloutManifest) is None


@pytest.mark.parametrize("knows", ["the run folder", "the tag", "another run"])
def test_an_interrupted_rollout_is_undone(run: Run, knows: str) -> None:
    """A client killed at 5 %: the next one puts the shares back, whoever still knows them."""
    begun = RolloutManifest(
        endpoint_name="chat", deployment="green", before=BLUE, share=5, started="2026-11-29T09:00"
    )
    service = Service(traffic={"blue": 95, "green": 5})
    if knows == "the tag":
        service.tags = {"team": "ours", ROLLOUT_TAG: tag_of(begun)}
    else:
        if knows == "another run":  # which has taken the endpoint over since
            begun = begun.model_copy(update={"deployment": "older"})
        run.write(begun)
    known = clients(service.wire, run.path)
    recipe = rollout(service, run).recipe

    endpoint = known.ml.online_endpoints.get("chat")
    found = undo_interrupted(known, recipe.azure, run, endpoint, no_progress)

    expected = {"blue": 95, "green": 5} if knows == "another run" else BLUE
    assert found == expected
    assert {name: n for name, n in service.traffic.items() if n} == expected
    assert ROLLOUT_TAG not in service.tags
    if knows == "the run folder":
        assert record(run).state == "undone"


@pytest.mark.parametrize(
    ("failed", "before", "requests", "worse"),
    [(9, 0, 200, True), (9, 9, 200, False), (2, 0, 200, False), (5, 0, 20, False)],
)
def test_failed_requests_that_azure_monitor_counted_are_a_reason(
    run: Run, failed: int, before: int, requests: int, worse: bool
) -> None:
    service = Service(failed={"green": failed, "blue": before}, requests=requests)
    work = rollout(service, run, minutes=1e-6)

    if worse:
        with pytest.raises(StageError, match=r"Azure Monitor: 4.5% of 200 requests failed \(blue"):
            work.go()
    else:
        work.go()
        assert f"of {requests} requests failed" in work.lines[1]


@pytest.mark.parametrize("before", [{}, {"gone": 100}])
def test_what_serves_keeps_its_traffic_where_nobody_could_have_it_back(
    run: Run, before: dict[str, int]
) -> None:
    """Killed after the first deployment had got the traffic; or the old one was deleted since."""
    run.write(RolloutManifest(endpoint_name="chat", deployment="green", before=before, share=100))
    service = Service(traffic={"green": 100})
    known, recipe = clients(service.wire, run.path), rollout(service, run).recipe

    endpoint = known.ml.online_endpoints.get("chat")
    found = undo_interrupted(known, recipe.azure, run, endpoint, no_progress)

    assert found == {"green": 100}
    assert service.puts == []
    assert record(run).state == "done"


def test_shares_add_up_whatever_the_rounding() -> None:
    assert shares_at({"a": 34, "b": 33, "c": 33}, "new", 5) == {"a": 32, "b": 32, "c": 31, "new": 5}
    assert shares_at({"a": 50, "new": 50}, "new", 75) == {"a": 25, "new": 75}
    assert shares_at({"a": 100}, "new", 100) == {"new": 100}


def test_a_tag_says_what_it_said() -> None:
    begun = RolloutManifest(
        endpoint_name="chat", deployment="green", before={"a": 60, "b": 40}, started="now"
    )
    assert tagged(tag_of(begun)) == Interrupted("green", {"a": 60, "b": 40})
    assert tagged("something else") is None
    assert tagged(None) is None


@pytest.mark.parametrize("steps", [[], [5, 25], [25, 5, 100], [0, 100], [100, 100]])
def test_steps_rise_to_all(steps: list[int]) -> None:
    with pytest.raises(ValueError, match=r"steps"):
        Recipe.model_validate({**RECIPE, "azure": {"rollout": {"steps": steps}}})
