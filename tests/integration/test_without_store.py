"""The endpoint's key without Prompt flow's store: the running server hands it to its own user."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.no_promptflow import block_promptflow
from tests.integration.stub_endpoint import SSE, Reply, StubEndpoint, chunk

from phi3_tool.client import Phi3Client
from phi3_training.errors import StageError
from phi3_training.manifests import EndpointManifest
from phi3_training.run import Run
from phi3_training.serve import process
from phi3_training.serve.config import ServerConfig
from phi3_training.targets.local import LocalTarget, settings_from_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract Unix sockets")

ADDED_BY = 'pip install "phi3-promptflow[flow]"'
COMMANDS = """\
import sys
from pathlib import Path
from phi3_training.cli import main
from phi3_training.journey import Journey
from phi3_training.manifests import AnswerManifest, ConnectionManifest
from phi3_training.recipe import Recipe
from phi3_training.run import Run
from phi3_training.stages import STAGES
from phi3_training.targets.local import LocalTarget

stages = {stage.manifest: stage for stage in STAGES}
recipe = Recipe.model_construct(ask="Who?")
journey = Journey(recipe, Run(Path(sys.argv[1])), LocalTarget(), Path("no-flow"))
print(stages[ConnectionManifest].left_out(journey))
print(stages[AnswerManifest].summary(stages[AnswerManifest].work(journey)), flush=True)
sys.exit(main(["chat", "Who?"]) or main(["doctor"]))
"""
KEY = "planted-Key-77c0e1"
END = b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run whose endpoint passes questions on, so that no model is loaded."""
    made = Run.open(tmp_path_factory.mktemp("store") / "run")
    with StubEndpoint(Reply(body=chunk("Bill") + END, headers=SSE)) as stub:
        config = ServerConfig(engine="upstream", upstream_url=stub.url("/v1"), upstream_model="m")
        started = process.start(config, key=KEY, log_path=made.file("endpoint.log"))
        made.write(
            EndpointManifest(
                endpoint=started.endpoint,
                pid=started.pid,
                create_time=started.create_time,
                context_length=2048,
            )
        )
        try:
            yield made
        finally:
            process.stop(started.pid, started.create_time)


def test_the_server_answers_to_the_key_that_it_hands_out(run: Run) -> None:
    settings = settings_from_server(run)
    assert (settings.key, settings.context_length, settings.deployment) == (KEY, 2048, None)
    with Phi3Client.from_connection(settings) as client:
        assert client.chat([{"role": "user", "content": "Who?"}]).text == "Bill"


def test_a_new_process_knows_the_key_of_a_running_endpoint(run: Run) -> None:
    """After a stop between `deploy` and `connect` the same endpoint is connected."""
    assert LocalTarget().key(run) == KEY


def test_nothing_on_disk_holds_it(run: Run) -> None:
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_stopped_server_hands_out_nothing(run: Run, tmp_path: Path) -> None:
    gone = Run.open(tmp_path / "gone")
    manifest = run.require(EndpointManifest)
    gone.write(manifest.model_copy(update={"create_time": (manifest.create_time or 0) - 100}))
    with pytest.raises(StageError, match="phi3 down gone && phi3 up --run gone"):
        settings_from_server(gone)


def test_the_commands_find_the_endpoint_without_prompt_flow(run: Run, tmp_path: Path) -> None:
    """In one process: the last stages of `up`, a question, and the doctor, who finds no fault."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(run.path)],
        env={
            **os.environ,
            "PHI3_RUNS": str(run.path.parent),
            "PYTHONPATH": os.pathsep.join([block_promptflow(tmp_path), *sys.path]),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    connect, ask, chat, *doctor = done.stdout.splitlines()
    assert connect == f"Prompt flow is not installed; add it with: {ADDED_BY}"
    assert ask.startswith("'Who?' answered by the endpoint itself; left out: the flow"), done.stderr
    assert ADDED_BY in ask
    assert chat == "Bill", done.stderr
    assert done.returncode == 0, doctor
    assert any("promptflow" in line and ADDED_BY in line for line in doctor)
