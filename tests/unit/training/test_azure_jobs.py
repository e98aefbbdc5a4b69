"""A job is named before it is submitted, resumed, and never started a second time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from azure.ai.ml.exceptions import JobException
from azure.core.exceptions import HttpResponseError, ResourceNotFoundError, ServiceResponseError

from phi3_training.errors import StageError
from phi3_training.manifests import ModelManifest
from phi3_training.recipe.azure import PollSection
from phi3_training.run import Run
from phi3_training.targets.azure import jobs
from phi3_training.targets.azure.in_job import ERROR, PROGRESS


class Cloud:
    """The part of MLClient that jobs use; `end` is what each job comes to."""

    def __init__(self, end: str = "Completed", lines: tuple[str, ...] = ()) -> None:
        self.known: dict[str, Any] = {}
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self.end = end
        self.lines = lines
        self.before_put: Callable[[], None] = lambda: None
        self.after_put: Callable[[], None] = lambda: None
        self.held = threading.Event()
        self.held.set()
        self.jobs = self
        self.ml = self
        self.poll = PollSection(interval=0.05, job_interval=0.05)
        self.lost_looks = 0

    def create_or_update(self, job: Any) -> Any:
        self.before_put()
        if job.name not in self.known:
            self.submitted.append(job.name)
            self.known[job.name] = SimpleNamespace(name=job.name, status="Running", outputs={})
        self.after_put()
        return self.known[job.name]

    def get(self, name: str) -> Any:
        self.lost_looks -= name in self.known
        if name not in self.known or self.lost_looks >= 0:
            error = ResourceNotFoundError("no such job")
            error.status_code = 404
            raise error
        return self.known[name]

    def stream(self, name: str) -> None:
        for line in self.lines:
            print(line)
        self.held.wait(30)
        self.known[name].status = self.end
        if self.end == "Failed":
            raise JobException(
                message='{"error": {"message": "sig=abcdefgh&x"}}',
                no_personal_data_message="failed",
            )

    def begin_cancel(self, name: str) -> Any:
        self.cancelled.append(name)
        self.known[name].status = "Canceled"
        return SimpleNamespace(wait=lambda _seconds: None)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "mine")


def carry_out(cloud: Cloud, run: Run, inputs: str = "a", **options: Any) -> Any:
    progress = options.pop("progress", lambda _done, _total, _text: None)
    return jobs.run_job(
        cloud,  # type: ignore[arg-type]
        run,
        jobs.TRAIN,
        inputs,
        "job",
        lambda name: SimpleNamespace(name=name),
        progress,
        limit=options.pop("limit", 30.0),
    )


def test_the_name_is_on_disk_before_azure_hears_of_it(run: Run) -> None:
    cloud = Cloud()
    seen = []

    def look() -> None:
        kept = json.loads((run.path / "azure" / "jobs.json").read_text())
        seen.append(kept["train"]["name"])

    cloud.before_put = look
    assert carry_out(cloud, run).name == seen[0] == cloud.submitted[0]


def test_killed_between_name_and_call_uses_the_name(run: Run) -> None:
    cloud = Cloud()

    def die() -> None:
        raise SystemExit(9)

    cloud.before_put = die
    with pytest.raises(SystemExit):
        carry_out(cloud, run)
    name = jobs.recorded_jobs(run)["train"].name
    cloud.before_put = lambda: None
    assert carry_out(cloud, run).name == name
    assert cloud.submitted == [name]


@pytest.mark.parametrize("error", [ServiceResponseError("reset"), "500", "409"])
def test_an_answer_that_was_lost_starts_no_second_job(run: Run, error: Any) -> None:
    cloud = Cloud()

    def lose() -> None:
        cloud.after_put = lambda: None
        if isinstance(error, Exception):
            raise error
        raised = HttpResponseError("lost")
        raised.status_code = int(error)
        raise raised

    cloud.after_put = lose
    assert carry_out(cloud, run).status == "Completed"
    assert len(cloud.submitted) == 1


def test_a_running_job_is_resumed_and_a_finished_one_is_used(run: Run) -> None:
    cloud = Cloud()

    def die() -> None:
        raise SystemExit(9)

    cloud.after_put = die
    with pytest.raises(SystemExit):
        carry_out(cloud, run)
    cloud.after_put = lambda: None
    first = carry_out(cloud, run).name  # it works
    assert carry_out(cloud, run).name == first  # it is done, and nobody has used it yet
    assert cloud.submitted == [first]
    run.write(ModelManifest(path=".", job=first))
    assert carry_out(cloud, run).name != first  # used: to train again is a new job
    assert len(cloud.submitted) == 2


def test_other_settings_beside_a_working_job_are_refused_with_the_way_out(run: Run) -> None:
    cloud = Cloud()

    def die() -> None:
        raise SystemExit(9)

    cloud.after_put = die
    with pytest.raises(SystemExit):
        carry_out(cloud, run, "a")
    with pytest.raises(StageError, match="phi3 azure cancel --run mine"):
        carry_out(cloud, run, "b")
    assert len(cloud.submitted) == 1


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("Failed", "failed"),
        ("Canceled", "was cancelled"),
        ("NotResponding", "stopped responding"),
    ],
)
def test_every_end_but_completed_is_a_failure_and_the_next_try_is_new(
    run: Run, end: str, said: str
) -> None:
    cloud = Cloud(end, ("loading", "Bearer abcdefghijkl", f"{ERROR}{json.dumps('no memory')}"))
    with pytest.raises(StageError) as caught:
        carry_out(cloud, run)
    text = str(caught.value)
    assert said in text
    assert "no memory" in text
    assert "abcdefgh" not in text
    log = (run.path / "azure" / "train.log").read_text()
    assert "loading" in log
    assert "abcdefgh" not in log
    cloud.end = "Completed"
    assert carry_out(cloud, run).status == "Completed"
    assert len(cloud.submitted) == 2


def test_progress_of_the_job_is_shown_and_is_no_log_line(run: Run) -> None:
    told: list[tuple[int, int, str]] = []
    cloud = Cloud(lines=(f'{PROGRESS}[3, 10, "loss 1.5"]', "plain", f"{PROGRESS}not json"))
    carry_out(cloud, run, progress=lambda *said: told.append(said))
    assert (3, 10, "loss 1.5") in told
    assert (run.path / "azure" / "train.log").read_text() == "plain\n"


def test_a_storage_refusal_is_not_taken_for_the_jobs_words(run: Run) -> None:
    refusal = '<?xml version="1.0"?><Error><Code>AuthenticationFailed</Code></Error>'
    cloud = Cloud(lines=(refusal, "after it the SDK is not listened to"))

    def goes_on_without_the_log() -> None:
        (job,) = cloud.known.values()
        threading.Timer(0.3, lambda: setattr(job, "status", "Completed")).start()

    cloud.after_put = goes_on_without_the_log
    carry_out(cloud, run)
    assert (run.path / "azure" / "train.log").read_text() == ""


def test_what_the_sdk_says_around_the_log_is_not_shown_twice(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    around = ("RunId: j", "Web View: https://ml", "Streaming user_logs/std_log.txt", "====")
    carry_out(Cloud(lines=(*around, "real", "Execution Summary", "====", *around[:2])), run)
    shown = capsys.readouterr().err
    assert shown.count("Web View") == 1
    assert "real" in shown
    assert "Execution Summary" not in shown
    assert "RunId" not in shown


def test_a_job_that_is_not_found_for_a_moment_is_asked_for_again(run: Run) -> None:
    cloud = Cloud()
    cloud.lost_looks = 2
    assert carry_out(cloud, run).status == "Completed"


def test_what_this_program_prints_is_not_taken_for_the_job(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def progress(_done: int, _total: int, _text: str) -> None:
        print("ours")

    carry_out(Cloud(lines=("theirs",)), run, progress=progress)
    shown = capsys.readouterr().out
    assert "ours" in shown
    assert "theirs" not in shown


def test_ctrl_c_leaves_the_job_and_says_how_to_come_back(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud = Cloud()
    cloud.held.clear()

    def interrupt(_done: int, _total: int, text: str) -> None:
        if text.startswith("running"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(cloud, run, progress=interrupt)
    shown = capsys.readouterr().err
    assert "phi3 up --on azure --run mine" in shown
    assert "phi3 azure cancel --run mine" in shown
    assert cloud.cancelled == []
    cloud.held.set()
    assert carry_out(cloud, run).name == cloud.submitted[0]
    assert len(cloud.submitted) == 1


def test_a_wait_has_a_limit(run: Run) -> None:
    cloud = Cloud()
    cloud.held.clear()
    started = time.monotonic()
    with pytest.raises(StageError, match="may bill"):
        carry_out(cloud, run, limit=0.2)
    assert time.monotonic() - started < 20
    cloud.held.set()


def test_cancel_ends_what_works_and_nothing_else(run: Run) -> None:
    cloud = Cloud()
    done = carry_out(cloud, run).name
    assert jobs.cancel_all(cloud, run) == []  # type: ignore[arg-type]
    cloud.known[done].status = "Running"
    assert jobs.cancel_all(cloud, run) == [f"cancelled the job {done}"]  # type: ignore[arg-type]
    assert cloud.cancelled == [done]


def test_a_broken_jobs_file_is_reported_and_not_overwritten(run: Run) -> None:
    path = run.file("azure", "jobs.json")
    path.write_text("[]")
    cloud = Cloud()
    with pytest.raises(StageError, match="A job may still be running"):
        carry_out(cloud, run)
    assert cloud.submitted == []
    assert path.read_text() == "[]"
