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
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ResourceNotFoundError,
    ServiceResponseError,
)

from phi3_training.errors import StageError
from phi3_training.manifests import ModelManifest
from phi3_training.recipe.azure import PollSection
from phi3_training.run import Run
from phi3_training.targets.azure import jobs
from phi3_training.targets.azure.in_job import ERROR, PROGRESS


class Container:
    """The storage service, with the log of the one job; `log` is what it holds."""

    log: Callable[[], bytes]

    def __init__(self, *_where: str, **_options: Any) -> None:
        """Nothing is opened."""

    def list_blobs(self, name_starts_with: str) -> list[Any]:
        return [SimpleNamespace(name=f"{name_starts_with}user_logs/std_log.txt")]

    def download_blob(self, _name: str) -> Any:
        return SimpleNamespace(readall=type(self).log)


class Cloud:
    """The part of MLClient that jobs use; `end` is what each job comes to, once it is let go."""

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
        self.lost_looks, self.lost_status = 0, 404
        self.datastores = SimpleNamespace(
            get=lambda _store, include_secrets: SimpleNamespace(
                account_name="a", container_name="c", credentials=None
            )
        )
        self.credential = None
        Container.log = staticmethod(lambda: "".join(f"{line}\n" for line in lines).encode())

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
            error: HttpResponseError = ResourceNotFoundError("no such job")
            error.status_code = 404
            if name in self.known and self.lost_status == 401:
                error = ClientAuthenticationError("the token has expired")
                error.status_code = 401
            raise error
        job = self.known[name]
        looked_at = SimpleNamespace(**vars(job))
        if self.held.is_set() and job.status == "Running":
            job.status = self.end
        return looked_at

    def stream(self, _name: str) -> None:
        print("the whole log again")
        message = '{"error": {"code": "OutOfQuota", "message": "none left, sig=abcdefgh&x"}}'
        raise JobException(message=message, no_personal_data_message="failed")

    def begin_cancel(self, name: str) -> Any:
        self.cancelled.append(name)
        self.known[name].status = "Canceled"
        return SimpleNamespace(wait=lambda _seconds: None)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("azure.storage.blob.ContainerClient", Container)
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


def test_without_an_error_in_its_log_a_failed_job_has_azures_reason(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StageError, match="OutOfQuota: none left") as caught:
        carry_out(Cloud("Failed", ("loading",)), run)
    assert "abcdefgh" not in str(caught.value)
    assert "the whole log again" not in "".join(capsys.readouterr())


def test_a_log_that_cannot_be_read_leaves_the_job_to_its_end(run: Run) -> None:
    def refuse() -> bytes:
        raise HttpResponseError("AuthenticationFailed")

    cloud = Cloud()
    Container.log = staticmethod(refuse)
    assert carry_out(cloud, run).status == "Completed"
    assert (run.path / "azure" / "train.log").read_text() == ""


def test_the_jobs_page_is_shown_once_and_a_last_line_without_its_end_too(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud = Cloud()
    Container.log = staticmethod(lambda: b"10 %\r50 %\r100 %\nthe end")
    cloud.after_put = lambda: [setattr(j, "studio_url", "https://ml") for j in cloud.known.values()]
    carry_out(cloud, run)
    assert (run.path / "azure" / "train.log").read_text() == "100 %\nthe end\n"
    assert capsys.readouterr().err.count("Web View: https://ml") == 1


@pytest.mark.parametrize("status", [404, 401])
def test_a_job_that_cannot_be_read_for_a_moment_is_asked_for_again(run: Run, status: int) -> None:
    cloud = Cloud()
    cloud.lost_looks, cloud.lost_status = 2, status
    assert carry_out(cloud, run).status == "Completed"


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
    cloud.held.clear()
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
